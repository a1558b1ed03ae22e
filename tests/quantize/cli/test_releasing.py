"""The release in one run folder: every stage once, again only where something has changed, and the exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from typer.testing import CliRunner, Result

from quantpress import api
from quantpress.artifact.manifest import StageRecord, read_manifest
from quantpress.cli.app import app
from quantpress.core.errors import BadInput
from quantpress.core.files import alone_in
from quantpress.eval.release.smoke_run import ServedArtifact
from quantpress.exports.serving.record import Serving

from ...tiny import model_and_text


class Project:
    """A recipe and its run folder; given: the folder of a tiny model and a text."""

    def __init__(self, folder: Path, given: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        self.recipe: dict[str, Any] = {
            "name": "tiny",
            "model": str(given / "model"),
            "method": {"name": "rtn"},
            "weights": {"group_size": 32},
            "targets": ["vllm"],
            "evaluation": {"source": str(given / "text.txt"), "windows": 2, "window": 32, "prompts": []},
        }

    def run(self, *more: str, **changes: Any) -> Result:
        self.recipe |= changes
        return CliRunner().invoke(app, ["run", self.write(), "--out", str(self.out), *more])

    def write(self) -> str:
        """The recipe's file."""
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(self.recipe))
        return str(file)

    @property
    def stages(self) -> dict[str, Any]:
        stages: dict[str, Any] = json.loads((self.out / "manifest.json").read_text())["stages"]
        return stages


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_text(tmp_path_factory.mktemp("given"))


