"""The GitHub action and the GitLab template: their shell steps run here as a runner runs them, outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from .tiny import build, text

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
SPEC, TEMPLATE = yaml.safe_load_all((ROOT / "templates" / "quantpress.yml").read_text(encoding="utf-8"))
COMMENT = "<!-- quantpress recipes/tiny.yaml -->"
_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then echo "pip $*" >> "$CALLS"; exit 0; fi
if [ "$2" = "import torch" ]; then exit ${FAKE_TORCH:-0}; fi
exec {python} "$@"
"""
_QUANTPRESS = """#!/bin/sh
for word in "$@"; do printf '<%s>' "$word" >> "$CALLS"; done; echo >> "$CALLS"
exit ${FAKE_CODE:-0}
"""
_GH = """#!/bin/sh
for word in "$@"; do printf '<%s>' "$word" >> "$CALLS"; done; echo >> "$CALLS"
case "$*" in *--paginate*) cat "$COMMENTS";; esac
"""


class Runner:
    """A clean folder with a recipe, and programs on the PATH that write down what they are called with."""

    def __init__(self, folder: Path, *, real: bool = False) -> None:
        self.folder, self.calls = folder / "project", folder / "calls"
        bin = folder / "bin"
        (self.folder / "recipes").mkdir(parents=True)
        bin.mkdir()
        self.calls.touch()
        (folder / "comments").touch()
        (folder / "output").touch()
        real_quantpress = f'#!/bin/sh\nexec {sys.executable} -m quantpress "$@"\n'
        programs = {"python": _PYTHON.replace("{python}", sys.executable), "gh": _GH,
                    "quantpress": real_quantpress if real else _QUANTPRESS}  # fmt: skip
        for name, script in programs.items():
            (bin / name).write_text(script)
            (bin / name).chmod(0o755)
        self.env = {
            "PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(folder), "CALLS": str(self.calls),
            "COMMENTS": str(folder / "comments"), "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_REPOSITORY": "org/it", "QUANTPRESS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.env |= {name: os.environ[name] for name in ("PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}

    def run(self, script: str, env: Mapping[str, str] = {}) -> int:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=self.folder, env=self.env | dict(env)
        ).returncode

    def action(self, given: Mapping[str, str]) -> dict[str, int]:
        """Run the action's shell steps as GitHub does: after one that failed, only those with `always()`."""
        inputs = {name: given.get(name, about.get("default", "")) for name, about in ACTION["inputs"].items()}
        known = {f"inputs.{name}": value for name, value in inputs.items()} | {
            "github.action_path": str(ROOT), "github.token": "token", "github.event.pull_request.number": "7",
            "github.server_url": "https://hub", "github.repository": "org/it", "github.run_id": "1",
        }  # fmt: skip
        codes: dict[str, int] = {}
        for step in ACTION["runs"]["steps"]:
            if "run" in step and (not any(codes.values()) or "always()" in str(step.get("if"))):
                env = {
                    key: re.sub(r"\$\{\{ (.*?) \}\}", lambda m: known[m[1]], value)
                    for key, value in step["env"].items()
                }
                assert "${{" not in step["run"], "an expression in a script is shell injection"
                codes[step["name"]] = self.run(step["run"], env)
        return codes

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


