"""The recipe's limits against what was measured, each with its uncertainty."""

import math

from quantpress.recipe import Gates

from .results import Check, GateReport, Interval, Results
from .statistics import around

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


def _judged(name: str, limit: float, results: Results) -> Check:
    """The check of one limit; of a task's, which holds for each of its metrics, the worst."""
    task = name.removeprefix("min_recovery.")
    if task == name:
        return _check(name, limit, *_measured(name, results), upper=name.startswith("max_"))
    found = [t for t in results.tasks if t.task == task and t.recovery is not None]
    each = [_check(name, limit, t.recovery, t.recovery_interval, upper=False) for t in found]
    unmeasured = _check(name, limit, None, None, upper=False)
    return min(each, key=lambda check: (_WORST.index(check.verdict), check.value or 0.0), default=unmeasured)


def _measured(name: str, results: Results) -> tuple[float | None, Interval | None]:
    """The value a gate is about and its 95% interval; None for what was not measured, or too little of to have one."""
    if name == "min_tokens_per_second":
        runtime = results.efficiency.runtime if results.efficiency else None
        if runtime is None or not runtime.speed:
            return None, None
        first = runtime.speed[0]
        rate = first.decode_tokens_per_second
        return rate, around(rate, first.decode_stderr, first.repeats)
    away = results.divergence
    if name == "max_perplexity_increase":
        increase = results.perplexity_increase
        if increase is None and results.original is not None and results.artifact is not None:
            increase = math.nan  # as JSON keeps one that is no number: a broken artifact, not one that was not measured
        return increase, results.perplexity_increase_interval
    if name == "max_bytes":
        size = results.efficiency.bytes if results.efficiency else results.artifact.bytes if results.artifact else 0
        return (size, (size, size)) if size else (None, None)  # a served model's is 0: nobody can tell from outside
    if away is None:
        return None, None
    if name == "max_kl":
        return away.kl_mean, away.kl_interval
    if name == "max_kl_p99":
        return away.kl_p99, away.kl_p99_interval
    assert name == "min_top1_agreement", name
    return away.top1_agreement, away.top1_interval


def _check(name: str, limit: float, value: float | None, interval: Interval | None, *, upper: bool) -> Check:
    """ACCEPT and REGRESSION when the whole interval says so; a value that is not a number never keeps a limit."""
    if value is None:
        return Check(name=name, limit=limit, value=None, verdict="INCONCLUSIVE", reason="it was not measured")
    if interval is None and math.isfinite(value):
        reason = f"{value:.5g}, from too little to say how sure it is: measure more"
        return Check(name=name, limit=limit, value=value, verdict="INCONCLUSIVE", reason=reason)
    low, high = interval or (value, value)
    kept = high <= limit if upper else low >= limit
    missed = not math.isfinite(value) or (low > limit if upper else high < limit)
    shown = f"{value:.5g}" + (f" (95% interval {low:.5g} to {high:.5g})" if low != high else "")
    if not kept and not missed:
        verdict, reason = "INCONCLUSIVE", f"{shown} cannot be told from the limit {limit:.5g}: measure more"
    else:
        how = "keeps" if kept and not missed else "misses"
        verdict, reason = "REGRESSION" if missed else "ACCEPT", f"{shown} {how} the limit {limit:.5g}"
    return Check.model_validate(
        {"name": name, "limit": limit, "value": value, "interval": interval, "verdict": verdict, "reason": reason}
    )
