"""A block that runs as coroutines, one for each batch, which halt before its linears."""

from collections.abc import Callable, Mapping
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
        self._runs: dict[greenlet, Run] = {}
        self._handles: list[RemovableHandle] = []

    def begin(self, thread: greenlet, run: "Run") -> None:
        """From now on the hooks speak to `run` when its coroutine `thread` reaches them."""
        if not self._runs:
            self._handles = [
                module.register_forward_pre_hook(lambda _, args, name=name: self._reached(name, args))
                for name, module in self.linears.items()
            ]
            self._handles += [
                module.register_forward_hook(lambda _, args, out, name=name: self._left(name, out))
                for name, module in self.linears.items()
                if name not in self.places
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

    def _left(self, name: str, output: Tensor) -> None:
        run = self._runs.get(getcurrent())
        if run is not None and run.wanted == name:
            run.output = output

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

    def _inner(self, run: "Run", experts: SplitExperts, rows: Tensor, e: int) -> Tensor:
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


def shared_inputs(
    block: nn.Module, hidden: Tensor, arguments: BlockArguments, linears: Mapping[str, nn.Module]
) -> list[Group]:
    """The linears in the order `block` reaches them, those that receive the same tensor grouped.

    hidden [samples, seq_len, hidden]: of the first samples.
    """
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
    try:
        with torch.no_grad():
            arguments.call(block, hidden, slice(0, len(hidden)))
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen]


class Run:
    """One batch in one block, as a coroutine: it halts before each of the block's linears until told to continue.

    inputs: how the inputs of a linear are rounded, by its name, read when the run continues. entered, if `routed`: what
    the block's SplitExperts modules have received, by path: hidden states [tokens, hidden] and which experts are chosen
    for each token. output: what the linear that is `wanted` has given.
    """

    def __init__(self, block: RunnableBlock, states: States, inputs: Mapping[str, Inputs], *, routed: bool) -> None:
        self.entered: dict[str, tuple[Tensor, Routing]] = {}
        self._block, self._states, self._inputs, self._routed = block, states, inputs, routed
        self.wanted: str | None = None
        self.output: Tensor | None = None
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
