"""How a run uses a device's memory: where the hidden states lie, how many tokens pass at once, what waits meanwhile."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..calibrate.block_pass import BATCH_TOKENS
from ..core import machine
from ..core.ranks import ALONE, Ranks

_GPU_BATCHES = (32768, 16384, 8192, 4096)  # tokens at once, the most first: a GPU is slowed down by many small products
_SHARE = 0.9  # of a GPU's memory that a run may plan with: the rest is fragments and what libraries take


@dataclass(frozen=True)
class Room:
    """batch_tokens: in one forward pass. on_device: hidden states stay there. spare: what leaves a block does not
    overwrite what entered it, so that the block can be done again. restarts: batches do not wait before each linear;
    the block's beginning is run again for each. on_disk: hidden states lie in files mapped into the host's memory. The
    last four do not change a bit of the result.
    """

    batch_tokens: int = BATCH_TOKENS
    on_device: bool = True
    spare: bool = False
    restarts: bool = False
    on_disk: bool = False

    def note(self, device: torch.device) -> str | None:
        """What a user should know of it; None where nothing is given up."""
        if self.on_disk:
            again = ", and the beginning of each block is run again for each of its linears" if self.restarts else ""
            return f"hidden states do not fit in memory: they are kept in files below the run's folder{again}"
        if self.restarts:
            return (
                "what all tokens hold while they wait before a linear does not fit in memory: the beginning of each "
                "block is run again for each of its linears, with the same result, in up to three times the time"
            )
        if not self.on_device:
            return f"hidden states do not fit on {device}: they are kept in the host's memory"
        return None


IN_HOST_MEMORY = Room()  # of a run on the CPU


@dataclass(frozen=True)
class Needs:
    """Bytes of a model's largest block and of the calibration's tokens.

    weights: the block. hidden: the states of one model, of which there are `streams`. kept: copies of both models'
    states for tuning. waiting: of all tokens before a linear. token: what one token in passing takes. solve: to round
    linears that share an input. sums: what is summed up over the tokens that pass. shell: everything outside the
    blocks. process: without tensors. tuning: to tune a block. open_shell: what of the shell stays while blocks run, to
    compute what they are given. carried: what blocks leave for later ones, in the host's memory. check: to compare a
    small model with transformers', before all else, in the host's memory. data_free: of a block and the one before, all
    told, where one process rounds on the CPU without calibration; else 0.
    """

    weights: int
    hidden: int
    streams: int
    kept: int
    waiting: int
    token: int
    solve: int
    shell: int
    tokens: int
    process: int
    tuning: int = 0
    open_shell: int = 0
    carried: int = 0
    check: int = 0
    sums: int = 0
    data_free: int = 0

    def of_one(self, ranks: Ranks) -> "Needs":
        """Of one of several processes, which have about equally many tokens."""
        if ranks.size == 1:
            return self
        hidden, kept, waiting, tokens, carried = (
            -(-n // ranks.size) for n in (self.hidden, self.kept, self.waiting, self.tokens, self.carried)
        )
        return replace(self, hidden=hidden, kept=kept, waiting=waiting, tokens=tokens, carried=carried, data_free=0)

    def work(self, room: Room) -> int:
        """Either a batch runs through the block or linears of one input are solved; meanwhile all batches wait."""
        passing = self.token * min(self.tokens, room.batch_tokens)
        share = min(1.0, room.batch_tokens / self.tokens) if room.restarts and self.tokens else 1.0
        return max(max(self.solve, self.sums + passing) + int(self.waiting * share), self.tuning)

    def on_device(self, room: Room) -> int:
        """Bytes on a device that is not the CPU."""
        states = (self.hidden * self.streams * (2 if room.spare else 1) + self.kept) if room.on_device else 0
        # The block as it was, with its rounded weights and packed; the next one, which is fetched meanwhile.
        block = 4 * self.weights + self.work(room) + states + self.open_shell
        return max(self.shell + (states or self.hidden // 8), block)

    def on_cpu(self, room: Room) -> int:
        """Bytes of a run on the CPU: the block, the next one being read, and what is packed; or embeddings and head."""
        needed = self.data_free or 3 * self.weights + self.work(room) + self.kept + self.open_shell
        states = 0 if room.on_disk else self.hidden * self.streams
        return self.process + max(self.check, self.shell, needed) + states + self.carried

    def on_host(self, room: Room) -> int:
        """Bytes in the memory of a host whose device is not the CPU; pinned copies of blocks are among them."""
        states = self.hidden * self.streams * (0 if room.on_disk else 2 if room.spare else 1) + self.kept
        states = 0 if room.on_device else states
        return self.process + max(self.check, self.shell, 5 * self.weights) + states + self.carried

    def on_disk(self, room: Room) -> int:
        """Bytes of files that hold hidden states while blocks run."""
        return self.hidden * self.streams if room.on_disk else 0


def rooms(device: torch.device) -> Iterator[Room]:
    """The ways to use the memory of a device, the fastest first."""
    if device.type == "cpu":
        yield from (Room(), Room(on_device=False, on_disk=True), Room(restarts=True))
        yield Room(on_device=False, restarts=True, on_disk=True)
        return
    batches = _GPU_BATCHES if device.type == "cuda" else (BATCH_TOKENS,)
    for on_device, spare, restarts in (
        (True, True, False), (True, False, False), (False, False, False), (True, False, True), (False, False, True),
    ):  # fmt: skip
        yield from (Room(batch, on_device, spare, restarts) for batch in batches)


def choose(needs: Needs, device: torch.device, ranks: Ranks = ALONE) -> Room:
    """The fastest way that fits in the memory that is free; the last where none does, which `Plan.check` refuses.

    Several processes take as many tokens at once as one would, so that they make the same bytes.
    """
    ways, free = list(rooms(device)), machine.available_memory_bytes() // ranks.here
    if ranks.size > 1:
        tokens = choose(needs, device).batch_tokens
        ways, needs = [way for way in ways if way.batch_tokens == tokens], needs.of_one(ranks)
    if device.type == "cpu":
        return next((way for way in ways if needs.on_cpu(way) <= free), ways[0])
    memory = machine.device_memory(device)
    if memory is None:
        return ways[0]
    way = next((way for way in ways if needs.on_device(way) <= _usable(*memory)), ways[-1])
    return way if way.on_device or needs.on_host(way) <= free else replace(way, on_disk=True)


def _usable(free: int, total: int) -> int:
    """The same for a card that nobody else uses, whatever is free to the byte: batches decide about the last bits."""
    return min(free, int(_SHARE * total))
