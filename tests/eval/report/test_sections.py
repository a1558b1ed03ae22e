"""The sections of the page that are there when something was measured, and absent when it was not."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.files import write_json
from quantpress.eval.measure.sections import TaskResult
from quantpress.eval.report.figures import recovery_axis
from quantpress.eval.report.measured_run import LeftOut, grouped
from quantpress.eval.report.page import write_comparison, write_report, write_sweep
from quantpress.eval.report.page_text import squeezed
from quantpress.eval.report.tradeoff import Axes, Point, pareto, tradeoff

from ..release.test_recommend import SERVING, task
from .test_report import BROWSER, Page, fake_manifest, fake_results, in_browser, write_run

SECTIONS = ("Tasks", "Where the divergence is", "The same prompts continued", "Memory and speed", "Served by vLLM")


def load(what: str, goodput: float, **more: Any) -> dict[str, Any]:
    """A load of 40 requests, 2 a second."""
    ms = {"p50": 120.4, "p95": 310.0, "p99": 420.0}
    return {
        "what": what, "rate": 2.0, "seconds": 20.5, "requests": 40, "completed": 40, "error": None, "ttft_ms": ms,
        "itl_ms": ms, "tpot_ms": {"p50": 31.25, "p95": 44.0, "p99": 51.0}, "goodput": goodput, "limit_ttft_ms": 500.0,
        "limit_tpot_ms": 50.0, "requests_per_second": 1.9, "tokens_per_second": 121.6,
    } | more  # fmt: skip


LOADS = {
    "load": [load("artifact", 1.87), load("original", 1.21, completed=38, error="503: full")],
    "against": {"positions": 90, "away": 0.0003, "limit": 0.003, "lost": 0.0812, "expected": 0.0809},
}


def full_results(perplexity: float = 18.4) -> dict[str, Any]:
    """Everything that can be measured."""
    results = fake_results(perplexity, "NONE")
    results["perplexity_increase_interval"] = [0.05, 0.11]
    buckets = [(0.0, 0.1, 100, 0.08), (0.1, 0.5, 300, 0.04), (0.5, 1.0, 200, 0.02)]
    results["divergence"]["confidence"] = [
        {"low": low, "high": high, "tokens": n, "kl_mean": kl, "kl_stderr": 0.00457, "top1_agreement": 0.9}
        for low, high, n, kl in buckets
    ]
    results["divergence"]["noise"] = {
        "what": "bfloat16 against float32", "kl_mean": 0.00134, "kl_p99": 0.01, "top1_agreement": 0.99,
        "perplexity_increase": 0.0,
    }  # fmt: skip
    rows = [task("arc_easy", 0.6, 0.57, "acc_norm"), task("piqa", 0.7, 0.71)]
    for row in rows:
        row |= {"difference_interval": [-0.05, 0.01], "recovery_interval": [0.92, 1.01]}
    results["tasks"] = rows
    results["generations"] = [
        {"prompt": "The capital <b>", "original": "of France is Paris", "artifact": "of France was Lyon", "tokens": 5,
         "first_difference": 2, "shared_characters": 9},
        {"prompt": "One two", "original": "three", "artifact": "three", "tokens": 1, "first_difference": None,
         "shared_characters": 5},
    ]  # fmt: skip
    runtime = {"what": "transformers 5", "device": "cpu", "dtype": "bfloat16", "threads": 2, "load_seconds": 1.5,
               "peak_rss_bytes": 647_000_000}  # fmt: skip
    speed = {"batch": 1, "context": 128, "repeats": 2, "prefill_tokens_per_second": 1534.7, "prefill_stderr": 2.0,
             "decode_stderr": 0.5}  # fmt: skip
    results["efficiency"] = {
        "bytes": 114_000_000, "parameters": 134_515_008, "bits_per_parameter": 6.8,
        "runtime": runtime | {"speed": [speed | {"decode_tokens_per_second": 40.0}]},
        "original_runtime": runtime | {"speed": [speed | {"decode_tokens_per_second": 30.0}]},
        "cache": {"dtype": "bfloat16", "bytes_per_token": 23_040, "context": 4096, "bytes_at_context": 94_371_840},
        "fits": [{"gpu": "L4", "memory_bytes": 24_000_000_000, "context": 4096, "concurrency": 214}],
        "cost": {"per_hour": 2.0, "per_million_decoded": 13.9, "per_million_prefilled": 0.4, "formula": "2 an hour"},
    }  # fmt: skip
    return results


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of a run in which everything was measured."""
    run = write_run(tmp_path_factory.mktemp("full") / "run", fake_manifest(blocks=3), full_results())
    write_json(run / "eval" / "serving.json", SERVING | LOADS)
    return write_report(run).parent


