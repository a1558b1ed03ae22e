"""Recommend one of several measured runs: which fit the memory and keep the quality, which is best, and why."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from quantpress.core.errors import BadInput
from quantpress.core.notebook import table
from quantpress.core.schema import Bytes, Fraction
from quantpress.core.text import meant

from ..measure.formatting import number, plain, share, size
from ..measure.sections import KvCache
from ..report.measured_run import MeasuredRun, comparable, find_runs, labelled
from ..report.standing import Judged, Preference, Recovery, judge_runs, pick


class Wish(BaseModel):
    """What the run has to serve.

    margin: memory that a server needs for itself and for activations; by default a tenth of the memory (vLLM's
    gpu_memory_utilization of 0.9) and 1 GiB, as for `fits` in the results.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: Bytes = Field(gt=0)
    context: int = Field(ge=1)  # tokens per sequence
    concurrency: int = Field(1, ge=1)  # sequences at a time
    min_recovery: Fraction | None = Field(None, ge=0, le=1)
    prefer: Preference = "quality"
    margin: Bytes | None = None

    @classmethod
    def parse(cls, **given: object) -> "Wish":
        """The wish from option values; raises BadInput, naming the option, for one that cannot be read."""
        try:
            return cls.model_validate({key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = {"memory": "fits"}.get(str(first["loc"][0]), str(first["loc"][0])).replace("_", "-")
            hint = meant(str(first["input"]), get_args(Preference)) if option == "prefer" else ""
            hint = "; such as 98%" if option == "min-recovery" else hint
            raise BadInput(
                f"--{option} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}{hint}"
            ) from None

    @property
    def kept(self) -> int:
        """Bytes that are left for neither weights nor cache."""
        return self.memory // 10 + (1 << 30) if self.margin is None else int(self.margin)


@dataclass(frozen=True)
class Candidate:
    """One run against the wish. cache_bytes: of all sequences; misses: why it does not qualify."""

    judged: Judged
    cache_bytes: int | None
    misses: tuple[str, ...]

    @property
    def run(self) -> MeasuredRun:
        return self.judged.run

    @property
    def recovery(self) -> Recovery:
        return self.judged.recovery

    @property
    def needs(self) -> int:
        """Bytes of weights and cache."""
        return self.run.size + (self.cache_bytes or 0)


@dataclass(frozen=True)
class Recommendation:
    """The recommended run, or None; why: reasons for it; others: (label, reason) of the rest, those left out included;
    candidates: all that are finished, the best first.
    """

    choice: Candidate | None
    why: tuple[str, ...]
    others: tuple[tuple[str, str], ...]
    candidates: tuple[Candidate, ...]

    def _repr_html_(self) -> str:
        chosen = "None qualifies" if self.choice is None else f"Take {self.choice.run.label}"
        return table(chosen, self.others, self.why)


def recommend(folders: Sequence[Path], wish: Wish) -> Recommendation:
    """Pick among run folders, or folders that hold run folders (a sweep's).

    Raises BadInput without measured runs, for runs of several models or texts, and for `fastest` when the speed of a
    run was not measured.
    """
    runs, left_out = find_runs(folders)
    for other in runs[1:]:
        comparable(runs[0], other)
    fast = wish.prefer == "fastest"
    candidates = [_candidate(judged, wish) for judged in judge_runs(labelled(runs), fast)]
    if fast and (slow := [c.run.label for c in candidates if c.run.tokens_per_second is None]):
        raise BadInput(
            f"--prefer fastest: the speed of {', '.join(slow)} was not measured; `quantpress smoke` measures it"
        )
    fit = [c for c in candidates if not c.misses]
    chosen = pick([c.judged for c in fit], wish.prefer, wish.min_recovery is not None)
    best = next((c for c in fit if c.judged is chosen), None)
    candidates.sort(key=lambda c: (c is not best, bool(c.misses), c.judged.kl, c.needs))
    rest = [c for c in candidates if c is not best]
    others = [(c.run.label, "; ".join(c.misses) or _passed_over(c, best, wish.prefer)) for c in rest]
    others += [(one.name, one.reason) for one in left_out]
    why = () if best is None else tuple(_why(best, len(fit), wish))
    return Recommendation(best, why, tuple(others), tuple(candidates))


def cache_bytes(cache: KvCache, context: int) -> int:
    """Cache bytes of one sequence of `context` tokens; layers with a sliding window hold at most the window."""
    whole, past = context, 0
    if cache.sliding_window is not None and cache.bytes_per_token_past_window is not None:
        whole = min(context, cache.sliding_window)
        past = (context - whole) * cache.bytes_per_token_past_window
    return cache.bytes_per_token * whole + past + cache.state_bytes


def _candidate(judged: Judged, wish: Wish) -> Candidate:
    run = judged.run
    cache = None if run.results.efficiency is None else run.results.efficiency.cache
    whole = None if cache is None else wish.concurrency * cache_bytes(cache, wish.context)
    misses = []
    if judged.beaten is not None:
        misses.append(judged.beaten if judged.standing.usable else f"{judged.standing.level}: {judged.standing.reason}")
    if whole is None:
        misses.append(f"the size of its key-value cache is not known; `quantpress eval {run.folder}` measures it")
    elif (excess := run.size + whole + wish.kept - wish.memory) > 0:
        misses.append(plain(f"does not fit: {_sum(run, whole, wish)}, {size(excess)} too much"))
    if wish.min_recovery is not None and judged.standing.usable and judged.recovery.safe < wish.min_recovery:
        misses.append(_short(judged.recovery, wish.min_recovery))
    return Candidate(judged, whole, tuple(misses))


def _short(recovery: Recovery, floor: float) -> str:
    """Why the recovery does not keep the limit: it is below, or too little was measured to tell."""
    limit = plain(share(floor))
    if recovery.interval is None and recovery.value >= floor:
        return f"recovery {recovery.shown} is from too little to say whether it reaches {limit}: measure more"
    if recovery.interval is None or recovery.interval[1] < floor:
        return f"recovery {recovery.shown} is below {limit}"
    return f"recovery {recovery.shown} is too close to {limit} to call{_settled_by(recovery, floor)}"


def _settled_by(recovery: Recovery, floor: float) -> str:
    """How many questions would narrow the interval enough; empty where it is not known."""
    margin, low = recovery.value - floor, recovery.safe
    if recovery.questions is None or margin <= 0:
        return ": measure more"
    needed = recovery.questions * ((recovery.value - low) / margin) ** 2
    if needed > 100 * recovery.questions:
        return ""
    return f": about {math.ceil(needed / 100) * 100:,} questions would settle it, {recovery.questions:,} were asked"


def _why(best: Candidate, fit: int, wish: Wish) -> Iterable[str]:
    whole = f"{ByteSize(wish.memory).human_readable()} ({size(wish.memory)})"
    yield plain(f"fits: {_sum(best.run, best.cache_bytes or 0, wish)}, of {whole}")
    cache = best.run.results.efficiency.cache if best.run.results.efficiency else None
    if cache is not None:
        yield plain(
            f"cache: {wish.concurrency} × {wish.context:,} tokens in {cache.dtype}, "
            f"{size(cache_bytes(cache, wish.context))} per sequence"
        )
    yield f"{best.judged.standing.level}: {best.judged.standing.reason}"
    floor = "" if wish.min_recovery is None else plain(f", at least {share(wish.min_recovery)} asked for")
    yield f"recovery {best.recovery.shown}, by {best.recovery.basis}{floor}"
    reason = {"quality": "closest to the original", "smallest": "smallest", "fastest": "fastest"}[wish.prefer]
    yield "the only run that qualifies" if fit == 1 else f"{reason} of the {fit} runs that qualify"


def _sum(run: MeasuredRun, whole: int, wish: Wish) -> str:
    return f"{size(run.size)} of weights + {size(whole)} of cache + {size(wish.kept)} of margin"


def _passed_over(other: Candidate, best: Candidate | None, prefer: Preference) -> str:
    """Why a run that qualifies is not the recommended one; a difference that noise explains is no reason."""
    assert best is not None
    mine, theirs = other.judged, best.judged
    if prefer != "quality" and (mine.standing.level, theirs.standing.level) == ("look closer", "fine"):
        return f"qualifies, but look closer: {mine.standing.reason}"
    if prefer == "smallest":
        return plain(f"qualifies, and is larger: {size(other.needs)} against {size(best.needs)} of weights and cache")
    if prefer == "fastest":
        rates = (number(one.run.tokens_per_second or 0.0) for one in (other, best))
        return "qualifies, and is slower: {} against {} tokens/s".format(*rates)
    kl = f"{mine.kl_shown} against {theirs.kl_shown}"
    if theirs.clearly_closer(mine) or theirs.scores_clearly_better(mine):
        return f"qualifies, and is further from the original: {kl}"
    return f"qualifies, and is as close to the original within the noise: {kl}"
