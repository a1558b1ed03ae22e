"""Verdicts: a limit is kept or missed when the whole interval says so, and inconclusive when it does not."""

import json
import math
from typing import Any

import pytest

from quantpress.eval.measure.gates import judge
from quantpress.eval.measure.results import Results
from quantpress.recipe import Gates

from ..report.test_report import fake_results


def results(**changes: Any) -> Results:
    """KL 0.1 (0.096 to 0.104), agreement 0.9 (0.89 to 0.91), perplexity up 4% (3.5% to 4.5%), 1000 bytes."""
    document = fake_results()
    document["perplexity_increase"], document["perplexity_increase_interval"] = 0.04, (0.035, 0.045)
    document["divergence"] |= {"kl_mean": 0.1, "kl_interval": (0.096, 0.104)}
    document["divergence"] |= {
        "top1_agreement": 0.9,
        "top1_interval": (0.89, 0.91),
        "kl_p99": 1.0,
        "kl_p99_interval": (0.9, 1.1),
    }
    document["artifact"]["bytes"] = 1000
    return Results.model_validate(document | changes)


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        ({}, "NONE"),
        ({"max_perplexity_increase": "5%"}, "ACCEPT"),
        ({"max_perplexity_increase": "4.2%"}, "INCONCLUSIVE"),
        ({"max_perplexity_increase": "3.8%"}, "INCONCLUSIVE"),
        ({"max_perplexity_increase": "3%"}, "REGRESSION"),
        ({"max_kl": 0.105}, "ACCEPT"),
        ({"max_kl": 0.1}, "INCONCLUSIVE"),
        ({"max_kl": 0.095}, "REGRESSION"),
        ({"max_kl_p99": 1.2}, "ACCEPT"),
        ({"max_kl_p99": 1.05}, "INCONCLUSIVE"),
        ({"max_kl_p99": 0.8}, "REGRESSION"),
        ({"min_top1_agreement": "88%"}, "ACCEPT"),
        ({"min_top1_agreement": "90%"}, "INCONCLUSIVE"),
        ({"min_top1_agreement": "92%"}, "REGRESSION"),
        ({"max_bytes": 1000}, "ACCEPT"),
        ({"max_bytes": 999}, "REGRESSION"),
        ({"max_bytes": 1000, "max_kl": 0.1}, "INCONCLUSIVE"),
        ({"max_bytes": 999, "max_kl": 0.1}, "REGRESSION"),
    ],
)
def test_the_interval_decides(gates: dict[str, Any], verdict: str) -> None:
    assert judge(Gates.model_validate(gates), results()).verdict == verdict


def test_the_reason_names_what_was_missed_and_by_what() -> None:
    report = judge(Gates(max_bytes=999, max_kl=0.2), results())
    assert [check.name for check in report.checks if check.verdict != "ACCEPT"] == ["max_bytes"]
    assert report.reason == "size on disk 1.00 kB, limit 999 bytes: missed"


def test_a_perplexity_that_is_no_number_keeps_no_limit() -> None:
    for value in (math.nan, math.inf):
        broken = results(perplexity_increase=value, perplexity_increase_interval=(math.nan, math.nan))
        read_back = Results.model_validate(json.loads(json.dumps(broken.document())))
        for one in (broken, read_back):
            assert judge(Gates(max_perplexity_increase=0.5), one).verdict == "REGRESSION"


def test_a_value_without_an_interval_is_not_taken_for_certain() -> None:
    report = judge(Gates(max_perplexity_increase=0.5), results(perplexity_increase_interval=None))
    assert report.verdict == "INCONCLUSIVE"
    assert report.reason == "perplexity +4.0 %, from too little to say how sure it is: measure more"


def score(metric: str, recovery: float, low: float, high: float) -> dict[str, Any]:
    said = {"metric": metric, "recovery": recovery, "recovery_interval": (low, high)}
    value = {"value": 0.5, "stderr": 0.01}
    return {"task": "arc", "higher_is_better": True, "few_shot": 0, "n": 9, "sha256": "", "artifact": value} | said


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ((0.90, 0.80, 1.00), (0.95, 0.93, 0.97), "REGRESSION"),  # the lower one is the less certain
        ((0.985, 0.981, 0.989), (0.99, 0.95, 1.03), "INCONCLUSIVE"),
        ((0.985, 0.981, 0.989), (0.99, 0.985, 0.995), "ACCEPT"),
    ],
)
def test_a_task_keeps_its_limit_in_every_metric(one: Any, other: Any, verdict: str) -> None:
    tasks = [score("acc", *one), score("acc_norm", *other)]
    report = judge(Gates.model_validate({"min_recovery": {"arc": "98%"}}), results(tasks=tasks))
    assert report.verdict == verdict
    assert len(report.checks) == 1


