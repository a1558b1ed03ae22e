"""Recommend one of several measured runs: which fit the memory and keep the quality, which is best, and why."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from quantpress.core.errors import BadInput
from quantpress.core.notebook import table
from quantpress.core.schema import Fraction
from quantpress.core.text import meant

from ..measure.formatting import interval, number, share, size
from ..measure.results import KvCache, Results, TaskResult
from ..measure.statistics import half_width
from ..report.measured_run import MeasuredRun, comparable, labelled, open_runs

Preference = Literal["quality", "smallest", "fastest"]


class Wish(BaseModel):
    """What the run has to serve.

    margin: memory that a server needs for itself and for activations; by default a tenth of the memory (vLLM's
    gpu_memory_utilization of 0.9) and 1 GiB, as for `fits` in the results.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: ByteSize = Field(gt=0)
    context: int = Field(ge=1)  # tokens per sequence
    concurrency: int = Field(1, ge=1)  # sequences at a time
    min_recovery: Fraction | None = Field(None, ge=0, le=1)
    prefer: Preference = "quality"
    margin: ByteSize | None = None

    @classmethod
    def parse(cls, **given: object) -> "Wish":
        """The wish from option values; raises BadInput, naming the option, for one that cannot be read."""
        try:
            return cls.model_validate({key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = {"memory": "fits"}.get(str(first["loc"][0]), str(first["loc"][0])).replace("_", "-")
            hint = meant(str(first["input"]), get_args(Preference)) if option == "prefer" else "; such as 24GiB, 98%"
            raise BadInput(f"--{option} {first['input']!r}: {first['msg']}{hint}") from None

    @property
    def kept(self) -> int:
        """Bytes that are left for neither weights nor cache."""
        return self.memory // 10 + (1 << 30) if self.margin is None else int(self.margin)


@dataclass(frozen=True)
class Recovery:
    """How much of the original's quality is left, as a fraction; basis: what it is measured by."""

    value: float
    interval: tuple[float, float] | None
    basis: str


@dataclass(frozen=True)
class Candidate:
    """One run against the wish. cache_bytes: of all sequences; misses: why it does not qualify."""

    run: MeasuredRun
    cache_bytes: int | None
    recovery: Recovery
    misses: tuple[str, ...]

    @property
    def needs(self) -> int:
        """Bytes of weights and cache."""
        return self.run.size + (self.cache_bytes or 0)


@dataclass(frozen=True)
class Recommendation:
    """The recommended run, or None; why: reasons for it; others: (label, reason) of the rest; candidates: all, the best
    first.
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
    runs = open_runs(folders)
    for other in runs[1:]:
        comparable(runs[0], other)
    candidates = [_candidate(run, wish, _judge(runs)) for run in labelled(runs)]
    if wish.prefer == "fastest" and (slow := [c.run.label for c in candidates if c.run.tokens_per_second is None]):
        raise BadInput(
            f"--prefer fastest: the speed of {', '.join(slow)} was not measured; `quantpress smoke` measures it"
        )
    candidates.sort(key=_order(wish.prefer))
    fit = [c for c in candidates if not c.misses]
    if not fit:
        others = [(c.run.label, "; ".join(c.misses)) for c in candidates]
        return Recommendation(None, (), tuple(others), tuple(candidates))
    best = fit[0]
    others = [(c.run.label, "; ".join(c.misses) or _beaten(c, best, wish.prefer)) for c in candidates if c is not best]
    return Recommendation(best, tuple(_why(best, len(fit), wish)), tuple(others), tuple(candidates))


def cache_bytes(cache: KvCache, context: int) -> int:
    """Cache bytes of one sequence of `context` tokens; layers with a sliding window hold at most the window."""
    if cache.sliding_window is None or cache.bytes_per_token_past_window is None or context <= cache.sliding_window:
        return cache.bytes_per_token * context
    past = context - cache.sliding_window
    return cache.bytes_per_token * cache.sliding_window + cache.bytes_per_token_past_window * past


def _judge(runs: Sequence[MeasuredRun]) -> Callable[[Results], Recovery]:
    """One measure of recovery for all runs: the tasks they have in common, else perplexity."""
    keys = [{_key(task) for task in one_metric(run.results.tasks)} for run in runs]
    common = set.intersection(*keys)
    return (lambda results: task_recovery(results.tasks, common)) if common else perplexity_recovery


def one_metric(tasks: Iterable[TaskResult]) -> list[TaskResult]:
    """One metric per task that has an original to compare with: acc_norm, else its first."""
    out: dict[str, TaskResult] = {}
    for task in tasks:
        usable = task.original is not None and task.original.value > 0 and task.higher_is_better
        if usable and (task.task not in out or task.metric == "acc_norm"):
            out[task.task] = task
    return list(out.values())


def _key(task: TaskResult) -> tuple[str, str, int, str]:
    return task.task, task.metric, task.n, task.sha256


def task_recovery(tasks: Iterable[TaskResult], only: set[tuple[str, str, int, str]] | None = None) -> Recovery:
    """Mean score over the original's; the interval comes from the tasks' paired differences, taken as independent."""
    chosen = [task for task in one_metric(tasks) if only is None or _key(task) in only]
    before = sum(task.original.value for task in chosen if task.original)
    after = sum(task.artifact.value for task in chosen)
    errors = [task.difference_stderr for task in chosen]
    spread = None
    if all(error is not None for error in errors):
        half = half_width(math.sqrt(sum(error**2 for error in errors if error is not None))) / before
        spread = (after / before - half, after / before + half)
    names = ", ".join(task.task for task in chosen)
    return Recovery(after / before, spread, f"mean score of {names}")


def perplexity_recovery(results: Results) -> Recovery:
    """The original's perplexity over the artifact's; 0 when the latter is not finite."""
    increase = results.perplexity_increase
    if increase is None or not math.isfinite(increase):
        return Recovery(0.0, None, "perplexity")
    spread = results.perplexity_increase_interval
    return Recovery(
        1 / (1 + increase), None if spread is None else (1 / (1 + spread[1]), 1 / (1 + spread[0])), "perplexity"
    )


def _candidate(run: MeasuredRun, wish: Wish, judge: Callable[[Results], Recovery]) -> Candidate:
    efficiency, recovery = run.results.efficiency, judge(run.results)
    cache = None if efficiency is None else efficiency.cache
    whole = None if cache is None else wish.concurrency * cache_bytes(cache, wish.context)
    misses = []
    if whole is None:
        misses.append(f"the size of its key-value cache is not known; `quantpress eval {run.folder}` measures it")
    elif (excess := run.size + whole + wish.kept - wish.memory) > 0:
        misses.append(f"does not fit: {_sum(run, whole, wish)}, {size(excess)} too much")
    if wish.min_recovery is not None and recovery.value < wish.min_recovery:
        misses.append(f"recovery {_shown(recovery)} is below {share(wish.min_recovery)}")
    if run.results.gates.verdict == "REGRESSION":
        misses.append(f"missed its own gates ({run.results.gates.reason})")
    return Candidate(run, whole, recovery, tuple(misses))


def _order(prefer: Preference) -> Callable[[Candidate], tuple[float, float]]:
    if prefer == "smallest":
        return lambda c: (c.needs, -c.recovery.value)
    if prefer == "fastest":
        return lambda c: (-(c.run.tokens_per_second or 0.0), -c.recovery.value)
    return lambda c: (-c.recovery.value, c.needs)


def _why(best: Candidate, fit: int, wish: Wish) -> Iterable[str]:
    whole = f"{wish.memory.human_readable()} ({size(wish.memory)})"
    yield f"fits: {_sum(best.run, best.cache_bytes or 0, wish)}, of {whole}"
    cache = best.run.results.efficiency.cache if best.run.results.efficiency else None
    if cache is not None:
        yield (
            f"cache: {wish.concurrency} × {wish.context:,} tokens in {cache.dtype}, "
            f"{size(cache_bytes(cache, wish.context))} per sequence"
        )
    floor = "" if wish.min_recovery is None else f", at least {share(wish.min_recovery)} asked for"
    yield f"recovery {_shown(best.recovery)}, by {best.recovery.basis}{floor}"
    low = best.recovery.interval[0] if best.recovery.interval else None
    if wish.min_recovery is not None and low is not None and low < wish.min_recovery:
        yield "the interval extends below what is asked for: measure more before relying on it"
    reason = {"quality": "best quality", "smallest": "smallest", "fastest": "fastest"}[wish.prefer]
    yield "the only run that qualifies" if fit == 1 else f"{reason} of the {fit} runs that qualify"


def _sum(run: MeasuredRun, whole: int, wish: Wish) -> str:
    return f"{size(run.size)} of weights + {size(whole)} of cache + {size(wish.kept)} of margin"


def _shown(recovery: Recovery) -> str:
    return share(recovery.value) + (f" ({interval(recovery.interval, share)})" if recovery.interval else "")


def _beaten(other: Candidate, best: Candidate, prefer: Preference) -> str:
    if prefer == "quality":
        return f"qualifies, with less quality: recovery {_shown(other.recovery)}"
    if prefer == "smallest":
        return f"qualifies, and is larger: {size(other.needs)} against {size(best.needs)} of weights and cache"
    rates = (number(c.run.tokens_per_second or 0.0) for c in (other, best))
    return "qualifies, and is slower: {} against {} tokens/s".format(*rates)
