"""Whatever the files of a model hold: `plan` reads or refuses it in one line, soon, and never with a traceback."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from ...forked import commands
from ...hostile_models import QUICK, Try, random_try, tries
from ...tiny import build

_RECIPE = "method: rtn\nweights: {bits: 4, group_size: 32}\n"
_LIMIT = """
import resource, signal
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # ends what computes, and what waits, without end
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(300)
"""
_BATCH = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    build("llama", folder, torch.bfloat16)
    return folder


def outcomes(model: Path, work: Path, chosen: Mapping[str, Try]) -> Counter[str]:
    """How many were planned and refused; fails for what does neither, with its name and what was said."""
    (work / "recipe.yaml").write_text(_RECIPE)
    names, counts, wrong = list(chosen), Counter[str](), []
    for first in range(0, len(names), _BATCH):
        steps = []
        for i, name in enumerate(names[first : first + _BATCH]):
            shutil.copytree(model, folder := work / f"model-{i}")
            chosen[name](folder)
            template = ["--set", "calibration.chat_template=true", "--set", "method=gptq"] if "template" in name else []
            steps.append((_LIMIT, ["plan", str(work / "recipe.yaml"), "--model", str(folder), *template]))
        for name, done in zip(names[first:], commands(work, steps), strict=False):
            kind = {0: "planned", 2: "refused"}.get(done.returncode, "neither")
            counts[kind] += 1
            one_line = (
                done.stderr.count("\n") == 1 and len(done.stderr) < 2000 and done.stderr.startswith("quantpress:")
            )
            if kind == "neither" or (kind == "refused" and not one_line):
                wrong.append(f"{name}: {done.returncode} {done.stderr[-300:]}")
        for folder in work.glob("model-*"):
            shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    return counts


def test_each_kind_of_wrong_file_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    table = tries(model)
    counts = outcomes(model, tmp_path, {name: table[name] for name in QUICK})
    assert counts["refused"] >= len(QUICK) - 6, counts  # a few are harmless


@pytest.mark.slow
def test_every_wrong_file(model: Path, tmp_path: Path, tell: Callable[[str], None]) -> None:
    counts = outcomes(model, tmp_path, tries(model))
    tell(f"wrong files of a model: {dict(counts)}")
    assert counts["refused"] > counts["planned"]


@pytest.mark.slow
def test_random_changes_of_files(model: Path, tmp_path: Path, tell: Callable[[str], None]) -> None:
    counts = outcomes(model, tmp_path, {f"seed {seed}": random_try(seed) for seed in range(500)})
    tell(f"random changes of a model's files: {dict(counts)}")
    assert counts["refused"] > 100
