"""The one judge of measured runs: how each stands, and which of several are worth choosing between.

Page, card, summary, command line and `recommend` all ask here, so they cannot disagree. A limit is held against the
safe end of an interval; what noise could explain is never called a loss; where noise leaves it open, KL divergence, the
most sensitive of the measures, decides.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..measure.baselines import below, doubt
from ..measure.formatting import change, interval, number, plain, share, small
from ..measure.sections import Interval, TaskResult
from ..measure.statistics import around, half_width
from .measured_run import MeasuredRun

Level = Literal["fine", "look closer", "missed", "broken", "void"]
Preference = Literal["quality", "smallest", "fastest"]
# Soft limits, for recipes without gates. KL divergence is in nats per token.
FINE_KL, BROKEN_KL = 0.1, 1.0
FINE_RECOVERY = 0.95  # of the tasks' mean score
BROKEN_INCREASE = 1.0  # of the perplexity: it has doubled


@dataclass(frozen=True)
class Standing:
    """How one run stands. level: `missed` its own gates; `void`: the original itself does not work on the text."""

    level: Level
    reason: str

    @property
    def usable(self) -> bool:
        return self.level in ("fine", "look closer")


@dataclass(frozen=True)
class Recovery:
    """How much of the original's quality is left, as a fraction; basis: what it is measured by."""

    value: float
    interval: Interval | None
    basis: str
    questions: int | None = None  # of all the tasks; None for perplexity

    @property
    def safe(self) -> float:
        """The lower end of the interval; 0 where too little was measured for one."""
        return 0.0 if self.interval is None else self.interval[0]

    @property
    def shown(self) -> str:
        return plain(share(self.value) + (f" ({interval(self.interval, share)})" if self.interval else ""))


@dataclass(frozen=True)
class Judged:
    """A run among others. beaten: why it is not worth choosing, None where it is."""

    run: MeasuredRun
    standing: Standing
    recovery: Recovery
    beaten: str | None = None

    @property
    def remark(self) -> str | None:
        """What speaks against it; None where nothing does."""
        if self.standing.usable and self.beaten is not None:
            return self.beaten
        return None if self.standing.level == "fine" else f"{self.standing.level}: {self.standing.reason}"

    @property
    def kl(self) -> float:
        return self.run.divergence.kl_mean

    @property
    def kl_interval(self) -> Interval | None:
        away = self.run.divergence
        return away.kl_interval or around(away.kl_mean, away.kl_stderr)

    @property
    def kl_shown(self) -> str:
        ends = self.kl_interval
        return f"KL {small(self.kl)}" + (f" ({interval(ends, small)})" if ends else "")

    def clearly_closer(self, other: "Judged") -> bool:
        """Whether its KL divergence is lower beyond the noise of both."""
        mine, theirs = self.kl_interval, other.kl_interval
        return self.kl < other.kl and mine is not None and theirs is not None and mine[1] < theirs[0]

    def scores_clearly_better(self, other: "Judged") -> bool:
        """Whether the tasks' scores are higher beyond the noise of both; perplexity is no second witness beside KL."""
        mine, theirs = self.recovery, other.recovery
        asked = mine.questions is not None and mine.interval is not None and theirs.interval is not None
        return asked and mine.safe > (theirs.interval or (0.0, math.inf))[1]


def standing(run: MeasuredRun) -> Standing:
    """The verdict on one run: of its gates where the recipe has some, else of the soft limits."""
    if (why := doubt(run.results)) is not None:
        return Standing("void", why)
    if (why := _broken(run)) is not None:
        return Standing("broken", why)
    gates = run.results.gates
    if gates.verdict == "REGRESSION":
        return Standing("missed", plain(gates.reason))
    if gates.verdict == "INCONCLUSIVE":
        return Standing("look closer", plain(gates.reason))
    if gates.verdict == "ACCEPT":
        return Standing("fine", plain(gates.reason))
    return _soft(run)


def _broken(run: MeasuredRun) -> str | None:
    """Why it does not work as a language model; None when it does."""
    away, perplexity = run.divergence, run.artifact.perplexity
    if not math.isfinite(perplexity) or not math.isfinite(away.kl_mean):
        return "its perplexity or KL divergence is not a finite number"
    if (worse := below(perplexity, run.text)) is not None:
        return plain(f"it predicts the text worse than {worse}: its perplexity is {number(perplexity)}")
    low = _ends(away.kl_interval, away.kl_mean, away.kl_stderr)[0]
    if low > BROKEN_KL:
        return f"KL {small(away.kl_mean)}: its predictions have little to do with the original's"
    least = run.results.perplexity_increase_interval
    if (run.increase if least is None else least[0]) > BROKEN_INCREASE:
        return plain(f"its perplexity has more than doubled ({change(run.increase)})")
    return None


def _soft(run: MeasuredRun) -> Standing:
    away = run.divergence
    high = _ends(away.kl_interval, away.kl_mean, away.kl_stderr)[1]
    found = []
    if not high <= FINE_KL:
        near = away.kl_mean <= FINE_KL
        told = f" ({interval(away.kl_interval, small)})" if near and away.kl_interval else ""
        call = f"too close to the soft limit of {FINE_KL:g} to call" if near else f"above the soft limit of {FINE_KL:g}"
        found.append(f"KL {small(away.kl_mean)}{told} nats per token, {call}")
    tasks = one_metric(run.results.tasks)
    left = task_recovery(tasks) if tasks else None
    if left is not None and left.interval is not None and left.interval[1] < FINE_RECOVERY:
        found.append(f"its task scores recover {left.shown}")
    found += run.results.warnings
    if found:
        return Standing("look closer", "; ".join(found))
    return Standing("fine", f"KL {small(away.kl_mean)} nats per token, below the soft limit of {FINE_KL:g}")


def _ends(known: Interval | None, mean: float, stderr: float) -> Interval:
    return known or around(mean, stderr) or (mean, mean)


def judge_runs(runs: Sequence[MeasuredRun], fast: bool = False) -> list[Judged]:
    """Every run, in the order given, with what beats it. fast: by speed instead of size.

    A run is beaten by one that is as small (fast) and as close to the original, and better in one of the two, unless
    its own task scores are clearly better; broken, missed and void ones are beaten by themselves and beat none.
    """
    keys = [{_key(task) for task in one_metric(run.results.tasks)} for run in runs]
    common = set.intersection(*keys) if keys else set()
    judged = [Judged(run, standing(run), recovery(run, common)) for run in runs]
    return [Judged(one.run, one.standing, one.recovery, _beaten(one, judged, fast)) for one in judged]


def _beaten(one: Judged, runs: Sequence[Judged], fast: bool) -> str | None:
    if not one.standing.usable:
        return one.standing.reason

    def weight(judged: Judged) -> float:
        return -(judged.run.tokens_per_second or 0.0) if fast else float(judged.run.size)

    for other in sorted(runs, key=lambda judged: (judged.kl, weight(judged))):
        mine, theirs = (weight(one), one.kl), (weight(other), other.kl)
        better = theirs != mine and theirs[0] <= mine[0] and theirs[1] <= mine[1]
        if better and other.standing.usable and not one.scores_clearly_better(other):
            how = "no slower" if fast else "no larger" if theirs[0] == mine[0] else "smaller"
            nearer = "closer to" if other.clearly_closer(one) else "no further from"
            figures = f"{other.kl_shown} against {one.kl_shown}"
            return plain(f"{other.run.label} is {how} and {nearer} the original: {figures}")
    return None


def best_quality(runs: Sequence[Judged]) -> Judged:
    """The lowest KL divergence among those whose task scores no other's clearly exceed."""
    unbeaten = [one for one in runs if not any(other.scores_clearly_better(one) for other in runs)]
    return min(unbeaten, key=lambda one: (one.kl, one.run.size))


def pick(runs: Sequence[Judged], prefer: Preference, floor: bool = False) -> Judged | None:
    """The run to take of those worth choosing between; None where there is none.

    The smallest or fastest of those that are fine; where none is, the closest to the original. floor: the caller has
    set a limit of quality already, and the soft ones do not count.
    """
    worth = [one for one in runs if one.beaten is None]
    if not worth:
        return None
    fine = worth if floor else [one for one in worth if one.standing.level == "fine"]
    if prefer == "quality" or not fine:
        return best_quality(worth)
    if prefer == "smallest":
        return min(fine, key=lambda one: (one.run.size, one.kl))
    return min(fine, key=lambda one: (-(one.run.tokens_per_second or 0.0), one.kl))


def recovery(run: MeasuredRun, common: set[tuple[str, str, int, str]]) -> Recovery:
    """By the tasks that all compared runs have, else by perplexity."""
    tasks = [task for task in one_metric(run.results.tasks) if _key(task) in common]
    return task_recovery(tasks) if tasks else perplexity_recovery(run)


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


def task_recovery(tasks: Sequence[TaskResult]) -> Recovery:
    """Mean score over the original's; the interval comes from the tasks' paired differences, taken as independent."""
    before = sum(task.original.value for task in tasks if task.original)
    after = sum(task.artifact.value for task in tasks)
    errors = [_stderr(task) for task in tasks]
    spread = None
    if all(error is not None for error in errors):
        half = half_width(math.sqrt(sum(error**2 for error in errors if error is not None))) / before
        spread = (after / before - half, after / before + half)
    names = ", ".join(task.task for task in tasks)
    return Recovery(after / before, spread, f"mean score of {names}", sum(task.n for task in tasks))


def _stderr(task: TaskResult) -> float | None:
    """Standard error of the difference, not below what its interval says: no document changed is no certainty."""
    if task.difference_stderr is None or task.difference_interval is None:
        return task.difference_stderr
    low, high = task.difference_interval
    return max(task.difference_stderr, (high - low) / 2 / half_width(1.0))


def perplexity_recovery(run: MeasuredRun) -> Recovery:
    """The original's perplexity over the artifact's; 0 when the latter is not finite."""
    if not math.isfinite(run.increase):
        return Recovery(0.0, None, "perplexity")
    spread = run.results.perplexity_increase_interval
    ends = None if spread is None else (1 / (1 + spread[1]), 1 / (1 + spread[0]))
    return Recovery(1 / (1 + run.increase), ends, "perplexity")
