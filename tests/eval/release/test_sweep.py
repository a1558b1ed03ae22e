"""Sweeps: what is run, what is not run again, and what becomes of a run that fails."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantpress.cli.app import app
from quantpress.core.errors import BadInput
from quantpress.eval.release.sweep import RunOutcome, SweepRun, in_turn, over_ray, plan_runs, run_all
from quantpress.eval.report.measured_run import SWEEP_STATE
from quantpress.eval.report.page import write_sweep
from quantpress.recipe.loading import parse

from ...forked import run_python
from ...tiny import build, text

# In place of `quantpress run`: counts its calls, and ends as the name of the recipe says.
RUN = """
import json, os, pathlib, signal, sys
recipe = json.loads(pathlib.Path(sys.argv[1]).read_text())
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
calls = out.parent / "calls.txt"
with calls.open("a") as file:
    file.write(recipe["name"] + "\\n")
if recipe["name"] == "refused" and not (out.parent / "mended").exists():
    print("note: on the way", file=sys.stderr)
    sys.exit(print("quantpress: group_size 96 does not divide 512", file=sys.stderr) or 2)
if recipe["name"] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
(out / "eval").mkdir(exist_ok=True)
(out / "eval" / "results.json").write_text("{}")
print(json.dumps({"results": {"gates": {"reason": "max_kl: too much"}}}))
sys.exit(3 if recipe["name"] == "strict" else 0)
"""

# Starts a sweep of one run, ends it, and says how many processes were below it, and how many of them still are.
ENDED = """
import os, psutil, sys, time
from pathlib import Path
from quantpress.eval.release.sweep import SweepRun, run_one
out, run, kind = sys.argv[1:]
parent = os.fork()
if parent == 0:
    run_one(SweepRun("it", (sys.executable, "-c", run), Path(out), "key"))
    os._exit(0)
below, end = [], time.monotonic() + 60
while len(below) < 3 and time.monotonic() < end:
    below = psutil.Process(parent).children(recursive=True)
    time.sleep(0.05)
