"""Several runs of one recipe as one: sums done by hand."""

import math
from typing import Any

import pytest
from scipy.stats import t

from quantpress.eval.measure.gates import judge
from quantpress.eval.measure.repeats import folded
from quantpress.eval.measure.results import Results
from quantpress.recipe import Gates

from ..release.test_recommend import task
from ..report.test_report import fake_results


def run(kl: float, perplexity: float, **more: Any) -> Results:
    results = fake_results(perplexity, "NONE")
    rise = perplexity / 17.05 - 1
    results["perplexity_increase_interval"] = [(1 + rise) * 0.99 - 1, (1 + rise) / 0.99 - 1]
    results["divergence"] |= {"kl_mean": kl, "kl_stderr": 0.001, "kl_interval": [kl - 0.002, kl + 0.002]}
    return Results.model_validate(results | more)


def test_means_with_the_variance_of_text_and_seeds() -> None:
    each = [run(kl, perplexity) for kl, perplexity in ((0.10, 18.0), (0.11, 18.5), (0.09, 18.2))]
    mean = folded(list(enumerate(each)))
    assert mean.divergence is not None
    assert mean.divergence.kl_interval is not None
    half = math.hypot(0.002, t.ppf(0.975, 2) * 0.01 / math.sqrt(3))  # the sample's standard deviation is 0.01
    assert mean.divergence.kl_mean == pytest.approx(0.10)
    assert mean.divergence.kl_interval == pytest.approx((0.10 - half, 0.10 + half))
    assert mean.artifact is not None
    assert mean.perplexity_increase is not None
    assert mean.artifact.perplexity == pytest.approx((18.0 * 18.5 * 18.2) ** (1 / 3))
    assert mean.artifact.perplexity / 17.05 - 1 == pytest.approx(mean.perplexity_increase)
    assert mean.perplexity_increase_interval is not None
    logs = [math.log(p) for p in (18.0, 18.5, 18.2)]
    spread = math.sqrt(sum((x - sum(logs) / 3) ** 2 for x in logs) / 2 / 3)
    half = math.hypot(-math.log(0.99), t.ppf(0.975, 2) * spread)
    assert mean.perplexity_increase_interval == pytest.approx(
        [(1 + mean.perplexity_increase) * math.exp(sign * half) - 1 for sign in (-1, 1)]
    )
    assert [(one.seed, one.kl_mean) for one in mean.repeats] == [(0, 0.10), (1, 0.11), (2, 0.09)]


def test_equal_runs_keep_the_interval_of_one() -> None:
    mean = folded([(0, run(0.1, 18.0)), (1, run(0.1, 18.0))])
    assert mean.divergence is not None
    assert mean.divergence.kl_interval == pytest.approx((0.098, 0.102))


def test_a_run_that_is_not_finite_is_no_average() -> None:
    mean = folded([(0, run(0.1, 18.0)), (1, run(0.1, math.inf))])
    assert mean.artifact is not None
    assert mean.artifact.perplexity == math.inf
    assert mean.perplexity_increase_interval is None


def test_tasks_of_the_same_questions_are_averaged() -> None:
    scores = [task("arc", 0.6, after) | {"recovery_interval": [after / 0.6 - 0.1, after / 0.6 + 0.1]}
              for after in (0.6, 0.54)]  # fmt: skip
    other = task("arc", 0.6, 0.3) | {"sha256": "cd"}
    mean = folded([(k, run(0.1, 18.0, tasks=[score])) for k, score in enumerate(scores)])
    (found,) = mean.tasks
    assert found.artifact.value == pytest.approx(0.57)
    assert found.recovery == pytest.approx(0.95)
    assert found.recovery_interval is not None
    half = math.hypot(0.1, t.ppf(0.975, 1) * 0.1 / math.sqrt(2) / math.sqrt(2))  # of 1.0 and 0.9
    assert found.recovery_interval == pytest.approx((0.95 - half, 0.95 + half))
    (alone,) = folded([(0, run(0.1, 18.0, tasks=[scores[0]])), (1, run(0.1, 18.0, tasks=[other]))]).tasks
    assert alone.artifact.value == 0.6


def test_gates_are_held_against_the_means() -> None:
    first, second = run(0.10, 18.0), run(0.14, 18.0)
    judged = first.model_copy(update={"gates": judge(Gates(max_kl=0.11), first)})
    assert judged.gates.verdict == "ACCEPT"
    mean = folded([(0, judged), (1, second)])
    assert mean.gates.verdict == "INCONCLUSIVE"
    assert "windows would settle it" not in mean.gates.reason  # no text makes seeds agree
