"""One pass of a decoder block over the calibration set, halted before each linear that is still to be rounded.

Every batch is a coroutine. All of them run up to the first linear and wait; the second moment of its inputs is then
complete, the caller rounds it, and they go on with the rounded weight. So a block runs once, not once to calibrate and
once to propagate, and each linear is rounded for the inputs it will really get, with the errors of those before it.

Where the original model runs beside, each batch has a second coroutine in the original block: what a linear receives
there, token by token, is what its inputs are compared with.
"""

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.layer_error import output_power
from ..methods.panels import panels
from ..models.arguments import Arguments
from ..models.skeleton import Expert, Experts
from ..numbers.activations import measured, round_inputs
from ..numbers.grid import Inputs
from ..numbers.types import Activations

Group = tuple[str, ...]  # names of linears that receive one tensor
_ROWS = 1024  # tokens in one product of a moment: their float32 copies are the largest tensors beside what waits

BATCH_TOKENS = 4096  # tokens in one forward pass of a block


@dataclass(frozen=True)
class SharedInput:
    """Linears that receive the same tensor X [tokens, in], about to be applied, and what is known of X.

    moment: X^T X [in, in] float32, the Hessian without its factor 2; its diagonal [in] where only that was asked for or
    an importance matrix gives it; None where nothing is known. tokens: rows of X. drift: D^T X [in, in], D = X0 - X, X0
    the same tokens' inputs in the original model; None where the original does not run beside. drift_power: ||D W^T||^2
    for each row of the weight W, [out] by linear; empty without a drift. unmatched: the original runs beside, but which
    of its inputs belong to the same tokens is not known. inputs: how X is rounded as the artifact runs, None where it is
    not; X in the moments is X so rounded.
    """

    names: Group
    moment: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    drift_power: Mapping[str, Tensor] = field(default_factory=dict)
    unmatched: bool = False
    inputs: Inputs | None = None


class BlockPass:
    """Iterate over the shared inputs of `block`; the weights of their linears are to be replaced before the next one.

    hidden [samples, seq_len, hidden] is replaced by what the block makes of it, `batch` samples at a time, unless
    `keep` is false: then the rest of the block after the last linear is not run. linears {name: module} are the ones
    to halt at. reference: the original model's hidden states, likewise replaced by what the block's weights as they
    are now make of them. activations: how the inputs of the linears are rounded, and how many columns share a dynamic
    scale. watch: called with the first name of a group and some rows of X [tokens, in] float32, until all of X has
    passed. diagonal: of the moments only the diagonal [in] is wanted. begin: called when the pass begins; the block has
    run before that on one sample, to see the order of its linears.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        arguments: Arguments,
        linears: Mapping[str, nn.Module],
        *,
        device: torch.device,
        batch: int,
        keep: bool = True,
        reference: Tensor | None = None,
        activations: tuple[Activations, int] | None = None,
        diagonal: bool = False,
        watch: Callable[[str, Tensor], None] = lambda name, rows: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._block, self._hidden, self._arguments, self._device = block, hidden, arguments, device
        self._linears, self._batch, self._keep, self._reference = dict(linears), batch, keep, reference
        self._activations, self._diagonal, self._watch, self._begin = activations, diagonal, watch, begin
        self._inputs: dict[str, Inputs] = {}
        self._original: _Block | None = None

    def __iter__(self) -> Generator[SharedInput, None, None]:
        shared = shared_inputs(self._block, self._hidden[:1].to(self._device), self._arguments, self._linears)
        now = _Block(self._block, self._linears, self._arguments, self._device)
        if self._reference is not None:
            # Shares the parameters, which the caller replaces in the block and never writes to.
            original = copy.deepcopy(self._block, {id(p): p for p in self._block.parameters()})
            self._original = now.in_the_place_of(original)
        hidden = torch.split(self._hidden, self._batch)
        reference = hidden if self._reference is None else torch.split(self._reference, self._batch)
        batches = [
            PairedBatch(now, self._original, shared, *parts, keep=self._keep, inputs=self._inputs)
            for parts in zip(hidden, reference, strict=True)
        ]
        self._begin()
        try:
            for names in shared:
                yield self._shared_input(names, batches)
            reached = {name for names in shared for name in names}
            yield from (self._shared_input((name,), ()) for name in self._linears if name not in reached)
            if self._keep:
                for batch in batches:
                    batch.finish()
        finally:
            for batch in batches:
                batch.drop()

    def _shared_input(self, names: Group, batches: Sequence["PairedBatch"]) -> SharedInput:
        """Take every batch to the linears `names` and sum up what they are about to receive."""
        waiting: Iterable[Tensor] = (batch.advance(names) for batch in batches)
        if self._activations is not None and self._activations[0].calibrated:
            waiting = list(waiting)
        inputs = self._measured(waiting)
        if inputs is not None:
            self._inputs |= dict.fromkeys(names, inputs)
        sums = _Moments(diagonal=self._diagonal)
        for batch, x in zip(batches, waiting, strict=True):
            original = batch.original_input(names)
            for start in range(0, x.shape[0], _ROWS):
                part = x[start : start + _ROWS]
                seen = part if inputs is None else round_inputs(part, inputs)
                rows = seen.to(torch.float32)
                self._watch(names[0], rows)
                sums.add(seen, rows, None if original is None else original[start : start + _ROWS])
            sums.count(x, unmatched=self._original is not None and original is None)
            del original
            batch.let_go(names)
        return SharedInput(names, sums.moment(), sums.tokens, *self._drift(names, sums), sums.unmatched, inputs)

    def _drift(self, names: Group, sums: "_Moments") -> tuple[Tensor | None, dict[str, Tensor]]:
        """The two sums over D that `SharedInput` has."""
        if self._original is None or sums.drift is None or sums.unmatched:
            return None, {}
        squares = sums.drift_moment()
        weights = {name: matrix(self._original.linears[name]).to(torch.float32) for name in names}
        return sums.drift, {name: output_power(weight, squares) for name, weight in weights.items()}

    def _measured(self, waiting: Iterable[Tensor]) -> Inputs | None:
        """How what is `waiting` before a linear, [tokens, in] a batch, will be rounded; taken only if calibrated."""
        if self._activations is None:
            return None
        spec, columns = self._activations
        ranges = [x.aminmax() for x in waiting if x.numel()] if spec.calibrated else []
        low = min((float(r.min) for r in ranges), default=0.0)
        return measured(spec, columns, low, max((float(r.max) for r in ranges), default=0.0))


def paired_batches(
    block: nn.Module,
    original: nn.Module,
    linears: Mapping[str, nn.Module],
    hidden: Tensor,
    reference: Tensor,
    arguments: Arguments,
    *,
    device: torch.device,
    batch: int,
) -> Iterator[tuple[Group, Tensor, Tensor | None]]:
    """Run a block and its original over their hidden states, `batch` samples at a time: (names, X, X0).

    One for each batch and each group of linears of `block` that share an input: X [tokens, in], and X0, the inputs of
    the same tokens in `original`; None where they cannot be matched. hidden and reference [samples, seq_len, hidden]
    are replaced by the outputs of the two blocks. No weight may be replaced meanwhile.
    """
    shared = shared_inputs(block, hidden[:1].to(device), arguments, linears)
    now = _Block(block, linears, arguments, device)
    before = now.in_the_place_of(original)
    for parts in zip(torch.split(hidden, batch), torch.split(reference, batch), strict=True):
        pair = PairedBatch(now, before, shared, *parts, keep=True, inputs={})
        try:
            for names in shared:
                yield names, pair.advance(names), pair.original_input(names)
                pair.let_go(names)
            pair.finish()
        finally:
            pair.drop()


def shared_inputs(
    block: nn.Module, hidden: Tensor, arguments: Arguments, linears: Mapping[str, nn.Module]
) -> list[Group]:
    """The linears in the order `block` reaches them, those that receive one tensor together: observed on `hidden`."""
    seen: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that none is freed and its memory reused

    def note(name: str, x: Tensor) -> None:
        for other, names in seen:
            if x is other or (x.numel() and x.data_ptr() == other.data_ptr() and x.shape == other.shape):
                names.append(name)
                return
        seen.append((x, [name]))

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    args, kwargs = arguments
    try:
        with torch.no_grad():
            block(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen]


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]; Conv1D keeps it the other way."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


class _Moments:
    """Second moments of X, of D = X0 - X, and of the two together, summed as rows pass."""

    def __init__(self, *, diagonal: bool) -> None:
        self._diagonal = diagonal
        self._moment: Tensor | None = None
        self._squares: Tensor | None = None  # D^T D [in, in], its upper triangle
        self.drift: Tensor | None = None
        self.tokens, self.unmatched = 0, False

    def add(self, seen: Tensor, rows: Tensor, original: Tensor | None) -> None:
        """Some rows of X [tokens, in] in the model's dtype, the same in float32, and those of X0."""
        if self._diagonal:
            squares = rows.square().sum(0)
            self._moment = squares if self._moment is None else self._moment.add_(squares)
            return
        if self._moment is None:
            self._moment = rows.new_zeros(rows.shape[1], rows.shape[1])
        with exact_products(seen.dtype):
            add_second_moment(self._moment, rows)
        if original is None:
            return
        if self.drift is None or self._squares is None:
            self.drift, self._squares = torch.zeros_like(self._moment), torch.zeros_like(self._moment)
        # Small as the difference is, the 8 bits that bfloat16 has of it are plenty, at twice the speed.
        factor = seen if seen.dtype == torch.bfloat16 else rows
        difference = original - factor
        self.drift += difference.T @ factor
        with exact_products(difference.dtype):
            add_second_moment(self._squares, difference.to(torch.float32))

    def count(self, x: Tensor, *, unmatched: bool) -> None:
        """A whole batch [tokens, in] has been added."""
        self.tokens += x.shape[0]
        self.unmatched |= unmatched

    def moment(self) -> Tensor | None:
        """X^T X [in, in], or its diagonal [in]; None when no row has passed."""
        return self._moment if self._moment is None or self._diagonal else _whole(self._moment)

    def drift_moment(self) -> Tensor:
        """D^T D [in, in]."""
        assert self._squares is not None
        return _whole(self._squares)