os.kill(parent, int(kind))
os.waitpid(parent, 0)
print(len(below), len(psutil.wait_procs(below, timeout=30)[1]))
"""


def tasks(out: Path, *names: str, identity: str = "weights", model: str = "a") -> list[SweepRun]:
    recipes = [parse({"name": name}) for name in names]
    return plan_runs(recipes, model, identity, out, ["--ignore-limits"], command=(sys.executable, "-c", RUN))


def calls(out: Path) -> list[str]:
    return (out / "calls.txt").read_text().split()


def test_a_run_that_fails_stops_no_other_and_says_why(tmp_path: Path) -> None:
    told: list[RunOutcome] = []
    ended = run_all(
        tasks(tmp_path / "s", "refused", "killed", "fine", "strict"), tmp_path / "s", in_turn(), told.append
    )
    assert [(one.name, one.status) for one in ended] == [
        ("refused", "failed"), ("killed", "failed"), ("fine", "done"), ("strict", "gate")
    ]  # fmt: skip
    assert told == ended
    assert ended[0].reason == "group_size 96 does not divide 512"
    assert ended[1].reason.startswith("ended by signal 9 (out of memory?); see ")
    assert ended[3].reason == "max_kl: too much"


def test_what_is_finished_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    out = tmp_path / "s"
    names = ("refused", "fine", "strict")
    run_all(tasks(out, *names), out, in_turn(), lambda one: None)
    (out / "mended").touch()
    again = run_all(tasks(out, *names), out, in_turn(), lambda one: None)
    assert calls(out) == ["refused", "fine", "strict", "refused"]
    assert [(one.status, one.reused) for one in again] == [("done", False), ("done", True), ("gate", True)]
    assert again[2].reason == "max_kl: too much"


@pytest.mark.parametrize("change", ["model", "recipe", "results"])
def test_a_finished_run_of_something_else_does_not_count(tmp_path: Path, change: str) -> None:
    out = tmp_path / "s"
    run_all(tasks(out, "fine"), out, in_turn(), lambda one: None)
    others = tasks(out, "fine", identity="other weights" if change == "model" else "weights")
    if change == "recipe":
        recipe = parse({"name": "fine", "method": {"name": "rtn"}})
        others = plan_runs([recipe], "a", "weights", out, ["--ignore-limits"], command=(sys.executable, "-c", RUN))
    if change == "results":
        (out / "fine" / "eval" / "results.json").unlink()
    (one,) = run_all(others, out, in_turn(), lambda one: None)
    assert not one.reused
    assert calls(out) == ["fine", "fine"]


def test_what_was_done_is_on_record_after_each_run(tmp_path: Path) -> None:
    out, seen = tmp_path / "s", []
    run_all(tasks(out, "fine", "strict"), out, in_turn(),
          lambda one: seen.append(len(json.loads((out / SWEEP_STATE).read_text())["runs"])))  # fmt: skip
    assert seen == [1, 2]


def test_another_text_in_the_same_file_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one")
    recipe = parse({"name": "a", "evaluation": {"source": str(tmp_path / "text.txt")}})
    before = plan_runs([recipe], "m", "w", tmp_path / "s")[0].key
    assert plan_runs([recipe], "m", "w", tmp_path / "s")[0].key == before
    (tmp_path / "text.txt").write_text("two")
    assert plan_runs([recipe], "m", "w", tmp_path / "s")[0].key != before


def test_recipes_of_several_models_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(f"model: {file.stem}\n")
    done = CliRunner().invoke(app, ["sweep", *map(str, files), "--out", str(tmp_path / "s")])
    assert str(done.exception) == "a sweep is of one model, and the recipes name a, b; give one with --model"


def test_mistakes_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="two recipes are called fine"):
        tasks(tmp_path / "s", "fine", "fine")
    with pytest.raises(BadInput, match="nothing to compare it by"):
        plan_runs([parse({"name": "blind", "evaluation": None})], "a", "w", tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BadInput, match="holds no sweep"):
        tasks(tmp_path / "mine", "fine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_ray_cluster_does_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    out = tmp_path / "s"
    ended = run_all(tasks(out, "refused", "fine", "strict"), out, over_ray("local", 1, 0), lambda one: None)
    assert [one.status for one in ended] == ["failed", "done", "gate"]
    assert sorted(calls(out)) == ["fine", "refused", "strict"]
    again = run_all(tasks(out, "fine"), out, over_ray("local", 1, 0), lambda one: None)
    assert again[0].reused


@pytest.mark.slow
def test_real_runs_over_ray_write_what_runs_in_turn_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    build("llama", tmp_path / "model", torch.bfloat16)
    for name, words in (("calibration", 4000), ("evaluation", 3000)):
        (tmp_path / f"{name}.txt").write_text(text(words))
    document: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "calibration": {"source": str(tmp_path / "calibration.txt"), "samples": 6, "seq_len": 32},
        "evaluation": {"source": str(tmp_path / "evaluation.txt"), "windows": 4, "window": 32, "new_tokens": 4},
    }
    recipes = [parse(document | {"name": f"int{bits}", "weights": {"bits": bits, "group_size": 32}}) for bits in (4, 3)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which Ray sets for its workers, and which is part of what a run is
    monkeypatch.setenv("QUANTPRESS_CACHE", str(tmp_path / "cache"))
    artifacts, shared = [], []
    for out, fan in ((tmp_path / "in-turn", in_turn()), (tmp_path / "over-ray", over_ray("local", 1, 0))):
        planned = plan_runs(recipes, document["model"], "weights", out, ["--ignore-limits"])
        kept = out / ".shared" / "tokens"
        ended = run_all(planned, out, fan, lambda one, kept=kept: shared.append(any(kept.rglob("tokens.safetensors"))))
        assert [(one.status, one.reason) for one in ended] == [("done", ""), ("done", "")]
        artifacts.append({
            str(file.relative_to(out)): file.read_bytes()
            for file in sorted(out.glob("int*/quantized/*.safetensors"))
        })  # fmt: skip
        page = write_sweep(out, [task.out for task in planned])
        assert page is not None
        assert "2 artifacts compared" in page.read_text(encoding="utf-8")
        assert not (out / ".shared").exists()
    assert shared == [True] * 4
    assert len(artifacts[0]) == 2
    assert artifacts[0] == artifacts[1]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_the_sweep_that_started_it(kind: signal.Signals, tmp_path: Path) -> None:
    """And so does what the run has started itself."""
    sleeper = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    done = run_python(tmp_path, ENDED, [str(tmp_path / "it"), sleeper, str(int(kind))])
    assert done.stdout.split() == ["3", "0"], done.stderr  # the guard, the run, what it runs
