"""The experts of a mixture as linears of their own: the form in which they are calibrated, rounded and stored.

transformers keeps the weights of all experts of a block in one tensor for each projection. How they lie in it differs
by family: gate and up one after the other or row by row in turn, inputs before outputs, with biases, without gates.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .grouped_experts import can_group, grouped, weighted_sum

GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # set by transformers' use_experts_implementation


@dataclass(frozen=True)
class Part:
    """Where a parameter of one expert lies in the tensor of all experts.

    fused: that tensor's name in the block. source: which of the tensors that are joined in it this is, 0 the gate and
    1 the up projection. rows: of the fused tensor; where it is [experts, ...], one. half: the rows that are meant of
    the expert's matrix, once it is [out, in]. transposed: whether it is stored as [in, out].
    """

    fused: str
    source: int
    expert: int
    rows: slice
    half: slice
    transposed: bool

    def of(self, rows: Tensor) -> Tensor:
        """The parameter, in memory of its own, from the `rows` of the fused tensor."""
        one = rows[0] if self.rows.stop - self.rows.start == 1 else rows
        return (one.T if self.transposed else one)[self.half].contiguous().clone()


class _UnsetLinear(nn.Linear):
    """A linear whose values come from a file: drawing them first takes most of the time of making a large mixture."""

    def reset_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class ExpertShape:
    """names: of an expert's linears, down the last; they are the checkpoint's. dtype: None for torch's default."""

    names: tuple[str, ...]
    hidden: int
    intermediate: int
    bias: bool = False
    dtype: torch.dtype | None = None


