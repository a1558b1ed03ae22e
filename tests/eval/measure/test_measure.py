"""An evaluation from the command to the files it writes: a run, an artifact, a checkpoint, a stopped one."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from quantpress import cli
from quantpress.artifact.artifact import Artifact
from quantpress.core.errors import BadInput
from quantpress.core.files import remembered
from quantpress.eval.measure import evaluate as measure
from quantpress.eval.measure import speed
from quantpress.eval.measure.evaluate import Watch, evaluate, prepare
from quantpress.eval.measure.results import Results, read_results
from quantpress.eval.measure.sections import Generation, Runtime
from quantpress.eval.report.junit import Stage, step_summary, write_junit
from quantpress.recipe import Evaluation, Gates

from ...quantize.engine.test_pipeline import make
from ...tiny import build, text
from ..report.test_report import fake_results


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a run of it in `run`, another model in `other`, and `text.txt`."""
    folder = tmp_path_factory.mktemp("evaluation")
    build("llama", folder / "model", torch.bfloat16)
    build("qwen3_moe", folder / "other", torch.bfloat16)
    (folder / "text.txt").write_text(text())
    settings = {"source": str(folder / "text.txt"), "windows": 3, "window": 48, "new_tokens": 4}
    document = {"method": {"name": "rtn"}, "evaluation": settings, "gates": {"max_bytes": 10**9}}
    make(folder / "run", folder / "model", document)
    return folder


def command(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `quantpress eval`, with a cache of the test's own."""
    monkeypatch.setenv("QUANTPRESS_CACHE", str(place / "cache"))
    monkeypatch.setattr("sys.argv", ["quantpress", "eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_run_is_measured_by_its_own_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
    assert command(place, monkeypatch, str(place / "run")) == 0
    results = read_results(place / "run")
    assert results.complete
    assert results.subject is not None
    assert (results.subject.kind, results.subject.format) == ("run", "compressed-tensors")
    assert results.text is not None
    assert (results.text.windows, results.text.window) == (3, 48)
    assert results.original is not None
    assert results.artifact is not None
    assert results.perplexity_increase == pytest.approx(results.artifact.perplexity / results.original.perplexity - 1)
    assert results.perplexity_increase_interval is not None
    assert results.perplexity_increase_interval[0] < results.perplexity_increase
    assert results.divergence is not None
    assert results.divergence.kl_mean > 0
    assert results.divergence.noise is not None
    assert sum(bucket.tokens for bucket in results.divergence.confidence) == results.text.tokens
    assert results.efficiency is not None
    assert results.efficiency.runtime is None
    assert results.efficiency.bytes < (results.efficiency.original_bytes or 0)
    assert (results.artifact.bytes, results.original.bytes) == (
        results.efficiency.bytes, results.efficiency.original_bytes,
    )  # fmt: skip
    assert results.efficiency.bits_per_weight == Artifact(place / "run" / "quantized").bits_per_weight()
    assert results.efficiency.cache is not None
    assert results.efficiency.cache.context == Evaluation().efficiency.context
    assert [fit.gpu for fit in results.efficiency.fits] == list(Evaluation().efficiency.gpus)
    assert len(results.generations) == 3
    assert results.gates.verdict == "ACCEPT"
    assert "| ✅ ACCEPT | size on disk" in (place / "summary.md").read_text(encoding="utf-8")
    cases = ElementTree.parse(place / "run" / "eval" / "junit.xml").findall(".//testcase")
    assert [case.get("name") for case in cases] == ["max_bytes", "eval"]


def test_an_artifact_alone_equals_its_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = place / "recipe.yaml"
    evaluation = {"source": str(place / "text.txt"), "windows": 3, "window": 48, "prompts": []}
    recipe.write_text(yaml.safe_dump({"evaluation": evaluation, "gates": {"max_kl": 1e-9}}))
    assert command(place, monkeypatch, str(place / "run"), "--recipe", str(recipe), "--out", str(place / "a")) == 3
    capsys.readouterr()
    arguments = ["--original", str(place / "model"), "--recipe", str(recipe), "--json"]
    artifact = str(place / "run" / "quantized")
    assert command(place, monkeypatch, artifact, *arguments, "--out", str(place / "b")) == 3
    printed = Results.model_validate_json(capsys.readouterr().out)
    run, alone = read_results(place / "a"), read_results(place / "b")
    assert printed == alone
    assert alone.divergence == run.divergence
    assert alone.subject is not None
    assert (alone.subject.kind, alone.subject.format) == ("artifact", "compressed-tensors")
    assert alone.gates.verdict == "REGRESSION"


def test_a_checkpoint_against_itself_differs_in_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"--set=evaluation.{key}={value}" for key, value in
                {"source": place / "text.txt", "windows": 2, "window": 32, "new_tokens": 3}.items()]  # fmt: skip
    model = str(place / "model")
    assert command(place, monkeypatch, model, "--original", model, "--out", str(place / "self"), *settings) == 0
    results = read_results(place / "self")
    assert results.divergence is not None
    assert results.divergence.kl_max == 0
    assert results.perplexity_increase == 0
    assert [g.first_difference for g in results.generations] == [None] * 3
    assert results.subject is not None
    assert results.subject.kind == "checkpoint"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a folder to measure, or --url"),
        (["{}/run", "--url", "http://x/v1", "--model", "m"], "give a folder to measure, or --url"),
        (["--url", "http://x/v1"], "--url and --model go together"),
        (["{}/run/quantized"], "--original says what the model was made from"),
        (["{}/nothing", "--original", "{}/model"], "nothing: no such folder"),
        (["{}", "--original", "{}/model"], "neither a run folder"),
        (
            ["{}/run", "--set", "evaluation.tasks=[{name: a, file: b}]"],
            "a task has either a `name` that lm-eval knows or a `file`",
        ),
        (["{}/run", "--set", "gates.min_recovery={arc: 99%}"], "no task 'arc' in evaluation.tasks; it has none"),
        (["{}/run", "--set", "gates.min_tokens_per_second=5"], "needs evaluation.efficiency.timing"),
        (["{}/run", "--set", "evaluation.efficiency.gpus=[H900]"], "no GPU 'H900' in the table"),
        (["{}/run", "--set", "evaluation.efficiency.price_per_hour=2"], "price_per_hour needs a measured speed"),
        (["{}/run", "--set", "evaluation.windows=9999"], "windows of 48 tokens, 9999 are asked for"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_writes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = place / "refused"
    monkeypatch.setenv("COLUMNS", "500")
    assert command(place, monkeypatch, *(a.replace("{}", str(place)) for a in arguments), "--out", str(out)) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_another_model_is_refused(place: Path) -> None:
    wanted = Evaluation(source=str(place / "text.txt"), windows=1, window=32)
    prepared = prepare(place / "model", wanted, place / "cache")
    bigger = place / "bigger"
    model = build("llama", bigger)
    model.config.vocab_size = 300
    config = json.loads((bigger / "config.json").read_text())
    (bigger / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(BadInput, match="is not a version of"):
        evaluate(place / "model", bigger, prepared, Gates())


def test_a_stopped_evaluation_keeps_what_it_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> tuple[Generation, ...]:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "side_by_side", stop)
    out = place / "stopped"
    assert command(place, monkeypatch, str(place / "run"), "--out", str(out)) == 130
    left = read_results(out)
    assert not left.complete
    assert left.divergence is not None
    assert left.efficiency is not None
    assert left.generations == ()


def test_what_fails_along_the_way_is_noted_and_the_rest_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Runtime:
        raise BadInput("no room")

    monkeypatch.setattr(measure, "time_model", fails)
    monkeypatch.setattr(measure, "side_by_side", fails)
    wanted = Evaluation.model_validate(
        {"source": str(place / "text.txt"), "windows": 2, "window": 32, "efficiency": {"timing": {}}}
    )
    saved: list[Results] = []
    watch = Watch(save=saved.append)
    results = evaluate(
        place / "model", place / "run" / "quantized", prepare(place / "model", wanted, place / "cache"),
        Gates(min_tokens_per_second=1.0), watch,
    )  # fmt: skip
    assert results.notes == ("continuations: no room", "timing: no room")
    assert results.divergence is not None
    assert [check.reason for check in results.gates.checks] == ["tokens per second was not measured"]
    assert [one.complete for one in saved] == [False] * (len(saved) - 1) + [True]


def test_timing_and_its_price_are_part_of_the_results(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_model", speed.measure)
    efficiency = {"timing": {"contexts": [8], "new_tokens": 3, "repeats": 2}, "price_per_hour": 1.5}
    wanted = Evaluation.model_validate(
        {"source": str(place / "text.txt"), "windows": 1, "window": 32, "prompts": [], "efficiency": efficiency}
    )
    prepared = prepare(place / "model", wanted, place / "cache")
    results = evaluate(place / "model", place / "run" / "quantized", prepared, Gates(min_tokens_per_second=1e9))
    held = results.efficiency
    assert held is not None
    assert held.runtime is not None
    assert held.original_runtime is not None
    assert held.cost is not None
    rate = held.runtime.speed[0].decode_tokens_per_second
    assert held.cost.per_million_decoded == pytest.approx(1.5 / 3600 / rate * 1e6)
    assert results.gates.verdict == "REGRESSION"


# ---- what a CI reads


def judged() -> Results:
    document = fake_results()
    document["gates"] = {
        "verdict": "REGRESSION", "reason": "max_kl: too much | <of it>", "checks": [
            {"name": "max_bytes", "limit": 2, "value": 1, "verdict": "ACCEPT", "reason": "fine"},
            {"name": "max_kl", "limit": 1, "value": 2, "verdict": "REGRESSION", "reason": "too much | <of it>"},
            {"name": "min_top1_agreement", "limit": 1, "value": 1, "verdict": "INCONCLUSIVE", "reason": "noise"},
        ],
    }  # fmt: skip
    return Results.model_validate(document)


@pytest.mark.parametrize(("strict", "failures"), [(False, {"max_kl"}), (True, {"max_kl", "min_top1_agreement"})])
def test_junit_has_a_case_a_gate(strict: bool, failures: set[str], tmp_path: Path) -> None:
    results = judged()
    results = results.model_copy(update={"gates": results.gates.model_copy(update={"strict": strict})})
    write_junit(tmp_path / "junit.xml", "a name\x00 with & signs", results)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", str(len(failures)))
    cases = {case.get("name"): case for case in suite}
    assert {name for name, case in cases.items() if case.find("failure") is not None} == failures
    skipped = [name for name, case in cases.items() if case.find("skipped") is not None]
    assert skipped == ([] if strict else ["min_top1_agreement"])
    assert cases["max_kl"].get("classname") == "a name with & signs"
    stopped = results.model_copy(update={"complete": False, "gates": results.gates.model_copy(update={"checks": ()})})
    write_junit(tmp_path / "junit.xml", "a", stopped)
    _, stages = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [(case.get("name"), case[0].get("message")) for case in stages] == [
        ("eval", "the evaluation was interrupted: sections are missing")
    ]
    write_junit(tmp_path / "junit.xml", "a", None, [Stage("quantize", 95.2)])  # a recipe without an evaluation
    gates, stages = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (gates.get("tests"), [case.get("name") for case in stages]) == ("0", ["quantize"])
    write_junit(tmp_path / "junit.xml", "a", results, [Stage("quantize", 95.2), Stage("smoke", 3, "it failed")])
    _, stages = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (stages.get("tests"), stages.get("failures"), stages.get("time")) == ("2", "1", "98.200")
    assert "too much | <of it>" in str(cases["max_kl"][0].get("message"))


def test_the_step_summary_is_one_table_a_row_that_text_cannot_break() -> None:
    lines = step_summary("run | one", judged()).splitlines()
    assert lines[0] == "### ❌ quantpress: run \\| one REGRESSION"
    assert "| ❌ REGRESSION | too much \\| \\<of it\\> |" in lines
    assert any(line.startswith("| Perplexity | 17.05 → 18.40") for line in lines)


def test_the_schema_survives_its_own_json(place: Path) -> None:
    document = fake_results()
    document["artifact"]["perplexity"] = float("inf")
    results = Results.model_validate(document)
    back = json.loads(json.dumps(results.document(), allow_nan=False))
    assert back["schema"] == 2
    assert back["artifact"]["perplexity"] is None
    again = Results.model_validate(back)
    assert again.artifact is not None
    assert again.artifact.perplexity != again.artifact.perplexity  # read back as not a number
    assert again.document() == results.document()


def test_what_the_original_writes_is_written_once(tmp_path: Path) -> None:
    asked: list[Any] = []

    def write(*given: Any) -> list[list[int]]:
        asked.append(given)
        return [[1, 2, 3]]

    for what, prompts, new_tokens in (
        ("a", [[5]], 3),
        ("a", [[5]], 3),
        ("b", [[5]], 3),
        ("a", [[6]], 3),
        ("a", [[5]], 4),
    ):
        key = [what, prompts, new_tokens]
        assert remembered(tmp_path, key, lambda key=key: write(*key)) == [[1, 2, 3]]  # type: ignore[misc]
    assert len(asked) == 4
