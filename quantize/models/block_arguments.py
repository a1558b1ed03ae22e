"""What a model passes its decoder blocks besides the hidden states, and what one block hands to later ones.

Positions and masks are the same for any text. Where a block is given anything else (embeddings of its own, alibi, the
tokens themselves), it comes from running the model's shell on just the sequences that go through the block. What
earlier blocks have left for a block (keys and values it shares, positions they chose) is carried along with the states.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..core.errors import BadInput

Given = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
Layout = tuple[int, int]  # the axes of samples and tokens in the states, as the model's class has them
Slot = tuple[str, str | int, int]  # argument that is a mapping, its key, part; of an output "", index, part

SAMPLES_FIRST: Layout = (0, 1)
_CARRIED = "carried"
_WHOLE = -1  # the part of a value that is one tensor, not several


class Handed:
    """Stands, among the arguments that were seen, for an output of the block before; 0 would be the hidden states."""

    def __init__(self, index: int) -> None:
        self.index = index


class PerSample:
    """Stands for a tensor [1, ...] that blocks are given once for each sample."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class BlockArguments:
    """What block `k` is given besides the hidden states, for any samples of one set of sequences."""

    def __init__(self, model: "ModelArguments", k: int, before: "BlockArguments | None") -> None:
        self._model, self._k, self._before = model, k, before
        self.left: dict[Slot, Tensor] = {}  # [samples, ...] on the CPU: what later blocks are given, after this one

    def example(self, dtype: torch.dtype) -> Tensor:
        """States [1, 1, ...] of ones, of the shape that the block takes."""
        return torch.ones(1, 1, *self._model.width, dtype=dtype, device=self._model.device)

    @property
    def of_original(self) -> "BlockArguments":
        """The same for the original's states, where the original runs beside the rounded model."""
        return self._model.original[self._k]

    def taken(self, samples: slice | Tensor) -> dict[Slot, Tensor]:
        """What earlier blocks have left for this one, of these samples, on the device."""
        left = {} if self._before is None else self._before.left
        return {slot: tensor[samples].to(self._model.device) for slot, tensor in left.items()}

    def of(
        self, samples: slice | Tensor, dtype: torch.dtype | None = None, taken: Mapping[Slot, Tensor] | None = None
    ) -> Given:
        """Positional and keyword arguments for these samples, floats among them in `dtype`.

        taken: in place of what earlier blocks have left.
        """
        args, kwargs = self._model.given(self._k, samples)
        left = self.taken(samples) if taken is None else taken

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        def carried(name: str) -> dict[str | int, Any]:
            values = _joined({slot: tensor for slot, tensor in left.items() if slot[0] == name})
            return values if dtype is None else tree_map_only(Tensor, cast, values)

        def filled(name: str, value: Any) -> Any:
            if isinstance(value, Handed):
                return carried("").get(value.index)
            if _is_empty(value):
                value = type(value)()
                value.update(carried(name))
                return value
            return value if dtype is None else tree_map_only(Tensor, cast, value)

        return tuple(filled(str(i), v) for i, v in enumerate(args)), {n: filled(n, v) for n, v in kwargs.items()}

    def call(
        self,
        run: Callable[..., Any],
        hidden: Tensor,
        samples: slice | Tensor,
        *,
        keep: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The states [samples, seq_len, ...] that leave the block, which `run` is or stands for.

        samples: whose states `hidden` are. keep: whether what the block leaves for later ones is taken from this call.
        dtype: as for `of`.
        """
        out, left = self._called(run, hidden, self.of(samples, dtype))
        if keep and self._model.hands_on:
            self._keep(left, samples)
        return out

    def gradients(
        self,
        run: Callable[..., Any],
        hidden: Tensor,
        samples: slice | Tensor,
        of_states: Tensor,
        of_left: Mapping[Slot, Tensor],
    ) -> tuple[Tensor, dict[Slot, Tensor]]:
        """The gradients for the states that enter the block, and for what earlier blocks have left, all of `samples`.

        of_states: for the states that leave the block; of_left: for what there is for later blocks after it.
        """
        taken = self.taken(samples)
        floats = {slot: tensor.requires_grad_() for slot, tensor in taken.items() if tensor.is_floating_point()}
        with torch.enable_grad():
            out, left = self._called(run, hidden.requires_grad_(), self.of(samples, taken=taken))
        used = [slot for slot, tensor in left.items() if slot in of_left and tensor.requires_grad]
        leaving = [(out, of_states), *((left[slot], of_left[slot]) for slot in used)]
        found = torch.autograd.grad(
            [tensor for tensor, _ in leaving], [hidden, *floats.values()], [g for _, g in leaving], allow_unused=True
        )
        passed = {slot: g for slot, g in of_left.items() if slot[0] and slot not in left}
        for slot, g in zip(floats, found[1:], strict=True):
            if g is not None:
                passed[slot] = passed[slot] + g if slot in passed else g
        return found[0], passed

    def _called(self, run: Callable[..., Any], hidden: Tensor, given: Given) -> tuple[Tensor, dict[Slot, Tensor]]:
        """The states [samples, seq_len, ...] that leave the block, and what it leaves for later ones."""
        args, kwargs = given
        entered = {name: dict(mapping) for name, mapping in _mappings(args, kwargs)}
        result = run(hidden.movedim((0, 1), self._model.layout), *args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        found: dict[tuple[str, str | int], Any] = {("", i): outputs[i] for i in self._model.outputs}
        for name, mapping in _mappings(args, kwargs) if self._model.hands_on else ():
            found |= {(name, key): v for key, v in mapping.items() if entered[name].get(key) is not v}
        left = {(*at, part): tensor for at, value in found.items() for part, tensor in _parts(value)}
        return outputs[0].movedim(self._model.layout, (0, 1)), left

    def _keep(self, found: Mapping[Slot, Tensor], samples: slice | Tensor) -> None:
        """Store what these samples left; what the block before left and this one did not change stays as it is."""
        if self._before is not None:
            for slot, tensor in self._before.left.items():
                if slot[0]:
                    self.left.setdefault(slot, tensor)
            if self._before._before is not None:
                self._before._before.left = {}  # no longer needed
        old = {} if self._before is None else self._before.left
        for slot, tensor in found.items():
            stored = self.left.get(slot)
            if stored is None or stored is old.get(slot):
                shape = (self._model.samples, *tensor.shape[1:])
                stored = self.left[slot] = torch.zeros(shape, dtype=tensor.dtype)
            stored[samples] = tensor.detach().to("cpu")


class ModelArguments(Sequence[BlockArguments]):
    """For each block what it is given besides the hidden states, for tokens [samples, seq_len].

    seen: what each block got for one sequence of this length, with a `Handed` for what is an output of the block before
    and an empty mapping where blocks leave something for later ones. rerun: the same for given tokens, where what was
    seen does not serve for all. width: of the states [samples, seq_len, *width].
    """

    def __init__(
        self,
        tokens: Tensor,
        device: torch.device,
        seen: Sequence[Given],
        rerun: Callable[[Tensor], list[Given]] | None,
        layout: Layout,
        width: tuple[int, ...],
    ) -> None:
        self.device, self.samples, self.layout, self.width = device, len(tokens), layout, width
        self._tokens, self._seen, self._rerun = tokens, seen, rerun
        passed = [value for args, kwargs in seen for value in (*args, *kwargs.values())]
        self.outputs = {value.index for value in passed if isinstance(value, Handed)}
        self.hands_on = bool(self.outputs) or any(map(_is_empty, passed))
        self._blocks, self.original = self._chain(), self._chain()

    def _chain(self) -> list[BlockArguments]:
        blocks: list[BlockArguments] = []
        for k in range(len(self._seen)):
            blocks.append(BlockArguments(self, k, blocks[-1] if blocks else None))
        return blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, k: int) -> BlockArguments: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[BlockArguments]: ...
    def __getitem__(self, k: int | slice) -> BlockArguments | Sequence[BlockArguments]:
        return self._blocks[k]

    def given(self, k: int, samples: slice | Tensor) -> Given:
        """The arguments of block `k` for these samples, without what is carried."""
        tokens = self._tokens[samples]
        if self._rerun is not None:
            return self._rerun(tokens)[k]

        def expanded(one: PerSample) -> Tensor:
            return one.tensor.expand(len(tokens), *one.tensor.shape[1:])

        given: Given = tree_map_only(PerSample, expanded, self._seen[k])
        return given

    def refuse_gradients(self, what: str, kind: str) -> None:
        """Raise BadInput where a gradient for the states that enter a block would have to pass through more than them.

        what: that needs it. kind: the model_type.
        """
        if self.hands_on:
            raise BadInput(f"{what} does not run on model_type {kind!r}: its blocks hand on more than hidden states")

    def carried(self, k: int) -> dict[str, Tensor]:
        """What block `k` left for later ones, in the rounded model and in the original; for `restore`."""
        return {
            f"{_CARRIED}/{stream}/{slot[0]}/{type(slot[1]).__name__}:{slot[1]}/{slot[2]}": tensor
            for stream, blocks in (("rounded", self._blocks), ("original", self.original))
            for slot, tensor in blocks[k].left.items()
        }

    def restore(self, k: int, tensors: Mapping[str, Tensor]) -> None:
        """Let block `k` have left what `carried` returned, and nothing else; other tensors are passed over."""
        self._blocks[k].left, self.original[k].left = {}, {}
        for name, tensor in tensors.items():
            if name.startswith(f"{_CARRIED}/"):
                _, stream, argument, key, part = name.split("/")
                kind, _, text = key.partition(":")
                blocks = self._blocks if stream == "rounded" else self.original
                blocks[k].left[argument, int(text) if kind == "int" else text, int(part)] = tensor


def serves(one: Given, other: Given) -> bool:
    """Whether what a block got for one sequence, `one`, is also right for the sequences that got `other`."""
    return len(one[0]) == len(other[0]) and _alike([*one[0], one[1]], [*other[0], other[1]])


def marked(one: Any, other: Any) -> Any:
    """`one`, which serves the sequences that got `other`, its tensors that are repeated for each of them as PerSample.

    Some classes check that a mask is as long as the batch.
    """
    if isinstance(one, Tensor):
        return one if one.shape == other.shape else PerSample(one)
    if type(one) in (tuple, list):
        return type(one)(map(marked, one, other))
    return {key: marked(one[key], other[key]) for key in one} if type(one) is dict else one


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        fits = one.shape[1:] == other.shape[1:] and one.shape[:1] in ((), (1,), other.shape[:1])
        return fits and one.dim() == other.dim() and torch.equal(one.expand_as(other), other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return not isinstance(one, int | float | str) or one == other


def _is_empty(value: Any) -> bool:
    """Whether an argument is a mapping for blocks to leave something in."""
    return isinstance(value, MutableMapping) and not value


def _mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str | int, Any]]]:
    named = [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]
    return ((name, value) for name, value in named if isinstance(value, MutableMapping))


def _parts(value: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors of a value that is one, several, or none, each with its place."""
    if isinstance(value, Tensor):
        yield _WHOLE, value
    elif isinstance(value, tuple | list):
        yield from enumerate(value)


def _joined(tensors: Mapping[Slot, Tensor]) -> dict[str | int, Any]:
    """The reverse of `_parts`, by key."""
    values: dict[str | int, Any] = {}
    for (_, key, part), tensor in sorted(tensors.items(), key=lambda item: item[0][2]):
        values[key] = tensor if part == _WHOLE else (*values.get(key, ()), tensor)
    return values
