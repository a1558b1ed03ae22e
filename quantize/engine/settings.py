"""What the caller of a run decides beside the recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.ranks import ALONE, Ranks


@dataclass(frozen=True)
class BlockDone:
    """Progress of a run: `block` of `blocks` decoder blocks are finished.

    loss: mean relative error of the linears of the last one, None where none was rounded; seconds: it took.
    """

    block: int
    blocks: int
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class Settings:
    """Where a run writes, what it may do, and whom it tells.

    out: the run folder. cache: downloads and converted models. overwrite: replace what `out` holds. ignore_limits:
    start although memory or disk look too small. share: a folder in which runs of other recipes on the same model find
    the calibration tokens and the importance matrix that this one computes, and the other way round; None: not shared.
    ranks: the processes that share the work. on_start(done, blocks): blocks are about to be quantized, of which `done`
    were finished before.
    """

    out: Path
    cache: Path
    overwrite: bool = False
    ignore_limits: bool = False
    trust_remote_code: bool = False
    on_block: Callable[[BlockDone], None] = lambda done: None
    on_note: Callable[[str], None] = lambda line: None
    share: Path | None = None
    ranks: Ranks = ALONE
    on_start: Callable[[int, int], None] = lambda done, blocks: None

    @property
    def work(self) -> Path:
        """The journal and everything else that a resumed run needs; gone when the run is finished."""
        return self.out / ".work"