def words(folder: Path) -> str:
    return Page((folder / "index.html").read_text(encoding="utf-8")).text.replace("\u00a0", " ")


def test_what_was_measured_has_its_section(full: Path) -> None:
    text = words(full)
    for title in SECTIONS:
        assert title in text, title
    for shown in ("−3.0 −5.0 to +1.0", "95.0 %", "0 to 10 %", "0.0800 ± 0.0046", "1,535 / 40.0",
                  "647 MB", "214", "23.0 kB per token", "112 ms", "✓ answers", "– skipped: tools",
                  "+7.9 % +5.0 to +11.0 %",
                  "2original38 of 401.21120 31031.2 44.0121.6", "artifact40 of 401.87120 310", "503: full",
                  "KL 0.000300 (up to 0.00300 is the server's arithmetic)", "KL 0.0812 as served, 0.0809 as measured",
                  "The capital <b>", "from token 3", "all 1 tokens alike", "2 an hour"):  # fmt: skip
        assert shown in text, shown


def test_what_was_not_is_absent(tmp_path: Path) -> None:
    folder = write_report(write_run(tmp_path / "run", fake_manifest(blocks=2), fake_results())).parent
    text = words(folder)
    for title in SECTIONS:
        assert title not in text, title
    assert not (folder / "tasks.png").exists()


def test_layers_with_the_same_note_are_one_line() -> None:
    notes = [f"model.layers.{k}: damp raised" for k in range(5)] + [
        "a: left in 16 bit",
        "no colon",
        "b: left in 16 bit",
    ]
    assert grouped(notes) == [
        "model.layers.0 and 4 more: damp raised", "a: left in 16 bit", "b: left in 16 bit", "no colon"
    ]  # fmt: skip


def test_the_first_token_that_differs_is_marked(full: Path) -> None:
    page = (full / "index.html").read_text(encoding="utf-8")
    assert 'of France<mark><span class="unseen">different from here: </span> was</mark> Lyon' in page
    assert "<b>" not in page


def test_every_chart_is_there_as_png_and_as_svg(full: Path) -> None:
    names = sorted(file.stem for file in full.glob("*.png"))
    assert names == ["divergence", "layers", "perplexity", "recovery", "tasks", "tradeoff"]
    for name in names:
        root = ElementTree.parse(full / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}text"))) > 4  # text that can be searched and copied


def test_a_sweep_shows_both_axes_and_what_failed(tmp_path: Path) -> None:
    folders = []
    for name, size, perplexity, rate in (("small", 90_000_000, 19.0, 60.0), ("good", 114_000_000, 18.0, 45.0),
                                         ("beaten", 120_000_000, 18.5, 40.0)):  # fmt: skip
        folders.append(write_run(tmp_path / name, fake_manifest(name, size=size, blocks=2), full_results(perplexity)))
        write_json(folders[-1] / "eval" / "serving.json", SERVING | {"tokens_per_second": {"1": rate}})
    failed = [LeftOut("odd", "group_size 96 <does not divide>")]
    page = write_sweep(tmp_path, folders, failed)
    assert page is not None
    text = words(page.parent)
    assert "Left out (1)" in text
    assert "group_size 96 <does not divide>" in text
    assert "Tokens per second from a server" in text
    assert (page.parent / "speed.svg").is_file()
    markdown = (page.parent / "summary.md").read_text(encoding="utf-8")
    assert "- odd: group\\_size 96 \\<does not divide\\>" in markdown
    assert json.loads((page.parent / "summary.json").read_text())["failed"][0]["name"] == "odd"
    assert write_sweep(tmp_path, []) is None
    (folders[0] / "eval" / "serving.json").unlink()  # no axis of speeds that were not all measured
    assert write_sweep(tmp_path, folders) == page
    assert "Tokens per second from a server" not in words(page.parent)
    assert not (page.parent / "speed.svg").exists()