def _whole(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle, in its memory."""
    return upper.triu_().add_(upper.triu(1).T)


@dataclass(frozen=True)
class _Place:
    """Where a linear stands that is part of an expert: path of the Experts inside the block, and the expert's index."""

    experts: str
    index: int
    expert: Expert
    last: bool  # whether it is the expert's last linear, its down projection


class _Block:
    """A block with the linears {name: module} to halt at and what it gets beside the hidden states."""

    def __init__(
        self, module: nn.Module, linears: Mapping[str, nn.Module], arguments: Arguments, device: torch.device
    ) -> None:
        self.module, self.linears, self.arguments, self.device = module, linears, arguments, device
        self.experts = {path: part for path, part in module.named_modules() if isinstance(part, Experts)}
        names = {linear: name for name, linear in linears.items()}
        self.places = {
            names[linear]: _Place(path, e, expert, linear is expert.last)
            for path, experts in self.experts.items()
            for e, expert in enumerate(experts)
            if isinstance(expert, Expert)
            for linear in expert.modules()
            if linear in names
        }

    def in_the_place_of(self, other: nn.Module) -> "_Block":
        """Another block of the same structure, with the linears that have the same places in it."""
        paths = {part: path for path, part in self.module.named_modules()}
        linears = {name: other.get_submodule(paths[linear]) for name, linear in self.linears.items()}
        return _Block(other, linears, self.arguments, self.device)


class PairedBatch:
    """One batch on its way through a block, and the same batch in the original block where that runs beside.

    The original's half waits where it holds the least. Before attention's output projection a batch also holds its
    queries, keys and values, and the last linear of the MLP has the widest input of all. The original waits for no
    rounding: it leaves the former at once for the next linear, and the latter for the end of the block. In a mixture of
    experts, once weights before the router are rounded, it sends an expert other tokens than the original's does. So
    the original's half keeps what enters all experts, and X0 is what its expert makes of the tokens that X has.
    """

    def __init__(
        self,
        block: _Block,
        original: _Block | None,
        shared: Sequence[Group],
        hidden: Tensor,
        reference: Tensor,
        *,
        keep: bool,
        inputs: Mapping[str, Inputs],
    ) -> None:
        self._run, self._keep, self._tokens = _Run(block, hidden, inputs), keep, hidden.shape[:2].numel()
        self._original = None if original is None else _Run(original, reference, {})
        self._places = {} if original is None else original.places
        self._stops = [names[0] for names in shared if names[0] not in self._places]
        self._routed = [names[0] for names in shared if names[0] in self._places]
        self._ahead: Tensor | None = None  # what the original waits to be asked for at its next stop
        self._rows = 0

    def advance(self, names: Group) -> Tensor:
        """Go on until the linears `names` are about to be applied; their input X [tokens, in]."""
        x = self._run.advance(names[0])
        self._rows = x.shape[0]
        return x

    def original_input(self, names: Group) -> Tensor | None:
        """X0 [tokens, in], once the batch is there; None where there is no original, or its tokens are other ones."""
        if self._original is None:
            return None
        place = self._places.get(names[0])
        if place is None:
            x0 = self._original.advance(names[0]) if self._ahead is None else self._ahead
            self._ahead = None
            return x0 if x0.shape[0] == self._rows == self._tokens else None
        if place.experts not in self._original.entered:
            self._go_on()
        _, routing = self._run.entered[place.experts]
        entering, _ = self._original.entered[place.experts]
        x0 = entering[Experts.tokens_of(place.index, routing)[0]]
        with torch.no_grad():
            return place.expert.inner(x0) if place.last else x0

    def let_go(self, names: Group) -> None:
        """What was sent to `names` is no longer needed."""
        if self._original is None:
            return
        if names[0] in self._routed:
            self._routed.remove(names[0])
            if not self._routed:
                self._run.entered.clear()
                self._original.entered.clear()
        else:
            self._stops.remove(names[0])
            if len(self._stops) != 1:
                self._go_on()

    def finish(self) -> None:
        """Run to the end of the block, whose output replaces the batch's hidden states."""
        self._run.finish()
        if self._original is not None:
            self._original.finish()

    def drop(self) -> None:
        """Give up where it stands."""
        self._run.drop()
        if self._original is not None:
            self._original.drop()

    def _go_on(self) -> None:
        """Take the original's half to its next stop; without one to the end, as far as that is needed."""
        assert self._original is not None
        if self._stops:
            self._ahead = self._original.advance(self._stops[0])
        elif self._keep or self._routed:
            self._original.finish()
        else:
            self._original.drop()


class _Run:
    """One batch on its way through a block; it waits before each of the block's linears until told to go on.

    hidden [samples, seq_len, hidden] is replaced at the end. inputs: how those of a linear are rounded, by its name;
    filled in by the time it goes on. entered: what the block's Experts got on the way, by path: tokens [tokens, hidden]
    and the experts chosen for each [tokens, chosen].
    """

    def __init__(self, block: _Block, hidden: Tensor, inputs: Mapping[str, Inputs]) -> None:
        self.entered: dict[str, tuple[Tensor, Tensor]] = {}

        def whole_pass() -> None:
            args, kwargs = block.arguments
            result = block.module(hidden.to(block.device), *args, **kwargs)
            hidden.copy_(result[0] if isinstance(result, tuple) else result)

        def halt(name: str, x: Tensor) -> Tensor:
            if getcurrent() is not self._thread:
                return x
            if last and last[0] is not x:
                last.clear()  # nothing is kept of it while this batch waits
            main.switch((name, x))
            if name not in inputs:
                return x
            if not last:
                last.extend((x, round_inputs(x, inputs[name])))
            return last[1]

        def enter(path: str, hidden: Tensor, chosen: Tensor) -> None:
            if getcurrent() is self._thread:
                self.entered[path] = hidden, chosen

        last: list[Tensor] = []  # an input and what it is rounded to, for the linears that share it

        main, self._thread = getcurrent(), greenlet(whole_pass)
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: halt(name, args[0]))
            for name, module in block.linears.items()
        ]
        self._handles += [
            experts.register_forward_pre_hook(lambda _, args, path=path: enter(path, *args[:2]))
            for path, experts in block.experts.items()
        ]

    def advance(self, name: str) -> Tensor:
        """Go on until linear `name` is about to be applied; returns its input [tokens, in]."""
        while True:
            with torch.no_grad():
                reached = self._thread.switch()
            if reached is None:
                raise RuntimeError(f"a batch has run through the block without reaching {name}")
            at, x = reached
            if at == name:
                return x.reshape(-1, x.shape[-1])  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Run to the end of the block."""
        while not self._thread.dead:
            with torch.no_grad():
                self._thread.switch()

    def drop(self) -> None:
        """Give up where it stands."""
        if not self._thread.dead:
            self._thread.throw(GreenletExit)
        for handle in self._handles:
            handle.remove()
        self.entered.clear()


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    """Add X^T X to the upper triangle of `total` [in, in] for X = rows [tokens, in]; what is below it is undefined."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for part in panels(rows.shape[1]):
        total[part, part.start :].addmm_(rows[:, part].T, rows[:, part.start :])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that came in `dtype` use the faster units that multiply those exactly.

    bfloat16 values are whole in AMX's bfloat16 and in TF32, float16 ones in TF32; sums stay float32.
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
