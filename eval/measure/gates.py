"""The recipe's limits against what was measured, each with its uncertainty."""

import math

from quantpress.recipe import Gates

from .metrics import gated
from .results import GateCheck, GateReport, Interval, Results

_WORST = ("REGRESSION", "INCONCLUSIVE", "ACCEPT")


def judge(gates: Gates, results: Results) -> GateReport:
    """Every limit of `gates` against `results`, and the verdict, which is the worst of them: NONE without limits."""
    checks = [_judged(name, limit, results) for name, limit in gates.limits().items()]
    if not checks:
        return GateReport()
    verdict = next(v for v in _WORST if any(check.verdict == v for check in checks))
    decisive = [check for check in checks if check.verdict == verdict]
    reason = (
        f"{'the one limit is' if len(checks) == 1 else f'all {len(checks)} limits are'} kept"
        if verdict == "ACCEPT"
        else "; ".join(f"{check.name}: {check.reason}" for check in decisive)
    )
    return GateReport(verdict=verdict, reason=reason, strict=gates.strict, checks=tuple(checks))


def _judged(name: str, limit: float, results: Results) -> GateCheck:
    """One limit checked. A task's limit holds for each of its metrics: the worst of them counts."""
    task = name.removeprefix("min_recovery.")
    if task == name:
        metric = gated(name)
        value = metric.read(results)
        judged, interval = (None, None) if value is None else (metric.judged(value), value.interval)
        return _check(name, limit, judged, interval, upper=metric.better == "lower")
    found = [t for t in results.tasks if t.task == task and t.recovery is not None]
    each = [_check(name, limit, t.recovery, t.recovery_interval, upper=False) for t in found]
    unmeasured = _check(name, limit, None, None, upper=False)
    return min(each, key=lambda check: (_WORST.index(check.verdict), check.value or 0.0), default=unmeasured)


def _check(name: str, limit: float, value: float | None, interval: Interval | None, *, upper: bool) -> GateCheck:
    """ACCEPT or REGRESSION when the whole interval lies on one side of the limit; a NaN or inf always misses it."""
    if value is None:
        return GateCheck(name=name, limit=limit, value=None, verdict="INCONCLUSIVE", reason="it was not measured")
    if interval is None and math.isfinite(value):
        reason = f"{value:.5g}, from too little to say how sure it is: measure more"
        return GateCheck(name=name, limit=limit, value=value, verdict="INCONCLUSIVE", reason=reason)
    low, high = interval or (value, value)
    kept = high <= limit if upper else low >= limit
    missed = not math.isfinite(value) or (low > limit if upper else high < limit)
    shown = f"{value:.5g}" + (f" (95% interval {low:.5g} to {high:.5g})" if low != high else "")
    if not kept and not missed:
        verdict, reason = "INCONCLUSIVE", f"{shown} cannot be told from the limit {limit:.5g}: measure more"
    else:
        how = "keeps" if kept and not missed else "misses"
        verdict, reason = "REGRESSION" if missed else "ACCEPT", f"{shown} {how} the limit {limit:.5g}"
    return GateCheck.model_validate(
        {"name": name, "limit": limit, "value": value, "interval": interval, "verdict": verdict, "reason": reason}
    )
