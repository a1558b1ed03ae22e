"""One batch of the calibration set passing through a block: a coroutine that halts before each linear."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.transfers import Transfers
from ..models.block_arguments import BlockArguments
from ..models.experts import Expert, Routing, SplitExperts
from ..numbers.activations import round_inputs
from ..numbers.grid import Inputs

Group = tuple[str, ...]  # names of linears that receive one tensor
# Where a batch halts: at a linear, by its name; or before all experts of a module, by its path, and if True before
# all their down projections.
Halt = str | tuple[str, bool]


@dataclass(frozen=True)
class _Place:
    """The place of a linear in a mixture of experts.

    experts: the path of the SplitExperts module inside the block.
    """

    experts: str
    index: int
    expert: Expert
    last: bool  # whether it is the expert's down projection


class RunnableBlock:
    """A block, the linears {name: module} to halt at, and the arguments it takes besides the hidden states.

    all_experts: what experts are about to receive is shown for all tokens, not for those routed to each; what the block
    computes is the same. grouped: no input is rounded, so that experts may be computed together. Its modules have one
    hook each, whatever the number of batches: it is for the run whose coroutine is at work.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        arguments: BlockArguments,
        transfers: Transfers,
        all_experts: bool = False,
        grouped: bool = False,
    ) -> None:
        self.module, self.linears, self.arguments, self.transfers = module, linears, arguments, transfers
        self.all_experts, self.grouped = all_experts, grouped
        self.experts = {path: part for path, part in module.named_modules() if isinstance(part, SplitExperts)}
        names = {linear: name for name, linear in linears.items()}
        self.places = {
            names[linear]: _Place(path, e, expert, linear is expert.last)
            for path, experts in self.experts.items()
            for e, expert in enumerate(experts)
            if isinstance(expert, Expert)
            for linear in expert.modules()
            if linear in names
        }
        self._runs: dict[greenlet, _Run] = {}
        self._handles: list[RemovableHandle] = []

    def begin(self, thread: greenlet, run: "_Run") -> None:
        """From now on the hooks speak to `run` when its coroutine `thread` reaches them."""
        if not self._runs:
            self._handles = [
                module.register_forward_pre_hook(lambda _, args, name=name: self._reached(name, args))
                for name, module in self.linears.items()
            ]
            for path, experts in self.experts.items():
                experts.reached = partial(self._at_experts, path)
        self._runs[thread] = run

    def end(self, thread: greenlet) -> None:
        """The run of `thread` is over; after the last one no hook is left."""
        if self._runs.pop(thread, None) is not None and not self._runs:
            for handle in self._handles:
                handle.remove()
            for experts in self.experts.values():
                experts.reached = None

    def halt_before(self, name: str) -> Halt:
        """Where a batch halts so that the inputs of linear `name` are known."""
        place = self.places.get(name)
        return name if place is None else (place.experts, place.last)

    def _reached(self, name: str, args: tuple[Tensor, ...]) -> Tensor | None:
        run = self._runs.get(getcurrent())
        if run is None:
            return None
        if name not in self.places:
            run.halt(name, args[0])
        return run.received(name, args[0])

    def _at_experts(
        self, path: str, last: bool, rows: Tensor, routing: Routing, inputs: Callable[[int], Tensor]
    ) -> bool:
        run = self._runs.get(getcurrent())
        if run is not None:
            run.enter(path, last, rows, routing)
            if self.all_experts:
                inputs = partial(self._inner, run, self.experts[path], rows) if last else lambda _: rows
            run.halt((path, last), inputs)
        return run is not None and self.grouped

    def _inner(self, run: "_Run", experts: SplitExperts, rows: Tensor, e: int) -> Tensor:
        """What the down projection of expert `e` receives for all tokens, as if `run` sent them there."""
        here, expert = getcurrent(), experts[e]
        assert isinstance(expert, Expert)
        self._runs[here] = run
        try:
            with torch.no_grad():
                return expert.inner(rows)
        finally:
            del self._runs[here]

    def with_module(self, other: nn.Module) -> "RunnableBlock":
        """The same for the original's block, which has this structure."""
        paths = {part: path for path, part in self.module.named_modules()}
        linears = {name: other.get_submodule(paths[linear]) for name, linear in self.linears.items()}
        return RunnableBlock(other, linears, self.arguments.of_original, self.transfers, self.all_experts, self.grouped)


@dataclass(frozen=True)
class States:
    """The hidden states [samples, seq_len, hidden] of one batch, and where those that leave the block are put: the same
    memory, or other; None where they are not wanted. samples: which of all the samples these are.
    """

    entering: Tensor
    leaving: Tensor | None
    samples: slice


