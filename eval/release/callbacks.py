"""What the caller of an operation decides, and how it follows the work. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantpress.core.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from quantpress.exports.serving.record import Check


def _default_cache() -> Path:
    from quantpress.engine.sources import default_cache

    return default_cache()


@dataclass(frozen=True)
class Options:
    """What an operation may do, and where it keeps what it fetches and computes for later.

    overwrite: replace what the run folder holds.
    ignore_limits: run although memory or disk look too small.
    allow_pickle: read .bin weights, which can run code.
    trust_remote_code: run code that comes with the tokenizer.
    cache: downloads, conversions and the original's evaluation; default ~/.cache/quantpress.
    api_key: sent as a bearer token to a server that is already running.
    repeat: runs of the recipe, each with other calibration samples and seeds; the first is the one to serve.
    share: folder of what runs of different recipes on one model have in common: tokens and importance matrix.
    although_changed: measure or serve an artifact whose files are not what its checksums say.
    ranks: the processes that share the quantizing of a run, of which this is one; only the first does the rest.
    """

    overwrite: bool = False
    ignore_limits: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    cache: Path = field(default_factory=_default_cache)
    api_key: str | None = field(default=None, repr=False)
    repeat: int = 1
    share: Path | None = None
    although_changed: bool = False
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Callbacks:
    """How a caller follows an operation; by default nothing is said.

    on_step(what, done, total, remark): progress of `what`, such as "quantizing", mostly in decoder blocks; total is 0
    where it is not known. remark: the layer error so far, or empty.
    on_note(line): something the caller should know, such as a layer left in 16 bit.
    on_line(line): what happens while a server is started.
    on_check(check): one check of a smoke test, as soon as it is made.
    """

    on_step: Callable[[str, int, int, str], None] = lambda what, done, total, remark: None
    on_note: Callable[[str], None] = lambda line: None
    on_line: Callable[[str], None] = lambda line: None
    on_check: Callable[["Check"], None] = lambda check: None