def test_the_action_hands_every_setting_on_as_it_is(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.env["FAKE_TORCH"] = "1"  # there is none yet
    sets = "gates={max_kl: 0.5, max_bytes: 1_000}\n\ncalibration.source=a b'c\"$(touch here).txt\n"
    codes = runner.action({"recipe": "recipes/tiny.yaml", "model": "org/it's", "set": sets, "extras": "tasks"})
    assert set(codes.values()) == {0}
    given = "<--model><org/it's><--set><gates={max_kl: 0.5, max_bytes: 1_000}>"
    given += "<--set><calibration.source=a b'c\"$(touch here).txt>"
    torch = "pip -m pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu"
    assert torch in runner.called()
    assert f"pip -m pip install --quiet quantpress[tasks] @ file://{ROOT}" in runner.called()
    assert f"<plan><recipes/tiny.yaml>{given}" in runner.called()
    assert f"<run><recipes/tiny.yaml><--out><release>{given}" in runner.called()
    assert not (runner.folder / "here").exists()


def test_a_missed_gate_fails_the_action_and_the_comment_is_still_written(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    report = runner.folder / "release" / "report"
    report.mkdir(parents=True)
    (report / "summary.md").write_text("### tiny\n\n![chart](tradeoff.png)\n\nIt is `worse`.\n")
    runner.env["FAKE_CODE"] = "0"
    assert runner.run('FAKE_CODE=3 bash "$ACTION/docs/ci/steps.sh" run', _step("run")) == 3
    assert runner.run('bash "$ACTION/docs/ci/steps.sh" comment', _step("comment")) == 0
    (tmp_path / "comments").write_text("41\n42\n")
    assert runner.run('bash "$ACTION/docs/ci/steps.sh" comment', _step("comment")) == 0
    called = runner.calls.read_text()
    body = f"<body={COMMENT}\n### tiny\n\n\nIt is `worse`.\n\n[Report, chart and measurements](https://hub/1)>"
    assert f"<POST><repos/org/it/issues/7/comments><--field>{body}" in called
    assert f"<PATCH><repos/org/it/issues/comments/41><--field>{body}" in called


def _step(name: str) -> dict[str, str]:
    return {"RECIPE": "recipes/tiny.yaml", "OUT": "release", "ACTION": str(ROOT), "PULL_REQUEST": "7",
            "RUN_URL": "https://hub/1", "GH_TOKEN": name}  # fmt: skip


def test_gitlabs_template_runs_the_same_steps(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "ci", source / "docs" / "ci")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"], ["tag", "v0.1.0"]):
        subprocess.run([*git, *words], cwd=source, check=True)
    given = {name: about.get("default", "") for name, about in SPEC["spec"]["inputs"].items()}
    given |= {"repository": f"file://{source}", "extras": "tasks"}
    job = json.loads(re.sub(r"\$\[\[ inputs\.(\w+) \]\]", lambda m: given[m[1]], json.dumps(TEMPLATE[".quantpress"])))
    assert "/" not in job["cache"]["key"]  # a key may hold none, and a hub id does
    clone = tmp_path / "clone"
    lines = [line.replace("/tmp/quantpress", str(clone)) for line in (*job["before_script"], *job["script"])]
    variables = job["variables"] | {
        "CI_PROJECT_DIR": str(runner.folder),
        "RECIPE": "recipes/tiny.yaml",
        "SET": "gates.strict=true",
    }
    variables = {key: value.replace("$CI_PROJECT_DIR", str(runner.folder)) for key, value in variables.items()}
    assert runner.run("\n".join(lines), variables) == 0
    assert f"pip -m pip install --quiet quantpress[tasks] @ file://{clone}" in runner.called()
    assert "<run><recipes/tiny.yaml><--out><release><--set><gates.strict=true>" in runner.called()


def test_the_examples_use_what_the_action_and_the_template_offer() -> None:
    github = yaml.safe_load((ROOT / "docs" / "ci" / "github.yml").read_text(encoding="utf-8"))
    uses = [step for job in github["jobs"].values() for step in job["steps"] if "quantpress@" in step.get("uses", "")]
    required = {name for name, about in ACTION["inputs"].items() if about.get("required")}
    assert uses
    for step in uses:
        assert required <= set(step["with"]) <= set(ACTION["inputs"])
    assert github["permissions"] == {"contents": "read", "pull-requests": "write"}
    gitlab = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab.yml").read_text(encoding="utf-8"))
    assert set(gitlab["include"][0]["inputs"]) <= set(SPEC["spec"]["inputs"])
    jobs = [job for name, job in gitlab.items() if name != "include"]
    assert all(job["extends"] in TEMPLATE for job in jobs)
    assert all(
        set(job.get("variables", {})) <= {*TEMPLATE[".quantpress"]["variables"], "RECIPE", "GIT_STRATEGY"}
        for job in jobs
    )


def test_the_hook_of_pre_commit_checks_recipes(tmp_path: Path) -> None:
    hook, system = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {key: hook[key] for key in ("entry", "files")} == {key: system[key] for key in ("entry", "files")}
    runner = Runner(tmp_path, real=True)
    good, bad = runner.folder / "recipes" / "good.yaml", runner.folder / "recipes" / "bad.yaml"
    assert re.search(hook["files"], "team/recipes/good.yaml")
    good.write_text("method: rtn\n")
    bad.write_text("methud: rtn\n")
    assert runner.run(f"{hook['entry']} recipes/good.yaml") == 0
    assert runner.run(f"{hook['entry']} recipes/bad.yaml recipes/good.yaml") == 2


@pytest.mark.slow
def test_the_action_makes_a_release_and_stops_a_bad_one(tmp_path: Path) -> None:
    runner = Runner(tmp_path, real=True)
    build("llama", runner.folder / "model", torch.bfloat16)
    (runner.folder / "text.txt").write_text(text())
    recipe = {"model": "model", "method": "rtn", "weights": {"group_size": 32}, "targets": ["vllm"],
              "gates": {"max_kl": 9.0},
              "evaluation": {"source": "text.txt", "windows": 2, "window": 32, "prompts": []}}  # fmt: skip
    (runner.folder / "recipes" / "tiny.yaml").write_text(json.dumps(recipe))
    assert set(runner.action({"recipe": "recipes/tiny.yaml"}).values()) == {0}
    assert "verdict=ACCEPT" in (tmp_path / "output").read_text()
    assert f"<body={COMMENT}\n### tiny: model" in runner.calls.read_text()
    codes = runner.action({"recipe": "recipes/tiny.yaml", "set": "gates.max_kl=0.0"})
    assert codes == {"install": 0, "plan": 0, "run": 3, "comment": 0}
    assert "verdict=REGRESSION" in (tmp_path / "output").read_text()
