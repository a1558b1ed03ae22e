"""One pass of a decoder block over the calibration set, halted before each linear that is still to be rounded.

Every batch is a coroutine. All of them run up to the first linear and wait; the second moment of its inputs is then
complete, the caller rounds it, and they go on with the rounded weight. So a block runs once, not once to calibrate and
once to propagate, and each linear is rounded for the inputs it will really get, with the errors of those before it.

Where the original model runs beside the rounded one, each batch has a second coroutine, in the original block: a
linear's inputs are compared with those it receives there, token by token.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice, product, zip_longest

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput
from ..core.transfers import Transfers
from ..models.block_arguments import BlockArguments
from ..models.fused import fused
from ..numbers.activations import measured, round_inputs, static_int8
from ..numbers.grid import Inputs
from ..numbers.types import Activations
from .batches import PairedBatch, RestartingBatch
from .lanes import Lanes
from .moments import Moments, drift_powers, end_lanes, sums_by_outputs
from .runnable_block import Group, Halt, RunnableBlock, States, shared_inputs

_TOO_MUCH = 0.3  # of a token's norm: a static range that loses more does not fit (docs/measured.md)
_SAMPLED = 64  # rows of a batch on which a static range is chosen
# Tokens in one product of a moment on a CPU; their float32 copies are the largest tensors besides the waiting batches.
_ROWS = 1024

# Of moments, drifts and squares of experts that are summed up together; on a CPU it is one expert after the other.
MOMENT_BYTES = 1 << 32

BATCH_TOKENS = 4096  # tokens in one forward pass of a block


@dataclass(frozen=True)
class SharedInput:
    """Linears that receive the same tensor X [tokens, in], about to be applied, and what is known of X.

    moment: X^T X [in, in] float32, the Hessian without its factor 2; its diagonal [in] where only that was asked for or
    an importance matrix gives it; None where nothing is known. tokens: rows of X. drift: D^T X [in, in], D = X0 - X, X0
    the same tokens' inputs in the original model; None where the original does not run beside. moved: in its place,
    where that is less work, W D^T X [out, in] by linear, W its weight. drift_power: ||D W^T||^2 for each row of W,
    [out] by linear, on a GPU found from some tokens where all are much work (`picked_rows`); empty without a drift.
    unmatched: the original runs beside, but which of its inputs belong to the same tokens is not known. inputs: how X
    is rounded as the artifact runs, None where it is not; X in the moments is X so rounded. lost: where no static int8
    range fits, how much the best one loses of the token that fits it worst, as a share of that token's norm; else 0.
    Such inputs get dynamic scales, but for those of experts, of which servers make one layer.
    """

    names: Group
    moment: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    drift_power: Mapping[str, Tensor] = field(default_factory=dict)
    unmatched: bool = False
    inputs: Inputs | None = None
    lost: float = 0.0
    moved: Mapping[str, Tensor] = field(default_factory=dict)


class BlockPass:
    """Iterate over the shared inputs of `block`; the caller replaces the weights of their linears before the next one.

    hidden [samples, seq_len, hidden]: what enters the block, of this process's samples. lanes: how all are divided.
    leaving: where what leaves it is put, `hidden` itself if not given; if `keep` is false nothing is, and the block is
    not run beyond its last linear. linears {name: module}: where to halt. reference, reference_leaving: the same for
    the original model, which is the block with the weights it has at the start. All of them on `device` or on the host.
    activations {name: how a linear's inputs are rounded, and how many columns share a dynamic scale}. diagonal: sum up
    only the moments' diagonal [in]. watch: called with a group's first name, rows of X [tokens, in] float32 and their
    lane, until all of X has passed. begin: called once, before the pass that computes what leaves the block, but after
    the block has run on one sample, which shows the order of its linears. restarts: batches do not wait before each
    linear but are run again from the block's beginning, which takes less memory, more time, and gives the same.
    all_experts: experts are summed up over all tokens, not over those that are routed to each. moved: whether that may
    take the drift's place.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        arguments: BlockArguments,
        linears: Mapping[str, nn.Module],
        *,
        device: torch.device,
        lanes: Lanes,
        keep: bool = True,
        reference: Tensor | None = None,
        leaving: Tensor | None = None,
        reference_leaving: Tensor | None = None,
        activations: Mapping[str, tuple[Activations, int] | None] | None = None,
        diagonal: bool = False,
        watch: Callable[[str, Tensor, int], None] | None = None,
        begin: Callable[[], None] = lambda: None,
        restarts: bool = False,
        all_experts: bool = False,
        moved: bool = False,
    ) -> None:
        self._block, self._arguments, self._transfers = block, arguments, Transfers(device)
        self._linears, self._lanes, self._keep = dict(linears), lanes, keep
        everything = slice(0, len(hidden))
        self._hidden = States(hidden, hidden if leaving is None else leaving, everything)
        self._reference = None
        if reference is not None:
            into = reference if reference_leaving is None else reference_leaving
            self._reference = States(reference, into, everything)
        self._activations, self._diagonal, self._watch, self._begin = activations or {}, diagonal, watch, begin
        self._restarts, self._all_experts = restarts, all_experts
        self._moved = moved and not all_experts  # there the sums are all experts', the weights only the first one's
        self._inputs: dict[str, Inputs] = {}
        self._original: RunnableBlock | None = None

    def __iter__(self) -> Generator[SharedInput, None, None]:
        for inputs in self.together():
            yield from inputs

    def together(self) -> Generator[list[SharedInput], None, None]:
        """The shared inputs in lists: none of a list depends on how the linears of another of it are rounded."""
        with fused(self._block, self._transfers.device):
            yield from self._together()

    def _together(self) -> Generator[list[SharedInput], None, None]:
        first = self._hidden.entering[:1].to(self._transfers.device)
        shared = shared_inputs(self._block, first, self._arguments, self._linears)
        grouped = not any(self._activations.values())
        now = RunnableBlock(self._block, self._linears, self._arguments, self._transfers, self._all_experts, grouped)
        if self._reference is not None:
            # Shares the parameters, which the caller replaces in the block and never writes to.
            original = copy.deepcopy(self._block, {id(p): p for p in self._block.parameters()})
            self._original = now.with_module(original)
        hidden = _split(self._hidden, self._lanes.batch)
        reference = hidden if self._reference is None else _split(self._reference, self._lanes.batch)
        batches: list[PairedBatch | RestartingBatch] = []
        for parts in zip(hidden, reference, strict=True):
            make = partial(self._batch_of, now, *parts)
            batches.append(RestartingBatch(make, shared) if self._restarts else make(shared, True))
        if not self._restarts:
            self._begin()
        try:
            summed: dict[Halt, tuple[Moments, Inputs | None, float]] = {}  # where all experts receive the same
            for groups in self._lists(now, shared):
                halt = now.halt_before(groups[0][0])
                once = self._all_experts and self._watch is None  # who watches is told of each group's rows
                if not once or isinstance(halt, str) or halt[1]:
                    yield self._shared_inputs(groups, batches)
                    continue
                others = groups if halt in summed else groups[1:]
                if halt not in summed:
                    summed = {halt: self._summed(groups[:1], batches)[0]}
                for names, batch in product(others, batches):
                    batch.let_go(names)
                yield self._all_shared(groups, [summed[halt]] * len(groups))
            reached = {name for names in shared for name in names}
            yield from (self._shared_inputs([(name,)], ()) for name in self._linears if name not in reached)
            if self._keep:
                if self._restarts:
                    self._begin()
                for batch in batches:
                    batch.finish()
            self._transfers.settle()  # what leaves is read by others, or on other streams
        finally:
            for batch in batches:
                batch.drop()

    def _batch_of(
        self, now: RunnableBlock, hidden: States, reference: States, shared: Sequence[Group], keep: bool
    ) -> PairedBatch:
        if not keep:
            hidden, reference = replace(hidden, leaving=None), replace(reference, leaving=None)
        return PairedBatch(
            now, self._original, shared, hidden, reference, keep=self._keep and keep, inputs=self._inputs
        )

    def _lists(self, now: RunnableBlock, shared: Sequence[Group]) -> Iterator[list[Group]]:
        """The groups in order, those of experts that wait at one halt in lists, as many as memory allows for."""
        budget = self._memory_for_moments()
        for _, alike in groupby(shared, lambda names: now.halt_before(names[0])):
            groups, width = list(alike), 0
            for names in groups:
                width = max(width, _matrix(self._linears[names[0]]).shape[1])
            # `watch` is told of one group after the other.
            count = 1 if self._watch is not None else max(1, budget // (3 * 4 * width * width))
            yield from (groups[start : start + count] for start in range(0, len(groups), count))

    def _memory_for_moments(self) -> int:
        """Bytes that the sums of experts may take together."""
        alone = self._transfers.device.type == "cpu" and not self._restarts and self._lanes.ranks.size == 1
        return 0 if alone else MOMENT_BYTES

    def _shared_inputs(
        self, groups: Sequence[Group], batches: Sequence[PairedBatch | RestartingBatch]
    ) -> list[SharedInput]:
        """Advance every batch to the linears of `groups` and sum up what they are about to receive."""
        return self._all_shared(groups, self._summed(groups, batches))

    def _all_shared(
        self, groups: Sequence[Group], summed: Sequence[tuple[Moments, Inputs | None, float]]
    ) -> list[SharedInput]:
        powers = self._drift_powers(groups, [sums for sums, _, _ in summed])
        return [
            self._shared_input(names, *one, power) for names, one, power in zip(groups, summed, powers, strict=True)
        ]

    def _summed(
        self, groups: Sequence[Group], batches: Sequence[PairedBatch | RestartingBatch]
    ) -> list[tuple[Moments, Inputs | None, float]]:
        """The sums for each group, how its inputs are rounded, and what that loses."""
        inputs, lost = self._measured(groups, batches)
        for names, how in zip(groups, inputs, strict=True):
            if how is not None:
                self._inputs |= dict.fromkeys(names, how)
        sums = [self._moments(names) for names in groups]
        coming = _prefetched(batches)
        for lane in self._lanes.rounds() if batches else ():
            for moments in sums:
                moments.begin_lane(lane.batches)
            for batch in islice(coming, lane.batches):
                for names, how, moments in zip(groups, inputs, sums, strict=True):
                    x = batch.advance(names)
                    of_original = batch.original_output(names[0]) if moments.outputs else batch.original_input(names)
                    self._add(moments, names, x, of_original, how, lane.lane)
                    batch.let_go(names)
                batch.rest()
            end_lanes(sums, lane.holders)
        counts = self._lanes.ranks.gather([(moments.tokens, moments.unmatched) for moments in sums])
        for moments, counted in zip(sums, zip(*counts, strict=True), strict=True):
            moments.finish(sum(tokens for tokens, _ in counted), any(unmatched for _, unmatched in counted))
        return list(zip(sums, inputs, lost, strict=True))

    def _shared_input(
        self, names: Group, sums: Moments, inputs: Inputs | None, lost: float, power: dict[str, Tensor]
    ) -> SharedInput:
        if inputs is not None:
            self._inputs |= dict.fromkeys(names, inputs)
        drift, moved = (sums.drift, dict(zip(names, sums.moved, strict=False))) if power else (None, {})
        return SharedInput(names, sums.moment(), sums.tokens, drift, power, sums.unmatched, inputs, lost, moved)

    def _moments(self, names: Group) -> Moments:
        linear = self._linears[names[0]]
        weight, before, weights, outputs = _matrix(linear), self._original, list[Tensor](), False
        if before is not None and self._moved:
            weights = [_matrix(before.linears[name]) for name in names]
            alone = len(names) == 1 and names[0] not in before.places
            outputs = alone and before.linears[names[0]].bias is None and sums_by_outputs(weights[0])
        return Moments(
            weight, weight.shape[1], paired=before is not None, diagonal=self._diagonal, weights=weights,
            outputs=outputs, ranks=self._lanes.ranks,
        )  # fmt: skip

    def _add(
        self, sums: Moments, names: Group, x: Tensor, original: Tensor | None, inputs: Inputs | None, lane: int
    ) -> None:
        """Add x [tokens, in] of a batch of `lane`, and the same tokens' inputs in the original."""
        step = _ROWS if x.device.type == "cpu" else max(1, x.shape[0])  # a GPU is fast only with all rows at once
        for start in range(0, x.shape[0], step):
            part = x[start : start + step]
            seen = part if inputs is None else round_inputs(part, inputs)
            if self._watch is not None:
                self._watch(names[0], seen.to(torch.float32), lane)
            sums.add(seen, None if original is None else original[start : start + step])
        sums.count(x, unmatched=self._original is not None and original is None)

    def _drift_powers(self, groups: Sequence[Group], sums: Sequence[Moments]) -> list[dict[str, Tensor]]:
        """`drift_power` of the shared inputs."""
        powers: list[dict[str, Tensor]] = [{} for _ in groups]
        if self._original is not None:
            linears, on_gpu = self._original.linears, self._transfers.device.type == "cuda"
            known = [i for i, one in enumerate(sums) if one.compared and not one.unmatched]
            weights = [[_matrix(linears[name]) for name in groups[i]] for i in known]
            for i, rows in zip(known, drift_powers(weights, [sums[i] for i in known], together=on_gpu), strict=True):
                powers[i] = dict(zip(groups[i], rows, strict=True))
        return powers

    def _measured(
        self, groups: Sequence[Group], batches: Sequence[PairedBatch | RestartingBatch]
    ) -> tuple[list[Inputs | None], list[float]]:
        """How the inputs of each group will be rounded, and `lost` of each; for a static range every batch is looked at
        first."""
        lost, kinds = [0.0] * len(groups), [self._kind(names) for names in groups]
        if not any(kind is not None and kind[0].calibrated for kind in kinds):
            return [None if kind is None else measured(*kind, 0.0, 0.0) for kind in kinds], lost
        ranges: list[list[Tensor]] = [[] for _ in groups]
        samples: list[list[tuple[int, Tensor]]] = [[] for _ in groups]
        for at, batch in zip(self._lanes.own_batches(), _prefetched(batches), strict=False):
            for names, kind, found, some in zip(groups, kinds, ranges, samples, strict=True):
                x = batch.advance(names)
                found += [torch.stack(x.aminmax())] if x.numel() else []
                some += [(at, _some(x))] if x.numel() and kind is not None and kind[0].type == "int8" else []
            batch.rest()
        # In one go: a GPU waits for it.
        own = [torch.stack(found, 1).to(torch.float64).tolist() if found else None for found in ranges]
        inputs: list[Inputs | None] = []
        for i, ends in enumerate(zip(*self._lanes.ranks.gather(own), strict=True)):
            lows, highs = [x for end in ends if end for x in end[0]], [x for end in ends if end for x in end[1]]
            low, high = min(lows, default=0.0), max(highs, default=0.0)
            kind = kinds[i]
            if kind is None:
                inputs.append(None)
            elif tokens := self._from_all(samples[i]):
                best, loses = static_int8(kind[0], torch.cat(tokens), low, high)
                lost[i] = loses if loses > _TOO_MUCH else 0.0
                dynamic = lost[i] and ".experts." not in groups[i][0][0]
                inputs.append(measured(kind[0].at_run_time, kind[1], low, high) if dynamic else best)
            else:
                inputs.append(measured(*kind, low, high))
        return inputs, lost

    def _kind(self, names: Group) -> tuple[Activations, int] | None:
        """How the inputs of linears that share them are rounded; raises BadInput where they would differ."""
        found = {self._activations.get(name) for name in names}
        if len(found) > 1:
            raise BadInput(
                f"{' and '.join(names)} have the same inputs and would round them differently: give them weights of "
                "one type, or leave activations out"
            )
        return found.pop()

    def _from_all(self, samples: list[tuple[int, Tensor]]) -> list[Tensor]:
        """The samples of all processes, in the order of their batches."""
        if self._lanes.ranks.size == 1:
            return [x for _, x in samples]
        here = self._linears[next(iter(self._linears))].weight.device
        told = self._lanes.ranks.gather([(at, x.cpu()) for at, x in samples])
        return [x.to(here) for _, x in sorted((one for own in told for one in own), key=lambda one: one[0])]


def _some(x: Tensor) -> Tensor:
    """Some of the rows of x [tokens, in], the one with the largest value among them."""
    largest = x.abs().amax(-1).argmax()
    return torch.cat([x[:: max(1, len(x) // _SAMPLED)], x[largest][None]])


def _split(states: States, batch: int) -> list[States]:
    """`batch` samples each."""
    assert states.leaving is not None
    parts = zip(torch.split(states.entering, batch), torch.split(states.leaving, batch), strict=True)
    return [
        States(entering, leaving, slice(i * batch, i * batch + len(entering)))
        for i, (entering, leaving) in enumerate(parts)
    ]


def _prefetched(
    batches: Sequence[PairedBatch | RestartingBatch],
) -> Iterator[PairedBatch | RestartingBatch]:
    """The batches; the states of the next one are on their way to the device while one is at work."""
    for batch in batches[:1]:
        batch.fetch()
    for batch, following in zip_longest(batches, batches[1:]):
        if following is not None:
            following.fetch()
        yield batch


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
    transfers = Transfers(device)
    now = RunnableBlock(block, linears, arguments, transfers)
    before = now.with_module(original)
    all_states = (States(states, states, slice(0, len(states))) for states in (hidden, reference))
    for parts in zip(*(_split(states, batch) for states in all_states), strict=True):
        pair = PairedBatch(now, before, shared, *parts, keep=True, inputs={})
        try:
            for names in shared:
                yield names, pair.advance(names), pair.original_input(names)
                pair.let_go(names)
            pair.finish()
        finally:
            pair.drop()
    transfers.settle()


def _matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]; Conv1D stores its transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight
