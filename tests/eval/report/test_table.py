"""The table of a comparison for programs."""

import csv
import io
import json
from pathlib import Path

import pytest

from quantpress.eval.report.measured_run import open_run
from quantpress.eval.report.page import write_comparison
from quantpress.eval.report.table import as_parquet, rows
from quantpress.eval.report.verdict import choose

from .test_report import fake_manifest, write_run
from .test_sections import full_results


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    other = full_results(18.0)
    other["tasks"] = other["tasks"][:1]
    other["artifact"]["nll_stderr"] = None
    return [write_run(tmp_path / "a", fake_manifest("a", blocks=2), full_results()),
            write_run(tmp_path / "b", fake_manifest("b", size=120_000_000, blocks=2), other)]  # fmt: skip


def test_a_row_a_run_with_numbers_that_programs_read(two: list[Path], tmp_path: Path) -> None:
    folder = write_comparison(two, tmp_path / "out").parent
    first, second = csv.DictReader(io.StringIO((folder / "runs.csv").read_text(encoding="utf-8")))
    summary = json.loads((folder / "summary.json").read_text())["runs"]
    assert [first["run"], second["run"]] == [row["label"] for row in summary] == ["a", "b"]
    assert float(first["kl_mean"]) == summary[0]["divergence"]["kl_mean"]
    assert float(first["perplexity_change"]) == pytest.approx(18.4 / 17.05 - 1)
    assert (float(first["perplexity_low"]), float(first["perplexity_high"])) == (0.05, 0.11)
    assert float(first["arc_easy_acc_norm_recovery"]) == pytest.approx(0.95)
    assert second["piqa_acc"] == ""  # it was not asked
    assert second["perplexity_stderr"] == ""  # JSON has no NaN, and neither has this
    assert "\u00a0" not in (folder / "runs.csv").read_text(encoding="utf-8")


def test_parquet_has_the_same_where_pyarrow_is_installed(two: list[Path]) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra `datasets`)")
    import pyarrow
    from pyarrow import parquet

    table = rows(choose([open_run(folder) for folder in two]))
    written = as_parquet(table)
    assert written is not None
    read = parquet.read_table(pyarrow.BufferReader(written)).to_pylist()
    assert [{k: v for k, v in row.items() if k in read[0]} for row in table] == read
