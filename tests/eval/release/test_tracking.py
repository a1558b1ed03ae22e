"""One line a run for experiment trackers, each tried without a network where it is installed."""

import json
from pathlib import Path

import pytest

from quantpress.core.errors import BadInput
from quantpress.eval.release.tracking import Line, lines, log_runs

from ..report.test_report import fake_manifest, fake_results, five_runs, write_run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    five_runs(tmp_path / "s", blocks=1)
    return tmp_path / "s"


def test_a_line_holds_recipe_figures_and_verdict(sweep: Path) -> None:
    found = {line.name: line for line in lines([sweep])}
    assert len({line.identity for line in found.values()}) == 5
    one = found["int4-gptq-g64"]
    assert one.metrics["perplexity"] == 18.39
    assert one.metrics["perplexity_change"] == pytest.approx(18.39 / 17.05 - 1)
    assert one.metrics["bytes"] == 114_000_000
    assert one.params["method.name"] == "gptq"
    assert one.tags["scheme"] == "int4 g64 asym, gptq"
    assert one.tags["level"] == "look closer"
    assert all(isinstance(value, float) for value in one.metrics.values())
    assert lines([sweep]) == list(found.values())


def test_no_path_of_this_machine_is_logged(tmp_path: Path) -> None:
    manifest = fake_manifest(blocks=1)
    manifest["recipe"] |= {"model": str(tmp_path / "secret" / "m")}
    manifest["recipe"]["calibration"] |= {"source": str(tmp_path / "secret" / "chats.jsonl")}
    (line,) = lines([write_run(tmp_path / "r", manifest, fake_results(18.4, "NONE"))])
    assert line.params["calibration.source"] == "chats.jsonl"
    assert str(tmp_path) not in json.dumps(vars(line))


def test_what_cannot_be_logged_is_one_line(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="known are mlflow, wandb"):
        log_runs([sweep], "tensorboard", "p")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'quantpress\[mlflow\]'"):
        log_runs([sweep], "mlflow", "p")
    monkeypatch.undo()

    def refused(some: list[Line], project: str) -> None:
        raise RuntimeError("no\nlogin")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("quantpress.eval.release.tracking.TRACKERS", {"mlflow": refused})
    with pytest.raises(BadInput, match="--to mlflow: no login"):
        log_runs([sweep], "mlflow", "p")


def test_mlflow_has_a_run_for_each_and_the_same_when_logged_again(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (the extra `mlflow`)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    log_runs([sweep], "mlflow", "ours")
    log_runs([sweep], "mlflow", "ours")
    there = mlflow.search_runs(experiment_names=["ours"], output_format="list")
    assert len(there) == 5
    (one,) = [run for run in there if run.info.run_name == "int4-gptq-g64"]
    assert one.data.metrics["perplexity"] == 18.39
    assert one.data.params["method.name"] == "gptq"
    assert one.data.tags["level"] == "look closer"


def test_wandb_writes_a_line_for_each_offline(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (the extra `wandb`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    found = log_runs([sweep], "wandb", "ours")
    for line in found:
        (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{line.identity}/run-{line.identity}.wandb")
        written = file.read_bytes()
        assert b"kl_mean" in written
        assert str(line.metrics["perplexity"]).encode() in written
        assert str(tmp_path).encode() not in written
