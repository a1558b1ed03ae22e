"""The recipe's limits against what was measured."""

from typing import Any

from quantpress.quantize.recipe import Gates


def judge(gates: Gates, results: dict[str, Any], artifact_bytes: int) -> dict[str, Any]:
    """The verdict: ACCEPT, REGRESSION, or NONE without gates; and each check with its limit and value."""
    measured: list[tuple[str, float | None, float, bool]] = [
        ("max_perplexity_increase", gates.max_perplexity_increase, results["perplexity_increase"], True),
        ("max_kl", gates.max_kl, results["divergence"]["kl_mean"], True),
        ("min_top1_agreement", gates.min_top1_agreement, results["divergence"]["top1_agreement"], False),
        ("max_bytes", gates.max_bytes, artifact_bytes, True),
    ]
    checks = [
        {"name": name, "limit": limit, "value": value, "passed": value <= limit if upper else value >= limit}
        for name, limit, value, upper in measured
        if limit is not None
    ]
    verdict = "NONE" if not checks else "ACCEPT" if all(check["passed"] for check in checks) else "REGRESSION"
    return {"verdict": verdict, "checks": checks}
