"""One batch of the calibration set on its way through a block, halted before each linear, as a coroutine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..models.block_arguments import BlockArguments
from ..models.experts import Expert, SplitExperts
from ..numbers.activations import round_inputs
from ..numbers.grid import Inputs

Group = tuple[str, ...]  # names of linears that receive one tensor


@dataclass(frozen=True)
class _Place:
    """The expert that a linear is part of: the path of `SplitExperts` inside the block, and the expert's index."""

    experts: str
    index: int
    expert: Expert
    last: bool  # whether it is the expert's last linear, its down projection


class RunnableBlock:
    """A block with the linears {name: module} to halt at and what it gets beside the hidden states."""

    def __init__(
        self, module: nn.Module, linears: Mapping[str, nn.Module], arguments: BlockArguments, device: torch.device
    ) -> None:
        self.module, self.linears, self.arguments, self.device = module, linears, arguments, device
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

    def in_the_place_of(self, other: nn.Module) -> "RunnableBlock":
        """Another block of the same structure, with the linears that have the same places in it."""
        paths = {part: path for path, part in self.module.named_modules()}
        linears = {name: other.get_submodule(paths[linear]) for name, linear in self.linears.items()}
        return RunnableBlock(other, linears, self.arguments, self.device)


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
        block: RunnableBlock,
        original: RunnableBlock | None,
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
        x0 = entering[SplitExperts.tokens_of(place.index, routing)[0]]
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
    filled in by the time it goes on. entered: what the block's `SplitExperts` got on the way, by path: tokens
    [tokens, hidden] and the experts chosen for each [tokens, chosen].
    """

    def __init__(self, block: RunnableBlock, hidden: Tensor, inputs: Mapping[str, Inputs]) -> None:
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