class PairedBatch:
    """One batch in the block that is being rounded and, where `original` is given, in the original block beside it.

    The run through the original pauses where it holds least memory. At attention's output projection a batch also holds
    its queries, keys and values, and the MLP's last linear has the widest input. The original has no rounding to wait
    for: it leaves the former as soon as it has been read, and goes on to the latter only when that is asked for.

    Once weights before a router are rounded, it sends an expert other tokens than the original's router does, so that
    rows of an expert's inputs do not correspond. The original's run therefore keeps what enters its experts, for all
    tokens, and its expert computes X0 from that for the tokens that are routed to the rounded one.
    """

    def __init__(
        self,
        block: RunnableBlock,
        original: RunnableBlock | None,
        shared: Sequence[Group],
        hidden: States,
        reference: States,
        *,
        keep: bool,
        inputs: Mapping[str, Inputs],
    ) -> None:
        self._keep, self._tokens = keep, hidden.entering.shape[:2].numel()
        self._places = {} if original is None else original.places
        self._routed = [names[0] for names in shared if names[0] in self._places]
        self._stops = [names[0] for names in shared if names[0] not in self._places]
        routed = bool(self._routed)
        self._run = _Run(block, hidden, inputs, routed=routed)
        self._original = None if original is None else _Run(original, reference, {}, routed=routed)
        self._ahead: Tensor | None = None  # the original's input of the next of `stops`, once it has got there
        self._rows = 0
        self._block, self._before = block, original
        self._inner: Tensor | None = None  # of the original's experts, for the tokens routed to the rounded ones
        self._at: Halt = ""
        self._arrived: Tensor | Callable[[int], Tensor] | None = None  # at this halt

    def fetch(self) -> None:
        """Start to bring the states to the device, so that they are there when the batch is advanced."""
        self._run.fetch()
        if self._original is not None:
            self._original.fetch()

    def advance(self, names: Group) -> Tensor:
        """Continue until the linears `names` are about to be applied; returns their input X [tokens, in].

        As often as it is asked for, until they are let go.
        """
        halt = self._block.halt_before(names[0])
        if self._at != halt:
            self._arrived = None
            self._arrived, self._at = self._run.advance(halt), halt
        arrived = self._arrived
        assert arrived is not None
        x = arrived if isinstance(arrived, Tensor) else arrived(self._block.places[names[0]].index)
        x = x.reshape(-1, x.shape[-1])
        self._rows = x.shape[0]
        return x

    def original_input(self, names: Group) -> Tensor | None:
        """The same tokens' inputs X0 [tokens, in] in the original, once the batch has been advanced to `names`.

        None without an original, and where only some tokens reach the linears by a routing that is not known here.
        """
        if self._original is None:
            return None
        place = self._places.get(names[0])
        if place is None:
            x0 = self._next() if self._ahead is None else self._ahead
            self._ahead = None
            return x0 if x0.shape[0] == self._rows == self._tokens else None
        if place.experts not in self._original.entered:
            self._go_on()
        _, routing = self._run.entered[place.experts]
        entering, _ = self._original.entered[place.experts]
        assert self._before is not None
        experts = self._before.experts[place.experts]
        if place.last and self._before.grouped and not self._block.all_experts and experts.can_group(entering):
            if self._inner is None:
                with torch.no_grad():
                    self._inner = experts.inner(entering, routing)
            return self._inner[routing.of(place.index)]
        x0 = entering if self._block.all_experts else entering[routing.tokens(place.index)]
        with torch.no_grad():
            return place.expert.inner(x0) if place.last else x0

    def let_go(self, names: Group) -> None:
        """The inputs of `names` are no longer needed."""
        if isinstance(self._arrived, Tensor):
            self._arrived = None  # freed when the batch goes on
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

    def rest(self) -> None:
        """All groups of a halt have been read."""
        self._inner = None

    def finish(self) -> None:
        """Run both blocks to their end and store what leaves them."""
        self._run.finish()
        if self._original is not None:
            self._original.finish()

    def drop(self) -> None:
        """Abandon the batch."""
        self._run.drop()
        if self._original is not None:
            self._original.drop()

    def _next(self) -> Tensor:
        """Continue in the original to the next of `stops`; returns what arrives there [tokens, in]."""
        assert self._original is not None
        x = self._original.advance(self._stops[0])
        assert isinstance(x, Tensor)
        return x.reshape(-1, x.shape[-1])

    def _go_on(self) -> None:
        """Continue in the original to the next stop; after the last, to the end where its output or experts matter."""
        assert self._original is not None
        if self._stops:
            self._ahead = self._next()
        elif self._keep or self._routed:
            self._original.finish()
        else:
            self._original.drop()


