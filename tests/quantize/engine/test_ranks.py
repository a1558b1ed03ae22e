"""One run shared by several processes: the bytes of a single one, and an end in one line."""

import json
import re
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.core.ranks import Ranks
from quantpress.engine import shared_run
from quantpress.engine.pipeline import prepare
from quantpress.engine.sources import resolve
from quantpress.recipe.loading import parse

from ...forked import Done
from ...tiny import build, text
from ...together import Step, runs

INT4: dict[str, Any] = {"weights": {"bits": 4, "group_size": 32}, "head": {"bits": 8, "group_size": 32}}
STATIC: dict[str, Any] = {
    "weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}, "transforms": [{"name": "awq"}], "kv_cache": "fp8",
    "targets": [{"name": "vllm"}],
}  # fmt: skip
SHARED = {"dense": ("qwen3", INT4), "experts": ("qwen3_moe", INT4), "static": ("qwen2_moe", STATIC)}
KILL = """
import os, signal, quantpress.engine.blocks as b
block = b._Run.block
def dies(self, k, *rest):
    if k == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    block(self, k, *rest)
b._Run.block = dies
"""
DUMP = "import quantpress.engine.journal as j; j.DUMP_SECONDS, j.DUMP_SHARE = 0, 1e9\n"


def step(place: Path, out: str, name: str, size: int, **more: Any) -> Step:
    family, document = SHARED[name]
    (place / "text.txt").write_text(text(12000))
    if not (place / family).exists():
        build(family, place / family, torch.bfloat16)
    calibration = {"source": str(place / "text.txt"), "samples": 18, "seq_len": 128}
    recipe = place / f"{out}.yaml"
    recipe.write_text(json.dumps({"name": "shared", "calibration": calibration} | document))
    return Step(size, ["quantize", str(recipe), "--model", str(place / family), "--out", str(place / out)], **more)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Done]]]:
    """How the runs of a dense model ended: all of them out of one start of Python."""
    place = tmp_path_factory.mktemp("runs")
    dump = {0: DUMP}
    steps = {
        "1": step(place, "1", "dense", 1),
        "4": step(place, "4", "dense", 4),
        "killed": step(place, "cut", "dense", 2, codes=dump | {1: KILL}),
        "resumed": step(place, "cut", "dense", 3, codes=dump),
        "other-files": step(place, "files", "dense", 2, own={1: ["--model", str(place / "other")]}),
    }
    shutil.copytree(place / "qwen3", place / "other")
    weights = place / "other" / "model.safetensors"
    changed = {n: t + 1 if "norm" in n else t for n, t in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    return place, runs(place, steps)


def artifact(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "quantized").iterdir())}


def check_equal(place: Path, done: dict[str, list[Done]], sizes: Iterable[int]) -> None:
    for size in sizes:
        leader, *others = done[str(size)]
        assert leader.returncode == 0, leader
        assert [(one.returncode, one.stdout, one.stderr) for one in others] == [(0, "", "")] * (size - 1)
        assert artifact(place / str(size)) == artifact(place / "1")


def test_four_processes_make_the_bytes_of_one(ended: tuple[Path, dict[str, list[Done]]]) -> None:
    check_equal(*ended, (1, 4))
    assert "lm_head.weight_packed" in load_file(ended[0] / "4" / "quantized" / "model.safetensors")  # by all samples


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("dense", (2, 3)), ("experts", (2, 4)), ("static", (2, 4))])
def test_any_number_of_processes_makes_the_bytes_of_one(name: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    steps = {str(size): step(tmp_path, str(size), name, size) for size in (1, *sizes)}
    check_equal(tmp_path, runs(tmp_path, steps), (1, *sizes))


def test_a_process_that_dies_ends_all_and_another_number_of_them_goes_on(
    ended: tuple[Path, dict[str, list[Done]]],
) -> None:
    place, done = ended
    leader, other = done["killed"]
    assert other.returncode == -signal.SIGKILL
    assert leader.returncode == 1
    assert leader.stderr.splitlines()[-1].startswith("quantpress: another process of the run has ended")
    assert [one.returncode for one in done["resumed"]] == [0, 0, 0], done["resumed"]
    assert "block 1/2" not in done["resumed"][0].stderr
    assert artifact(place / "cut") == artifact(place / "1")


def test_processes_that_see_other_files_are_refused_in_one_line(ended: tuple[Path, dict[str, list[Done]]]) -> None:
    leader, other = ended[1]["other-files"]
    assert leader.returncode == 2
    assert leader.stderr == (
        "quantpress: process 1 of the run sees another model.safetensors than the first; give all of them the same "
        "model\n"
    )
    assert other.returncode
    assert not other.stderr


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": {"name": "rtn"}}, "method rtn without calibration is not shared between processes; run it with"),
        ({"method": {"name": "autoround"}}, "method autoround trains in one process; run it with one process"),
        ({"calibration": {"samples": 8, "seq_len": 128}}, "3 processes for 8 samples of 128 tokens, which are summed "
         "up in 2 parts (at most 8): use at most 2"),
    ],
)  # fmt: skip
def test_what_is_not_shared_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    build("qwen3", tmp_path / "model")
    recipe = parse(INT4 | {"model": str(tmp_path / "model"), "calibration": {"samples": 18, "seq_len": 128}} | changes)
    job = prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache"))

    def check(ranks: Ranks) -> None:
        shared_run.check(job, ranks)
        shared_run.check_count(job, ranks)

    check(Ranks())
    with pytest.raises(BadInput, match=re.escape(why)):
        check(Ranks(0, 3))