def test_of_a_rate_more_is_better() -> None:
    points = [Point("original", 30, 17.0, role="original"), Point("fast", 60, 19.0),
              Point("beaten", 40, 18.5, None, "dominated"), Point("even", 45, 18.0)]  # fmt: skip
    axes = Axes("Perplexity", "Tokens per second", rate=True)
    assert [points[i].label for i in pareto(points, axes)] == ["fast", "even", "original"]
    plot = tradeoff(points, (900, 400), axes, lambda point: point.label)
    assert {mark.title: mark.role for mark in plot.marks}["beaten"] == "dominated"
    xs = {mark.title: mark.x for mark in plot.marks}
    assert xs["original"] < xs["beaten"] < xs["even"] < xs["fast"]
    # At a speed between two points only the faster one will do.
    assert plot.front[1] == (plot.front[0][0], plot.front[2][1])


def test_the_axis_of_recoveries_holds_every_interval() -> None:
    rows = [task("a", 0.5, 0.4) | {"recovery_interval": [0.7, 0.95]}, task("b", 0.5, 0.55)]
    at = recovery_axis([TaskResult.model_validate(row) for row in rows], 10, 110)
    places = [at(value) for value in (0.7, 0.8, 0.95, 1.0, 1.1)]
    assert places == sorted(places)
    assert 10 <= places[0] < places[-1] <= 110
    assert at(5.0) == at(1.1)  # held at the end


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_full_page_prints_and_shows_without_complaint(full: Path, tmp_path: Path) -> None:
    document, log = in_browser(full / "index.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert "The same prompts continued" in Page(document).text or (tmp_path / "page.pdf").is_file()
    assert "CONSOLE" not in log


def test_headings_go_down_one_step_at_a_time_and_controls_have_names(full: Path) -> None:
    tags = Page((full / "index.html").read_text(encoding="utf-8")).tags
    levels = [int(tag[1]) for tag, _ in tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attrs.get("aria-label") for _, attrs in tags if attrs.get("role") in ("region", "img"))
    assert all(attrs.get("scope") for tag, attrs in tags if tag == "th")


def test_the_verdict_names_what_tasks_and_server_say(full: Path, tmp_path: Path) -> None:
    said = "None of the 2 task scores is significantly worse than the original's (95 % CI)."
    assert said in words(full)
    assert said in (full / "summary.md").read_text(encoding="utf-8").replace("\\", "").replace("\u00a0", " ")
    results = full_results()
    results["tasks"][0]["difference_interval"] = [-0.05, -0.01]
    failed = [{"name": "answers", "status": "fail", "reason": "<none>", "seconds": 1.0}]
    run = write_run(tmp_path / "run", fake_manifest(blocks=2), results)
    write_json(run / "eval" / "serving.json", SERVING | {"verdict": "FAILED", "checks": failed})
    text = words(write_report(run).parent)
    assert "Significantly worse than the original (95 % CI): arc_easy (acc_norm) by −5.0 to −1.0 points." in text
    assert re.search(r"vLLM( \(.*?\))? failed answers\.", text)
    assert "✗ failed: answers<none>" in text


def test_of_runs_with_gates_the_smallest_that_passes_comes_first(tmp_path: Path) -> None:
    runs = []
    for name, size, verdict in (("missed", 90e6, "REGRESSION"), ("large", 120e6, "ACCEPT"), ("small", 114e6, "ACCEPT")):
        results = full_results(19.0 - size / 1e8)
        check = {"name": "max_kl", "limit": 0.1, "value": 0.14, "verdict": verdict, "reason": "as the test says"}
        results["gates"] = {"verdict": verdict, "reason": "as the test says", "checks": [check]}
        runs.append(write_run(tmp_path / name, fake_manifest(name, size=int(size), blocks=2), results))
    page = write_comparison(runs, tmp_path / "out")
    text = words(page.parent)
    assert "The smallest that passes its gates: small, 2.4× smaller, KL" in text
    assert "2 of the 3 with gates pass them all." in text
    assert page.read_text(encoding="utf-8").count('aria-label="Tasks') == 1  # one table for all the runs
    text = words(write_comparison([runs[0], write_again(runs[0], tmp_path / "twin")], tmp_path / "none").parent)
    assert "None of the 2 artifacts passes its gates." in text


def write_again(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", manifest | {"name": folder.name})
    return folder


def test_blank_lines_of_a_broken_model_are_few() -> None:
    assert squeezed("a\n\n\n \n\n\nb\n\nc\nd") == "a\n\nb\n\nc\nd"
    assert squeezed("  x\n") == "  x\n"