@pytest.fixture
def project(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("QUANTPRESS_CACHE", str(given / "cache"))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return Project(tmp_path, given)


@pytest.fixture(scope="module")
def made(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the recipe as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTPRESS_CACHE", str(given / "cache"))
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        project = Project(tmp_path_factory.mktemp("made"), given)
        done = project.run()
    assert done.exit_code == 0, done.output
    return project.out


@pytest.fixture
def finished(project: Project, made: Path) -> Project:
    """One whose run has ended, as far as it can tell: a copy."""
    shutil.copytree(made, project.out)
    return project


def test_everything_lies_in_one_folder_and_in_the_manifest(finished: Project) -> None:
    for name in (
        "quantized/config.json",
        "export/vllm/serve.sh",
        "eval/results.json",
        "export/vllm/reference.json",
        "report/index.html",
        "quantized/README.md",
    ):
        assert (finished.out / name).is_file()
    assert list(finished.stages) == ["eval", "export vllm"]
    sums = (finished.out / "export/vllm/SHA256SUMS").read_text()
    assert "  reference.json\n" in sums
    assert (finished.out / "eval/reference.json").read_bytes() == (
        finished.out / "export/vllm/reference.json"
    ).read_bytes()
    assert finished.stages["export vllm"]["summary"]["format"] == "compressed-tensors"


def test_again_does_only_what_changed(project: Project) -> None:
    project.run()
    first = project.stages
    done = project.run()
    assert done.exit_code == 0, done.output
    assert project.stages == first
    assert "export vllm: as before" in done.output
    assert "eval: as before" in done.output
    project.recipe["evaluation"]["windows"] = 3
    done = project.run()
    assert "export vllm: again, because reference:" in done.output  # it holds what was measured
    assert "eval: again, because evaluation.windows: 2 there, 3 now" in done.output
    done = project.run(targets=[{"name": "vllm", "max_model_len": 64}])
    assert "export vllm: again, because target.max_model_len: null there, 64 now" in done.output
    assert "eval: as before" in done.output
    assert "--max-model-len 64" in (project.out / "export" / "vllm" / "serve.sh").read_text()


def test_other_gates_judge_what_was_measured(finished: Project) -> None:
    before = finished.stages["eval"]
    done = finished.run(gates={"max_bytes": 1})
    assert done.exit_code == 3
    assert finished.stages["eval"] == before
    results = json.loads((finished.out / "eval" / "results.json").read_text())
    assert results["gates"]["verdict"] == "REGRESSION"
    assert "max_bytes" in (finished.out / "eval" / "junit.xml").read_text()
    recipe = json.loads((finished.out / "manifest.json").read_text())["recipe"]
    assert recipe["gates"]["max_bytes"] == 1  # which `eval` and the page go by from now on


def test_what_another_command_measured_is_not_taken_for_the_runs_own(finished: Project) -> None:
    fewer = ["eval", str(finished.out), "--set", "evaluation.windows=1"]
    done = CliRunner().invoke(app, fewer)
    assert done.exit_code == 0, done.output
    done = finished.run()
    assert "eval: as before" not in done.output
    results = json.loads((finished.out / "eval" / "results.json").read_text())
    assert results["text"]["windows"] == 2


def test_another_smoke_test_is_not_taken_for_its_own(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(finished.out)
    smoke = StageRecord(inputs={}, summary={"verdict": "PASSED"}, seconds=1)
    manifest.changed(stages=manifest.stages | {"smoke": smoke}).write(finished.out)

    def stopped(*_: Any) -> Any:
        raise BadInput("stopped")

    monkeypatch.setattr(api, "run_smoke", stopped)
    assert CliRunner().invoke(app, ["smoke", str(finished.out)]).exit_code != 0
    assert set(finished.stages) == {"export vllm", "eval"}


def test_nobody_else_works_in_the_folder_meanwhile(finished: Project) -> None:
    with alone_in(finished.out):
        for arguments in (["eval"], ["export", "--target", "vllm", "--overwrite"], ["report"], ["card"]):
            done = CliRunner().invoke(app, [arguments[0], str(finished.out), *arguments[1:]])
            assert "another quantpress is at work there" in str(done.exception), arguments


def test_a_window_longer_than_the_model_takes_costs_no_run(project: Project) -> None:
    evaluation = project.recipe["evaluation"]
    done = project.run(evaluation=evaluation | {"window": 512, "windows": 1})
    assert isinstance(done.exception, BadInput)
    assert str(done.exception).startswith("evaluation.window 512 is more than the model's 128 positions; --set ")
    done = project.run(evaluation=evaluation | {"window": 64, "prompts": ["a"], "new_tokens": 128})
    assert str(done.exception) == "evaluation.new_tokens 128: the model has 128 positions in all"
    assert not project.out.exists()


def test_a_damaged_artifact_goes_no_further(finished: Project) -> None:
    weights = finished.out / "quantized" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    done = finished.run()
    assert isinstance(done.exception, BadInput)
    assert "model.safetensors" in str(done.exception)


def test_a_server_that_is_not_there_costs_no_run(project: Project) -> None:
    done = project.run(smoke={"server": "vllm", "python": str(project.folder / "no" / "python")})
    assert isinstance(done.exception, BadInput)
    assert str(done.exception).startswith("smoke.server vllm: ")
    assert not project.out.exists()


def test_a_failed_smoke_test_fails_the_run_and_is_made_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: list[Literal["FAILED", "PASSED"]] = ["FAILED", "PASSED"]
    served: list[Path] = []

    def test(subject: ServedArtifact, out: Path, *_: Any) -> Any:
        served.append(subject.artifact)
        record = Serving(
            schema=1, server="url", version=None, artifact=str(subject.artifact), device="cpu", command=(),
            verdict=verdicts[len(served) - 1], checks=(), agreement=None, max_model_len=64, load_seconds=None,
            requests=0, prompt_tokens=None, ttft_ms=None, itl_ms=None, tokens_per_second={}, peak_rss_bytes=None,
            log=None,
        )  # fmt: skip
        record.write(out)
        return record

    monkeypatch.setattr("quantpress.eval.release.run.run_smoke", test)
    smoke = {"server": "url", "url": "http://127.0.0.1:9"}
    assert project.run(smoke=smoke).exit_code == 1
    done = project.run()
    assert done.exit_code == 0, done.output
    assert "smoke: again, because it failed" in done.output
    assert "smoke: as before" in project.run().output
    assert served == [project.out / "quantized"] * 2


def test_the_machine_is_told_the_stages(project: Project) -> None:
    done = project.run("--json")
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["out"] == str(project.out)
    assert document["results"]["perplexity_increase"] > -1
    assert set(document["stages"]) == {"export vllm", "eval"}


def test_json_has_numbers_and_paths(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.eval.report.standing.doubt", lambda results: None)  # random weights only guess
    monkeypatch.setattr("quantpress.eval.report.standing.below", lambda perplexity, text: None)
    project.run()
    recipe, out = str(project.folder / "recipe.yaml"), str(project.out)

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    plan = told("plan", recipe)
    assert (plan["fits"], plan["lacking"]) == (True, None)
    found = told("recommend", out, "--fits", "4GB", "--context", "64")
    assert found["memory_bytes"] == 4_000_000_000
    (run,) = found["runs"]
    assert run["folder"] == found["folder"] == out
    assert run["needed_bytes"] == run["weights_bytes"] + run["cache_bytes"] > run["weights_bytes"] > 0
    assert run["qualifies"] is True
    assert 0 < run["recovery"]["value"] < 1.5
    assert told("report", out) == {"report": f"{out}/report/index.html"}
    assert told("card", out) == {"card": f"{out}/quantized/README.md"}
    assert told("quantize", recipe, "--out", out) == {"artifact": f"{out}/quantized"}


def test_a_plan_says_what_the_machine_lacks(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.core.machine.available_memory_bytes", lambda: 1000)
    done = CliRunner().invoke(app, ["plan", finished.write()])
    assert done.exit_code == 0
    assert "note: the run needs " in done.output
    assert "about 1 minute to quantize on this CPU; the evaluation comes on top\n" in done.output
