"""How a calibration set is divided: into batches, these into lanes, and the lanes among the processes of a run.

Sums over the set are made lane by lane and then added in the order of the lanes. So they have the same bits whatever
the number of processes, of which each sums up some of the lanes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.ranks import ALONE, Ranks

LANES = 8
_LEAST_TOKENS = 512  # of a batch: fewer at once are slow


@dataclass(frozen=True)
class Lanes:
    """The lanes of `samples` samples, `batch` of which pass through a block at once."""

    samples: int
    batch: int
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, samples: int, seq_len: int, batch_tokens: int, ranks: Ranks = ALONE) -> "Lanes":
        """At most `batch_tokens` in a batch, and a batch for each lane unless that would leave it too few tokens."""
        fair = max(-(-samples // LANES), -(-_LEAST_TOKENS // seq_len))
        return cls(samples, max(1, min(batch_tokens // seq_len, fair)), ranks)

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch)

    @property
    def count(self) -> int:
        """How many lanes there are: the most processes that can share the set."""
        return min(LANES, self.batches)

    def _lane(self, lane: int) -> range:
        """The batches of a lane."""
        return range(lane * self.batches // self.count, (lane + 1) * self.batches // self.count)

    def rounds(self) -> Iterator["Round"]:
        """The lanes, one of each process at a time."""
        for start in range(0, self.count, self.ranks.size):
            mine = start + self.ranks.rank
            batches = len(self._lane(mine)) if mine < self.count else 0
            yield Round(mine, batches, min(self.ranks.size, self.count - start))

    def own(self) -> Tensor:
        """The samples of this process, int64, in the order in which it has them."""
        batches = torch.split(torch.arange(self.samples), self.batch)
        return torch.cat([batches[i] for i in self.own_batches()])

    def own_batches(self) -> list[int]:
        """The batches of this process, in the order in which it has them."""
        return [i for lane in range(self.ranks.rank, self.count, self.ranks.size) for i in self._lane(lane)]


@dataclass(frozen=True)
class Round:
    """A lane of each process. lane: this one's. batches: in it. holders: how many processes have one."""

    lane: int
    batches: int
    holders: int