class Expert(nn.Module):
    """down(combine(gate(x), up(x))), or down(combine(up(x))) without gates, for x [tokens, hidden]."""

    def __init__(
        self, shape: ExpertShape, combine: Callable[..., Tensor], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self._names, self._combine = shape.names, (combine,)  # a tuple, so that a module in it is no submodule
        for name in shape.names:
            sides = (shape.hidden, shape.intermediate)
            n_in, n_out = sides[::-1] if name == shape.names[-1] else sides
            self.add_module(name, _UnsetLinear(n_in, n_out, shape.bias, device, shape.dtype))

    @property
    def linears(self) -> list[nn.Linear]:
        """All linears, the down projection last."""
        return [self.get_submodule(name) for name in self._names]  # type: ignore[misc]

    @property
    def last(self) -> nn.Module:
        """The down projection."""
        return self.get_submodule(self._names[-1])

    @property
    def combine(self) -> Callable[..., Tensor]:
        """What the down projection receives, of what the others put out."""
        return self._combine[0]

    def inner(self, x: Tensor) -> Tensor:
        """What the down projection receives [tokens, intermediate] for x [tokens, hidden]."""
        return self.combine(*(self.get_submodule(name)(x) for name in self._names[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(x))
        return out


class SplitExperts(nn.ModuleList):
    """Experts as linears of their own, so that each is calibrated and rounded on the tokens routed to it.

    Every expert is called, even with zero tokens, so that each pass reaches the same linears in the same order whatever
    the routing: of all experts those that are given the block's states, then of all the down projections. identities:
    experts after these that return what they are given (LongCat).
    """

    # Called before either half with whether it is the second, the states [tokens, hidden], their routing, and what an
    # expert's linears are about to receive, by its number. Returns whether nothing but the results of the linears
    # matters, so that they may be computed together, without their hooks.
    reached: Callable[[bool, Tensor, "Routing", Callable[[int], Tensor]], bool] | None = None

    def __init__(self, experts: Iterable[nn.Module], identities: int = 0) -> None:
        super().__init__(experts)
        self.identities = identities

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The chosen experts' weighted sum, for hidden [..., hidden]; index and weights are [tokens, chosen]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(rows)
        routing = Routing(top_k_index, len(self))
        weights = routing.of_choices(top_k_weights)
        together = False
        if self.reached is not None:
            together = self.reached(False, rows, routing, lambda e: rows[routing.tokens(e)])
        if together and self.can_group(rows):
            return self._grouped(rows, routing, top_k_weights).reshape(hidden.shape)
        inner: list[Tensor] = [expert.inner(rows[routing.tokens(e)]) for e, expert in enumerate(self)]  # type: ignore[operator]
        if self.reached is not None:
            self.reached(True, rows, routing, inner.__getitem__)
        for e, expert in enumerate(self):
            result = expert.last(inner[e]) * weights[routing.of(e), None]  # type: ignore[operator]
            inner[e] = rows[:0]  # freed
            out.index_add_(0, routing.tokens(e), result.to(out.dtype))
        if self.identities:
            token, here = routing.tokens(len(self)), routing.of(len(self))
            out.index_add_(0, token, (rows[token] * weights[here, None]).to(out.dtype))
        return out.reshape(hidden.shape)

    def can_group(self, rows: Tensor) -> bool:
        """Whether all experts' linears of a kind can be one product for rows [tokens, hidden]."""
        experts = list(self)
        return not self.identities and all(isinstance(e, Expert) for e in experts) and can_group(self._linears(), rows)

    def inner(self, rows: Tensor, routing: "Routing") -> Tensor:
        """What the down projections receive [choices, intermediate], by expert, where `can_group` allows it."""
        x, expert = rows[routing.tokens_by_expert], self[0]
        *outer, _ = zip(*self._linears(), strict=True)
        out: Tensor = expert.combine(*(grouped(x, alike, routing.ends) for alike in outer))  # type: ignore[operator]
        return out

    def _grouped(self, rows: Tensor, routing: "Routing", top_k_weights: Tensor) -> Tensor:
        """The rest of `forward` in a product for each kind of linear."""
        inner = self.inner(rows, routing)
        if self.reached is not None:
            self.reached(True, rows, routing, lambda e: inner[routing.of(e)])
        *_, last = zip(*self._linears(), strict=True)
        return weighted_sum(grouped(inner, last, routing.ends), routing.places, top_k_weights).to(rows.dtype)

    def _linears(self) -> list[list[nn.Linear]]:
        return [expert.linears for expert in self]  # type: ignore[misc]


class Routing:
    """The tokens that each expert is chosen for, sorted once for all experts.

    top_k_index: the experts chosen for each token, [tokens, chosen].
    """

    def __init__(self, top_k_index: Tensor, experts: int) -> None:
        # By expert, then by token; `order` are places among all choices.
        chosen, self._order = top_k_index.reshape(-1).sort(stable=True)
        self._token = self._order // top_k_index.shape[-1]
        bounds = torch.searchsorted(chosen, torch.arange(experts + 1, device=chosen.device, dtype=chosen.dtype))
        self._ends, self._chosen = bounds[1:], top_k_index.shape[-1]
        self._bounds: list[int] = bounds.tolist()  # read in one go: a GPU waits for it
        self._bounds.append(len(chosen))

    def of(self, e: int) -> slice:
        """Where the choices of expert `e` lie in `of_choices`; at their number, those of all after them."""
        return slice(self._bounds[e], self._bounds[e + 1])

    def tokens(self, e: int) -> Tensor:
        """The tokens of expert `e` in the order it gets them."""
        return self._token[self.of(e)]

    @property
    def tokens_by_expert(self) -> Tensor:
        """The tokens of all experts, one expert's after the other's."""
        return self._token

    @property
    def ends(self) -> Tensor:
        """int32 [experts]: where the choices of each end."""
        return self._ends.to(torch.int32)

    @property
    def places(self) -> Tensor:
        """Where the choices of each token lie in `of_choices`, [tokens, chosen]."""
        return self._order.argsort().view(-1, self._chosen)

    def of_choices(self, values: Tensor) -> Tensor:
        """values [tokens, chosen] by expert, then by token: [tokens * chosen]."""
        return values.reshape(-1)[self._order]


class WeighedInputs(nn.ModuleList):
    """Experts of Llama 4: each gets all tokens, times its score, which is 0 for those that are not routed to it."""

    def forward(self, hidden: Tensor) -> Tensor:
        """The experts' outputs [experts * tokens, hidden] for inputs of this shape, expert by expert."""
        inputs = hidden.reshape(len(self), -1, hidden.shape[-1])
        out = torch.zeros_like(inputs)
        routed = (inputs != 0).any(-1)
        counts = routed.sum(1).tolist()
        tokens = torch.split(routed.nonzero()[:, 1], counts)
        for e, (expert, token) in enumerate(zip(self, tokens, strict=True)):
            out[e, token] = expert(inputs[e, token])
        return out.reshape(hidden.shape)


class ParallelLinears(nn.ModuleList):
    """One linear for each expert, for inputs that are sorted by expert (JetMoE)."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """inputs [tokens, in], the first `expert_size[0]` of which go to expert 0, and so on."""
        return torch.cat([linear(x) for linear, x in zip(self, torch.split(inputs, expert_size), strict=True)])


class RoutingExperts(SplitExperts):
    """Experts that choose among themselves, `chosen` for each token, by the router's logits (Aria)."""

    def __init__(self, experts: Iterable[nn.Module], chosen: int) -> None:
        super().__init__(experts)
        self._chosen = chosen

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:  # type: ignore[override]
        """As `SplitExperts`, for logits [tokens, experts]."""
        logits, index = torch.topk(router_logits, self._chosen, dim=1)
        return super().forward(hidden, index, logits.softmax(-1))


# Whose experts neither transformers nor a server loads one by one, and servers not quantized.
UNREAD = {"DbrxExpertGLU", "JetMoeParallelExperts", "AriaGroupedExpertsGemm", "AriaExperts", "Step3p7Experts"}
CONTAINERS = (SplitExperts, WeighedInputs, ParallelLinears)


class _Gate:
    """act(gate) * up."""

    def __init__(self, act: nn.Module) -> None:
        self._act = act

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self._act(gate) * up
        return out


class _OwnGate:
    """The gate of a family that has its own, given gate and up as its fused projection returns them."""

    def __init__(self, fused: Any) -> None:
        self._fused, self._joined = fused, bool(fused.is_concatenated)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        both = torch.cat([gate, up], -1) if self._joined else torch.stack([gate, up], -1).flatten(-2)
        out: Tensor = self._fused._apply_gate(both)
        return out


def split_experts(block: nn.Module, names_of: Callable[[str], tuple[str, ...]]) -> dict[str, Part]:
    """Replace the fused experts of a block on the meta device by linears.

    names_of: what the layers in a fused tensor of the block are called in files with a tensor for each expert; empty
    where there are no such files. Returns where each parameter of the linears lies, by its name in the block.
    """
    parts: dict[str, Part] = {}
    for path, module in list(block.named_modules()):
        found = _split(path, module, names_of)
        if found is None:
            continue
        experts, where = found
        parent, _, attribute = path.rpartition(".")
        setattr(block.get_submodule(parent), attribute, experts)
        parts |= {f"{path}.{name}": part for name, part in where.items()}
    return parts


def _split(
    path: str, module: Any, names_of: Callable[[str], tuple[str, ...]]
) -> tuple[nn.ModuleList, dict[str, Part]] | None:
    """The linears of a module with fused experts, and where their parameters lie; None for another module."""
    kind, dtype = type(module).__name__, _dtype(module)
    if all(name in vars(module) for name in _FUSED):
        return _stacked(path, module, names_of)
    if kind == "Llama4TextExperts":
        n, intermediate, hidden = module.down_proj.shape
        experts = _experts(n, ExpertShape(GATED, hidden, intermediate, dtype=dtype), _Gate(module.act_fn))
        halves = slice(0, intermediate), slice(intermediate, None)
        where = dict(_places(path, n, GATED, "gate_up_proj", "down_proj", "weight", halves, True))
        return WeighedInputs(experts), where
    if kind == "LongcatFlashExperts":
        n, hidden, intermediate = module.down_proj.shape
        halves = slice(0, intermediate), slice(intermediate, None)
        where = dict(_places(path, n, GATED, "gate_up_proj", "down_proj", "weight", halves, False))
        experts = _experts(n, ExpertShape(GATED, hidden, intermediate, dtype=dtype), _Gate(module.act_fn))
        return SplitExperts(experts, module.zero_expert_num), where
    if kind == "Step3p7Experts":  # as transformers' decorator would describe it
        module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, False, True
        return _stacked(path, module, names_of)
    if kind == "AriaExperts":
        n, hidden, both = module.fc1.weight.shape
        experts = _experts(n, ExpertShape(GATED, hidden, both // 2, dtype=dtype), _Gate(nn.SiLU()))
        halves = slice(0, both // 2), slice(both // 2, None)
        where = dict(_places(path, n, GATED, "fc1.weight", "fc2.weight", "weight", halves, True))
        return RoutingExperts(experts, module.config.moe_topk), where
    if kind == "JetMoeParallelExperts":
        n, out, size = module.weight.shape
        linears = [_UnsetLinear(size, out, False, "meta", dtype) for _ in range(n)]
        return ParallelLinears(linears), {
            f"{e}.weight": Part(f"{path}.weight", 0, e, slice(e, e + 1), slice(None), False) for e in range(n)
        }
    if kind == "DbrxExperts":
        n, size, names = module.num_experts, module.ffn_hidden_size, ("w1", "v1", "w2")
        shape = ExpertShape(names, module.hidden_size, size, dtype=dtype)
        experts = _experts(n, shape, _Gate(module.mlp.activation_fn))
        return SplitExperts(experts), {
            f"{e}.{name}.weight": Part(
                f"{path}.mlp.{name}", 0, e, slice(e * size, (e + 1) * size), slice(None), name == "w2"
            )
            for e in range(n)
            for name in names
        }
    return None


def _stacked(
    path: str, module: Any, names_of: Callable[[str], tuple[str, ...]]
) -> tuple[nn.ModuleList, dict[str, Part]] | None:
    """As `_split`, for the layout that transformers' own decorator describes."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    n = int(module.down_proj.shape[0])
    if module.get_parameter(first).shape[0] != n:
        return None
    intermediate, hidden = module.down_proj.shape[1:] if module.is_transposed else module.down_proj.shape[:0:-1]
    names = (*names_of(f"{path}.{first}"), *names_of(f"{path}.down_proj"))
    if not names:
        mixtral = ".block_sparse_moe." in f".{path}."  # servers look for the names that Mixtral has there
        names = ("w1", "w3", "w2") if mixtral else GATED
        names = names if module.has_gate else names[1:]
    if len(names) != (3 if module.has_gate else 2):
        return None
    if not module.has_gate:
        combine: Callable[..., Tensor] = module.act_fn
    elif type(module)._apply_gate.__name__ == "_default_apply_gate" and module.is_concatenated:
        combine = _Gate(module.act_fn)
    else:
        combine = _OwnGate(module)
    halves = (slice(0, intermediate), slice(intermediate, None))
    if not module.is_concatenated:
        halves = (slice(0, None, 2), slice(1, None, 2))
    if not module.has_gate:
        halves = (slice(None), slice(None))
    where = dict(_places(path, n, names, first, "down_proj", "weight", halves, bool(module.is_transposed)))
    if module.has_bias:
        where |= dict(_places(path, n, names, f"{first}_bias", "down_proj_bias", "bias", halves, False))
    shape = ExpertShape(names, hidden, intermediate, bool(module.has_bias), _dtype(module))
    experts = _experts(n, shape, combine)
    for name, _ in list(module.named_parameters(recurse=False)):
        delattr(module, name)  # a gate of its own may still need the module, for its limits
    return SplitExperts(experts), where


def _experts(n: int, shape: ExpertShape, combine: Callable[..., Tensor]) -> list[Expert]:
    return [Expert(shape, combine, "meta") for _ in range(n)]


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)


def _places(
    path: str,
    n: int,
    names: tuple[str, ...],
    first: str,
    down: str,
    kind: str,
    halves: tuple[slice, slice],
    transposed: bool,
) -> Iterator[tuple[str, Part]]:
    for e in range(n):
        for i, name in enumerate(names[:-1]):
            yield f"{e}.{name}.{kind}", Part(f"{path}.{first}", i, e, slice(e, e + 1), halves[i], transposed)
        yield f"{e}.{names[-1]}.{kind}", Part(f"{path}.{down}", 0, e, slice(e, e + 1), slice(None), transposed)


def routers(block: nn.Module) -> list[str]:
    """The modules of a block, its experts split, that choose or weigh experts; servers expect them in 16 bit.

    They are found by what they do: beside the experts, with one output for each of them, or a single one.
    """
    owners: dict[str, set[int]] = {}
    for path, module in block.named_modules():
        if isinstance(module, CONTAINERS):
            among = len(module) + (module.identities if isinstance(module, SplitExperts) else 0)
            owners.setdefault(path.rpartition(".")[0], set()).add(among)
    return [
        path
        for path, module in block.named_modules()
        if _chooses(path, module, owners) and not any(isinstance(m, CONTAINERS) for m in _above(block, path))
    ]


def _chooses(path: str, module: nn.Module, owners: dict[str, set[int]]) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return False
    return any(
        (not owner or path.startswith(f"{owner}.")) and (weight.shape[0] == 1 or weight.shape[0] in counts)
        for owner, counts in owners.items()
    )


def _above(block: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around the one at `path`, from the outside."""
    steps = path.split(".")
    for i in range(1, len(steps)):
        yield block.get_submodule(".".join(steps[:i]))
