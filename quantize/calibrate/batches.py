"""One batch of the calibration set passing through a block, and through the original block beside it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..numbers.grid import Inputs
from .runnable_block import Group, Halt, Run, RunnableBlock, States


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
        self._run = Run(block, hidden, inputs, routed=routed)
        self._original = None if original is None else Run(original, reference, {}, routed=routed)
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

    def original_output(self, name: str) -> Tensor | None:
        """The outputs [tokens, out] of the original's linear `name` for the same tokens, once the batch has got there.

        In the place of `original_input`, for a linear that shares its input with none: the original goes on. None where
        tokens do not correspond.
        """
        assert self._original is not None
        assert self._stops[0] == name
        x0, self._ahead = self._next() if self._ahead is None else self._ahead, None
        if not x0.shape[0] == self._rows == self._tokens:
            return None
        del x0
        self._original.wanted = name
        self._stops.pop(0)
        self._go_on(to_the_end=True)
        output, self._original.wanted, self._original.output = self._original.output, None, None
        assert output is not None
        return output.reshape(-1, output.shape[-1])

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
        elif names[0] in self._stops:
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

    def _go_on(self, to_the_end: bool = False) -> None:
        """Continue in the original to the next stop; after the last, to the end where its output or experts matter."""
        assert self._original is not None
        if self._stops:
            self._ahead = self._next()
        elif self._keep or self._routed or to_the_end:
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

    def original_output(self, name: str) -> Tensor | None:
        return self._begun().original_output(name)

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
