"""One declaration makes a metric: a toy one is seen on the page, in the summaries, the comparison and a CI."""

import json
from pathlib import Path

import pytest

from quantpress.eval.measure import metrics
from quantpress.eval.measure.gates import judge
from quantpress.eval.measure.lines import lines
from quantpress.eval.measure.metrics import METRICS, Metric, MetricValue, gated
from quantpress.eval.measure.results import Results
from quantpress.eval.report import page
from quantpress.eval.report.junit import step_summary
from quantpress.eval.report.page import write_comparison, write_report
from quantpress.recipe import Gates

from ..report.test_report import fake_manifest, fake_results, write_run
from ..report.test_sections import full_results, words

TOY = Metric(
    "surprise", "Toy surprise", "bananas", "lower", "Counts bananas.",
    lambda results: MetricValue(0.125, 0.25, 0.01, 0.02, change=-0.5, interval=(0.1, 0.15)),
    "{:.3f}".format, limit="max_kl", limited="toy surprise",
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """A metric in place of the mean KL divergence, so that a limit of the recipe is about it."""
    declared = tuple(TOY if metric.limit == "max_kl" else metric for metric in METRICS)
    monkeypatch.setattr(metrics, "METRICS", declared)
    monkeypatch.setattr(page, "METRICS", declared)
    return TOY


def test_a_new_metric_needs_one_declaration(toy: Metric, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, fake_manifest(n, blocks=2), fake_results(p, "NONE")) for n, p in
            (("one", 18.0), ("two", 19.0))]  # fmt: skip
    report = write_report(runs[0]).parent
    assert "Toy surprise, bananas lower is better0.250 ± 0.0200.125 ± 0.010−50.0 %" in words(report)
    assert "Counts bananas. In bananas. Lower is better." in words(report)
    markdown = (report / "summary.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "| Toy surprise, bananas | 0.250 ± 0.020 | 0.125 ± 0.010 | −50.0 % |" in markdown
    summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))["summary"]
    assert summary["metrics"]["surprise"]["artifact"] == 0.125
    both = write_comparison(runs, tmp_path / "both").parent
    assert "Toy surprisebananas" in words(both)
    assert "Toy surprise, bananas |" in (both / "summary.md").read_text(encoding="utf-8")
    results = Results.model_validate(fake_results())
    assert "| Toy surprise | 0.250 → 0.125 bananas (−50.0 %) |" in step_summary("x", results)
    assert ("Toy surprise", "0.250 → 0.125 bananas (−50.0 %)") in lines(results)


@pytest.mark.parametrize(("limit", "verdict"), [(0.09, "REGRESSION"), (0.12, "INCONCLUSIVE"), (0.2, "ACCEPT")])
def test_its_gate_judges_what_it_reads(toy: Metric, limit: float, verdict: str) -> None:
    assert judge(Gates(max_kl=limit), Results.model_validate(fake_results())).verdict == verdict


def test_every_limit_of_a_recipe_has_its_metric() -> None:
    limits = set(Gates.model_fields) - {"strict", "min_recovery"}
    assert {metric.limit for metric in METRICS if metric.limit} == limits
    for limit in limits:
        metric = gated(limit)
        assert metric.limited
        assert metric.better == ("lower" if limit.startswith("max_") else "higher")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_every_metric_is_read_from_what_was_measured() -> None:
    document = full_results()
    document["efficiency"] |= {"original_bytes": 269_060_552, "bits_per_weight": 4.31, "bytes": 114_000_000}
    found = {metric.name: value for metric, value in metrics.measured(Results.model_validate(document))}
    assert set(found) == {metric.name for metric in METRICS}
    assert found["perplexity"].change == pytest.approx(18.4 / 17.05 - 1)
    for metric in ("bits_per_byte", "bytes"):
        assert found[metric].change == pytest.approx(found[metric].artifact / (found[metric].original or 0) - 1)
    assert (found["bytes"].artifact, found["bytes"].original) == (114_000_000, 269_060_552)
    assert found["bytes"].interval == (114_000_000, 114_000_000)
    before, after = document["original"]["bits_per_byte"], document["artifact"]["bits_per_byte"]
    assert (found["bits_per_byte"].artifact, found["bits_per_byte"].original) == (after, before)
    assert found["bits_per_parameter"].original == pytest.approx(269_060_552 * 8 / 134_515_008)
    assert found["tokens_per_second"].change == pytest.approx(1 / 3)
    assert found["tokens_per_second"].stderr == 0.5
    served = Results.model_validate({"schema": 2, "dtype": "float32", "device": "cpu", "seconds": 1})
    assert metrics.measured(served) == []