def test_the_size_of_a_served_model_is_not_known() -> None:
    document = results().document()
    document["artifact"]["bytes"] = 0
    assert judge(Gates(max_bytes=1), Results.model_validate(document)).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [
        (40.0 - 4.303 * 2 - 0.01, "ACCEPT"),  # Student's t of three repeats: 4.303 standard errors to either side
        (40.0 - 4.303 * 2 + 0.01, "INCONCLUSIVE"),
        (40.0, "INCONCLUSIVE"),
        (40.0 + 4.303 * 2 - 0.01, "INCONCLUSIVE"),
        (40.0 + 4.303 * 2 + 0.01, "REGRESSION"),
    ],
)
def test_a_speed_is_judged_with_the_interval_of_its_few_repeats(limit: float, verdict: str) -> None:
    speed = {"batch": 1, "context": 128, "repeats": 3, "prefill_tokens_per_second": 900, "prefill_stderr": 5,
             "decode_tokens_per_second": 40.0, "decode_stderr": 2.0}  # fmt: skip
    other = speed | {"batch": 8, "decode_tokens_per_second": 400.0}  # the gate is about the first
    runtime = {"what": "", "device": "cpu", "dtype": "float32", "threads": 1, "load_seconds": 1, "peak_rss_bytes": 1}
    efficiency = {
        "bytes": 1000, "parameters": 1, "bits_per_parameter": 1, "runtime": runtime | {"speed": [speed, other]}
    }  # fmt: skip
    report = judge(Gates(min_tokens_per_second=limit), results(efficiency=efficiency))
    assert report.verdict == verdict
    assert report.checks[0].interval == pytest.approx((40 - 4.3027 * 2, 40 + 4.3027 * 2), abs=1e-3)


def test_what_was_not_measured_is_neither_kept_nor_missed() -> None:
    report = judge(Gates(max_kl=1.0), results(divergence=None))
    assert report.verdict == "INCONCLUSIVE"
    assert report.reason == "KL was not measured"


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, 4)])
def test_what_is_too_close_to_call_has_an_exit_code_of_its_own(strict: bool, code: int) -> None:
    assert judge(Gates(max_kl=0.1, strict=strict), results()).exit_code == code
    assert judge(Gates(max_kl=0.01, strict=strict), results()).exit_code == 3
    assert judge(Gates(max_kl=1.0, strict=strict), results()).exit_code == 0
    assert Gates().strict


def test_too_close_to_call_says_how_much_would_settle_it() -> None:
    report = judge(Gates(max_perplexity_increase=0.042), results())
    said = "perplexity +4.0 % (+3.5 to +4.5 %), limit +4.2 %: too close to call; about 110 windows would settle it"
    assert report.reason == said
    assert report.checks[0].needs == 110  # 16 * (0.5 / 0.2)², and a tenth more
    hopeless = judge(Gates(max_perplexity_increase=0.0401), results()).checks[0]
    assert hopeless.needs is None
    assert "measuring more will hardly tell" in hopeless.reason
    tasks = [score("acc", 0.985, 0.965, 1.005) | {"n": 200}]
    asked = judge(Gates.model_validate({"min_recovery": {"arc": "98%"}}), results(tasks=tasks)).reason
    told = "recovery of arc 98.5 % (96.5 to 100.5 %), limit 98.0 %: too close to call"
    assert asked == f"{told}; about 3,600 questions would settle it"


@pytest.mark.parametrize("value", [3, "3", 1.5])
def test_a_percentage_without_its_sign_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{value} is \d+%; write {value}% for {value} percent"):
        Gates.model_validate({"max_perplexity_increase": value})


def test_what_is_above_one_is_read_again_as_it_was_written() -> None:
    gates = Gates.model_validate({"max_perplexity_increase": "300%", "max_bytes": "4GB"})
    assert gates.limits() == {"max_perplexity_increase": 3.0, "max_bytes": 4_000_000_000}
    assert Gates.model_validate(gates.model_dump(mode="json")) == gates
    assert Gates.model_validate({"max_bytes": "4GiB"}).max_bytes == 4 << 30
    with pytest.raises(ValueError, match="'much' is no size"):
        Gates.model_validate({"max_bytes": "much"})
