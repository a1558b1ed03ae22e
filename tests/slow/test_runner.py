"""Pipelines of users, step by step as a runner runs them: a clean folder, a plain shell, and an environment of its own
in which the action's own install step puts the built wheel. What is left out: containers, caches, uploads, the hub."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from quantpress.eval.measure.reference_texts import PARAGRAPHS

from .. import trained
from ..test_ci import COMMENT, ROOT, SPEC, TEMPLATE, Runner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("quantize", "eval", "export", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return next(out.glob("quantpress-*.whl"))


class Installed(Runner):
    """A runner whose Python is a new environment that sees the packages of this one, but not the checkout."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        super().__init__(folder, real=True)
        for name in ("python", "quantpress"):  # the real ones
            (folder / "bin" / name).unlink()
        venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        packages = next(venv.glob("lib/python*/site-packages"))
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            self.env.pop(name, None)
        self.env["PATH"] = f"{folder / 'bin'}:{venv / 'bin'}:{self.env['PATH']}"
        self.env["VERSION"] = self.version = f"quantpress @ file://{wheel}"
        trained.build(self.folder / "model")  # one that has learnt nothing may not be published
        (self.folder / "text.txt").write_text(f"{PARAGRAPHS[0][:160]}\n" * 20)
        recipe = {"model": "model", "method": "rtn", "weights": {"group_size": 32}, "targets": ["vllm"],
                  "gates": {"max_kl": 9.0},
                  "evaluation": {"source": "text.txt", "windows": 2, "window": 32, "prompts": []}}  # fmt: skip
        (self.folder / "recipes" / "tiny.yaml").write_text(json.dumps(recipe))

    def publish(self, lines: list[str]) -> None:
        """The last job of an example, up to the upload itself."""
        for line in lines:
            shown = re.sub(r" --message \S+", "", line.replace(" --yes", ""))
            assert self.run(shown) == 0, shown


def test_the_action_then_the_publishing_job_of_the_example(wheel: Path, tmp_path: Path) -> None:
    runner = Installed(tmp_path, wheel)
    given = {"recipe": "recipes/tiny.yaml", "version": runner.version}
    assert runner.action(given) == {"install": 0, "plan": 0, "run": 0, "comment": 0}
    where = "import pathlib, quantpress as q; print(pathlib.Path(q.__file__).is_relative_to(pathlib.Path.cwd().parent))"
    assert runner.run(f'test "$(python -P -c "{where}")" = True') == 0
    assert "verdict=ACCEPT" in (tmp_path / "output").read_text()
    assert f"<body={COMMENT}\n### tiny: model" in runner.calls.read_text()
    assert (runner.folder / "release" / "report" / "index.html").is_file()
    example = yaml.safe_load((ROOT / "docs" / "ci" / "github.yml").read_text(encoding="utf-8"))
    lines = [
        step["run"] for step in example["jobs"]["publish"]["steps"] if step.get("run", "").startswith("quantpress")
    ]
    assert len(lines) == 2
    runner.publish(lines)
    codes = runner.action(given | {"set": "gates.max_kl=0.0"})
    assert codes == {"install": 0, "plan": 0, "run": 3, "comment": 0}
    assert "verdict=REGRESSION" in (tmp_path / "output").read_text()


def test_gitlabs_component_then_the_publishing_job_of_the_example(wheel: Path, tmp_path: Path) -> None:
    runner = Installed(tmp_path, wheel)
    source, clone = tmp_path / "source", tmp_path / "clone"
    shutil.copytree(ROOT / "docs" / "ci", source / "docs" / "ci")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    given = {name: about.get("default", "") for name, about in SPEC["spec"]["inputs"].items()}
    given["repository"] = f"file://{source}"
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"], ["tag", given["version"]]):
        subprocess.run([*git, *words], cwd=source, check=True)
    job = json.loads(re.sub(r"\$\[\[ inputs\.(\w+) \]\]", lambda m: given[m[1]], json.dumps(TEMPLATE[".quantpress"])))
    lines = [line.replace("/tmp/quantpress", str(clone)) for line in (*job["before_script"], *job["script"])]
    variables = {k: v.replace("$CI_PROJECT_DIR", str(runner.folder)) for k, v in job["variables"].items()}
    assert runner.run("\n".join(lines), variables | {"RECIPE": "recipes/tiny.yaml"}) == 0
    for path in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (runner.folder / path).exists(), path
    example = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab.yml").read_text(encoding="utf-8"))
    runner.publish(example["publish"]["script"])
