"""One pass of a decoder block over the calibration set, halted before each linear that is still to be rounded.

Every batch is a coroutine. All of them run up to the first linear and wait; the second moment of its inputs is then
complete, the caller rounds it, and they go on with the rounded weight. So a block runs once, not once to calibrate and
once to propagate, and each linear is rounded for the inputs it will really get, with the errors of those before it.

Where the original model runs beside the rounded one, each batch has a second coroutine, in the original block: a
linear's inputs are compared with those it receives there, token by token.
"""

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.layer_error import output_power
from ..models.block_arguments import BlockArguments
from ..numbers.activations import measured, round_inputs
from ..numbers.grid import Inputs
from ..numbers.types import Activations
from .batches import Group, PairedBatch, RunnableBlock
from .moments import Moments

_ROWS = (
    1024  # tokens in one product of a moment; their float32 copies are the largest tensors besides the waiting batches
)

BATCH_TOKENS = 4096  # tokens in one forward pass of a block


@dataclass(frozen=True)
class SharedInput:
    """Linears that receive the same tensor X [tokens, in], about to be applied, and what is known of X.

    moment: X^T X [in, in] float32, the Hessian without its factor 2; its diagonal [in] where only that was asked for or
    an importance matrix gives it; None where nothing is known. tokens: rows of X. drift: D^T X [in, in], D = X0 - X, X0
    the same tokens' inputs in the original model; None where the original does not run beside. drift_power: ||D W^T||^2
    for each row of the weight W, [out] by linear; empty without a drift. unmatched: the original runs beside, but which
    of its inputs belong to the same tokens is not known. inputs: how X is rounded as the artifact runs, None where it
    is not; X in the moments is X so rounded.
    """

    names: Group
    moment: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    drift_power: Mapping[str, Tensor] = field(default_factory=dict)
    unmatched: bool = False
    inputs: Inputs | None = None


class BlockPass:
    """Iterate over the shared inputs of `block`; the caller replaces the weights of their linears before the next one.

    hidden [samples, seq_len, hidden]: replaced by the block's output, `batch` samples at a time; if `keep` is false it
    is left alone, and the block is not run beyond its last linear. linears {name: module}: where to halt. reference:
    the original model's hidden states, replaced by the output of the block with the weights it has at the start.
    activations: how the linears' inputs are rounded, and how many columns share a dynamic scale. diagonal: sum up only
    the moments' diagonal [in]. watch: called with a group's first name and rows of X [tokens, in] float32, until all
    of X has passed. begin: called once, before the first batch but after the block has run on one sample, which shows
    the order of its linears.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        arguments: BlockArguments,
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
        self._original: RunnableBlock | None = None

    def __iter__(self) -> Generator[SharedInput, None, None]:
        shared = shared_inputs(self._block, self._hidden[:1].to(self._device), self._arguments, self._linears)
        now = RunnableBlock(self._block, self._linears, self._arguments, self._device)
        if self._reference is not None:
            # Shares the parameters, which the caller replaces in the block and never writes to.
            original = copy.deepcopy(self._block, {id(p): p for p in self._block.parameters()})
            self._original = now.with_module(original)
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

    def _shared_input(self, names: Group, batches: Sequence[PairedBatch]) -> SharedInput:
        """Advance every batch to the linears `names` and sum up what they are about to receive."""
        waiting: Iterable[Tensor] = (batch.advance(names) for batch in batches)
        if self._activations is not None and self._activations[0].calibrated:
            waiting = list(waiting)
        inputs = self._measured(waiting)
        if inputs is not None:
            self._inputs |= dict.fromkeys(names, inputs)
        sums = Moments(diagonal=self._diagonal)
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

    def _drift(self, names: Group, sums: Moments) -> tuple[Tensor | None, dict[str, Tensor]]:
        """`drift` and `drift_power` of the shared input."""
        if self._original is None or sums.drift is None or sums.unmatched:
            return None, {}
        squares = sums.drift_moment()
        weights = {name: _matrix(self._original.linears[name]).to(torch.float32) for name in names}
        return sums.drift, {name: output_power(weight, squares) for name, weight in weights.items()}

    def _measured(self, waiting: Iterable[Tensor]) -> Inputs | None:
        """How a linear's inputs, `waiting` [tokens, in] by batch, will be rounded; read only for a static range."""
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
    arguments: BlockArguments,
    *,
    device: torch.device,
    batch: int,
) -> Iterator[tuple[Group, Tensor, Tensor | None]]:
    """Run a block and its original side by side, `batch` samples at a time, and yield (names, X, X0).

    Once for each batch and each group of linears of `block` that share an input: X [tokens, in] and X0, the same
    tokens' inputs in `original`, None where they cannot be matched. hidden and reference [samples, seq_len, hidden] are
    replaced by the outputs of the two blocks. Weights must not be replaced meanwhile.
    """
    shared = shared_inputs(block, hidden[:1].to(device), arguments, linears)
    now = RunnableBlock(block, linears, arguments, device)
    before = now.with_module(original)
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
    block: nn.Module, hidden: Tensor, arguments: BlockArguments, linears: Mapping[str, nn.Module]
) -> list[Group]:
    """The linears in the order `block` reaches them on `hidden`, those that receive the same tensor grouped."""
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


def _matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]; Conv1D stores its transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight
