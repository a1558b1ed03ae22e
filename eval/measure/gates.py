"""The recipe's limits against what was measured, each with its uncertainty."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from quantpress.recipe import Gates

from .formatting import interval, plain, share
from .metrics import gated
from .results import Results
from .sections import GateCheck, GateReport, Interval

_WORST = ("REGRESSION", "INCONCLUSIVE", "ACCEPT")
_MOST = 100  # times what was measured: beyond that no amount that anyone would measure settles it


def judge(gates: Gates, results: Results) -> GateReport:
    """Every limit of `gates` against `results`, and the verdict, which is the worst of them: NONE without limits."""
    return _judged_by(gates.limits(), gates.strict, results)


def judge_again(before: GateReport, results: Results) -> GateReport:
    """The limits of an earlier report against other results."""
    return _judged_by({check.name: check.limit for check in before.checks}, before.strict, results)


def _judged_by(limits: Mapping[str, float], strict: bool, results: Results) -> GateReport:
    checks = [_judged(name, limit, results) for name, limit in limits.items()]
    if not checks:
        return GateReport()
    verdict = next(v for v in _WORST if any(check.verdict == v for check in checks))
    decisive = [check for check in checks if check.verdict == verdict]
    reason = (
        f"{ {1: 'the one limit is', 2: 'both limits are'}.get(len(checks), f'all {len(checks)} limits are') } kept"
        if verdict == "ACCEPT"
        else "; ".join(check.reason for check in decisive)
    )
    return GateReport(verdict=verdict, reason=reason, strict=strict, checks=tuple(checks))


def limit_name(limit: str) -> str:
    """A limit of the recipe in words: `max_perplexity_increase` is "perplexity increase"."""
    _, _, task = limit.partition("min_recovery.")
    return f"recovery of {task}" if task else gated(limit).limited


def show_limit(value: float | None, limit: str) -> str:
    """A limit, or the value held against it, in the metric's own unit."""
    if value is None:
        return "not measured"
    return share(value) if limit.startswith("min_recovery.") else gated(limit).show_limited(value)


def show_interval(check: GateCheck) -> str:
    """The interval of what was held against a limit; empty where there is none."""
    return "" if check.interval is None else interval(check.interval, _shower(check.name))


def _judged(name: str, limit: float, results: Results) -> GateCheck:
    """One limit checked. A task's limit holds for each of its metrics: the worst of them counts."""
    task = name.removeprefix("min_recovery.")
    if task == name:
        metric = gated(name)
        value = metric.read(results)
        judged, ends = (None, None) if value is None else (metric.judged(value), value.interval)
        alone = results.text is not None and metric.of_text and not results.repeats  # more text narrows no seeds
        windows = results.text.windows if results.text is not None and alone else None
        return _check(name, limit, judged, ends, windows, "windows", upper=metric.better == "lower")
    found = [t for t in results.tasks if t.task == task and t.recovery is not None]
    each = [_check(name, limit, t.recovery, t.recovery_interval, t.n, "questions", upper=False) for t in found]
    unmeasured = _check(name, limit, None, None, None, "", upper=False)
    return min(each, key=lambda check: (_WORST.index(check.verdict), check.value or 0.0), default=unmeasured)


def _check(
    name: str,
    limit: float,
    value: float | None,
    ends: Interval | None,
    measured: int | None,
    unit: str,
    *,
    upper: bool,
) -> GateCheck:
    """ACCEPT or REGRESSION when the whole interval lies on one side of the limit; a NaN or inf always misses it.

    measured: how many windows or questions (the unit) the value is from; None where more of them are no help.
    """

    def check(
        verdict: Literal["ACCEPT", "REGRESSION", "INCONCLUSIVE"], reason: str, needs: int | None = None
    ) -> GateCheck:
        return GateCheck(name=name, limit=limit, value=value, interval=ends, verdict=verdict, reason=plain(reason),
                         needs=needs)  # fmt: skip

    what, shown = limit_name(name), _shower(name)
    if value is None:
        return check("INCONCLUSIVE", f"{what} was not measured")
    if ends is None and math.isfinite(value):
        return check("INCONCLUSIVE", f"{what} {shown(value)}, from too little to say how sure it is: measure more")
    low, high = ends or (value, value)
    told = f"{what} {shown(value)}" + (f" ({interval((low, high), shown)})" if low != high else "")
    told += f", limit {shown(limit)}"
    if not math.isfinite(value) or (low > limit if upper else high < limit):
        return check("REGRESSION", f"{told}: missed")
    if high <= limit if upper else low >= limit:
        return check("ACCEPT", f"{told}: kept")
    needs = None if measured is None else _needs(measured, value, (low, high), limit)
    more = "it lies so close that measuring more will hardly tell"
    if measured is None:
        more = "measure more"
    elif needs is not None:
        more = f"about {needs:,} {unit} would settle it"
    return check("INCONCLUSIVE", f"{told}: too close to call; {more}", needs)


def _shower(name: str) -> Callable[[float], str]:
    return lambda value: show_limit(value, name)


def _needs(n: int, value: float, ends: Interval, limit: float) -> int | None:
    """How many of the `n` windows or questions would settle it, if value and spread stayed; None for far too many.

    The interval's half-width falls with the root of their number.
    """
    half = ends[1] - value if limit > value else value - ends[0]
    if half <= 0 or value == limit or (half / (limit - value)) ** 2 > _MOST:
        return None
    needed = n * (half / (limit - value)) ** 2 * 1.1  # a little more: the next sample differs
    step: int = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return max(n + 1, math.ceil(needed / step) * step)