class RestartingBatch:
    """As a PairedBatch, holding nothing between two inputs: the block's beginning is run again for each of them.

    make: gives the PairedBatch that halts before the groups it is given; keep: whether it stores what leaves the block.
    """

    def __init__(self, make: Callable[[Sequence[Group], bool], PairedBatch], shared: Sequence[Group]) -> None:
        self._make, self._left = make, list(shared)
        self._now: PairedBatch | None = None

    def fetch(self) -> None:
        self._begun().fetch()

    def advance(self, names: Group) -> Tensor:
        return self._begun().advance(names)

    def original_input(self, names: Group) -> Tensor | None:
        return self._begun().original_input(names)

    def let_go(self, names: Group) -> None:
        self._left.remove(names)

    def rest(self) -> None:
        self.drop()

    def finish(self) -> None:
        self.drop()
        self._now = self._make((), True)
        self._now.fetch()
        self._now.finish()
        self.drop()

    def drop(self) -> None:
        if self._now is not None:
            self._now.drop()
        self._now = None

    def _begun(self) -> PairedBatch:
        if self._now is None:
            self._now = self._make(self._left, False)
        return self._now


class _Run:
    """One batch in one block, as a coroutine: it halts before each of the block's linears until told to continue.

    inputs: how the inputs of a linear are rounded, by its name, read when the run continues. entered, if `routed`: what
    the block's SplitExperts modules have received, by path: hidden states [tokens, hidden] and which experts are chosen
    for each token.
    """

    def __init__(self, block: RunnableBlock, states: States, inputs: Mapping[str, Inputs], *, routed: bool) -> None:
        self.entered: dict[str, tuple[Tensor, Routing]] = {}
        self._block, self._states, self._inputs, self._routed = block, states, inputs, routed
        self._arriving: Callable[[], dict[str, Tensor]] | None = None
        self._last: list[Tensor] = []  # an input and what it is rounded to, for the linears that share it

        def whole_pass() -> None:
            keep = states.leaving is not None
            result = block.arguments.call(block.module, self._entering(), states.samples, keep=keep)
            if states.leaving is not None:
                block.transfers.store(result, states.leaving)

        self._main, self._thread = getcurrent(), greenlet(whole_pass)
        block.begin(self._thread, self)

    def fetch(self) -> None:
        """Start to bring the states to the device, unless they are there or have been used."""
        started = bool(self._thread) or self._thread.dead
        if self._arriving is None and not started and not self._block.transfers.has(self._states.entering):
            self._arriving = self._block.transfers.fetch({"": self._states.entering})

    def _entering(self) -> Tensor:
        """The states on the device."""
        if self._arriving is None:
            return self._states.entering.to(self._block.transfers.device)
        arrived, self._arriving = self._arriving()[""], None
        return arrived

    def halt(self, at: Halt, arrived: Tensor | Callable[[int], Tensor]) -> None:
        """Wait before what is about to receive `arrived`, a tensor, or one for each expert by its number."""
        if self._last and self._last[0] is not arrived:
            self._last.clear()  # so that it is freed while this batch waits
        self._main.switch((at, arrived))

    def received(self, name: str, x: Tensor) -> Tensor:
        """What linear `name` is to compute with for its input x."""
        if name not in self._inputs:
            return x
        if not self._last or self._last[0] is not x:
            self._last[:] = x, round_inputs(x, self._inputs[name])
        return self._last[1]

    def enter(self, path: str, last: bool, rows: Tensor, routing: Routing) -> None:
        """Note what the experts at `path` receive."""
        if self._routed and not last:
            self.entered[path] = rows, routing

    def advance(self, to: Halt) -> Tensor | Callable[[int], Tensor]:
        """Continue until `to`; returns what has arrived there."""
        while True:
            with torch.no_grad():
                reached = self._thread.switch()
            if reached is None:
                raise RuntimeError(f"a batch has run through the block without reaching {to}")
            at, arrived = reached
            if at == to:
                return arrived  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Run to the end of the block."""
        while not self._thread.dead:
            with torch.no_grad():
                self._thread.switch()

    def drop(self) -> None:
        """Abandon the run."""
        if not self._thread.dead:
            self._thread.throw(GreenletExit)
        self._block.end(self._thread)
        self.entered.clear()
