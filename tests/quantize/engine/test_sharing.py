"""What runs share: each writes the bytes it writes alone, and what one has computed no other computes again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.calibrate.tokens import Tokens
from quantpress.core import machine
from quantpress.engine import pipeline, sharing
from quantpress.engine.pipeline import Job, Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.gguf import imatrix
from quantpress.recipe.loading import parse

from ...tiny import build, text

W4 = {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}
W3 = {"weights": {"bits": 3, "group_size": 32, "symmetric": False}}


def prepared(folder: Path, document: dict[str, Any]) -> Job:
    file = folder / "calibration.txt"
    file.write_text(text())
    calibration = {"samples": 6, "seq_len": 32, "source": str(file)} | document.get("calibration", {})
    recipe = parse(document | {"calibration": calibration, "model": str(folder / "model")})
    return prepare(recipe, resolve(recipe.model, cache=folder / "cache"))


def run(folder: Path, document: dict[str, Any], share: Path | None = None) -> dict[str, bytes]:
    """The artifact's files."""
    out = folder / f"run{sum(1 for _ in folder.glob('run*'))}"
    quantize(prepared(folder, document), Settings(out, folder / "cache", share=share))
    return {path.name: path.read_bytes() for path in sorted((out / "quantized").iterdir())}


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "manifest.json"}


def test_runs_that_share_write_the_same_bytes(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    alone = [run(tmp_path, one) for one in (W4, W3)]
    together = [run(tmp_path, one, tmp_path / "shared") for one in (W4, W3)]
    assert [weights(files) for files in together] == [weights(files) for files in alone]
    assert len(list((tmp_path / "shared" / "tokens").iterdir())) == 1


def test_text_the_model_writes_itself_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    itself = {"calibration": {"source": "self"}}
    alone = run(tmp_path, W3 | itself)
    run(tmp_path, W4 | itself, tmp_path / "shared")
    monkeypatch.setattr(pipeline, "generated_tokens", lambda *args: pytest.fail("written again"))
    files = run(tmp_path, W3 | itself, tmp_path / "shared")
    assert weights(files) == weights(alone)
    told = [json.loads(one["manifest.json"])["calibration"] for one in (files, alone)]
    assert told[0] == told[1]


def measured(count: int, asked: list[int]) -> dict[str, imatrix.Importance]:
    """An importance matrix that is told apart by `count`; notes that it was measured."""
    asked.append(count)
    sums, counts = np.float32([[0.1, 1e-30, 3e7], [0, 0, 0]]), np.float32([count, 0])
    return {"blk.0.ffn_up.weight": imatrix.Importance(sums, counts)}


def test_an_importance_matrix_is_measured_once(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    job, asked = prepared(tmp_path, W4), list[int]()
    tokens = Tokens(torch.arange(192).view(6, 32), "numbers", False)
    for count in (192, 7):
        found = sharing.importance(tmp_path / "shared", job, tokens, lambda count=count: measured(count, asked))
        want = measured(192, [])["blk.0.ffn_up.weight"]
        assert (found["blk.0.ffn_up.weight"].sums == want.sums).all()
        assert (found["blk.0.ffn_up.weight"].counts == want.counts).all()
    assert asked == [192]


@pytest.mark.parametrize("other", ["text", "shape", "model", "dtype", "torch", "transformers", "device", "threads"])
def test_an_importance_matrix_of_something_else_is_not_taken(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    job, ids, asked = prepared(tmp_path, W4), torch.arange(192).view(6, 32), list[int]()
    tokens = Tokens(ids, "numbers", False)
    sharing.importance(tmp_path / "shared", job, tokens, lambda: measured(1, asked))
    if other in ("torch", "transformers", "device", "threads"):
        now = machine.numerics(torch.device("cpu"))
        monkeypatch.setattr(machine, "numerics", lambda where: now | {other: "another"})
    elif other == "dtype":
        job.skeleton.dtype = torch.float32
    elif other == "model":
        build("llama", tmp_path / "model", torch.bfloat16, seed=1)
    tokens = Tokens({"text": ids + 1, "shape": ids.view(3, 64)}.get(other, ids), "numbers", False)
    sharing.importance(tmp_path / "shared", job, tokens, lambda: measured(2, asked))
    assert asked == [1, 2]
