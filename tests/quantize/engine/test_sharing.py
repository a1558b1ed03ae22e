"""What runs share: each writes the bytes it writes alone, and what one has computed no other computes again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.calibrate import stages
from quantpress.calibrate.tokens import Tokens
from quantpress.engine import blocks, pipeline
from quantpress.engine.pipeline import Job, Settings, prepare, quantize
from quantpress.engine.rounding import round_stage
from quantpress.engine.sharing import Shared, kept_bytes
from quantpress.engine.sources import resolve
from quantpress.gguf import imatrix
from quantpress.recipe.loading import parse

from ...tiny import build, text

W4 = {"weights": {"bits": 4, "group_size": 32, "symmetric": False}}
W3 = {"weights": {"bits": 3, "group_size": 32, "symmetric": False}}
TUNED = W3 | {"method": {"name": "autoround", "steps": 4, "batch_size": 2}}


def prepared(folder: Path, document: dict[str, Any]) -> Job:
    file = folder / "calibration.txt"
    file.write_text(text())
    calibration = {"samples": 6, "seq_len": 32, "source": str(file)} | document.get("calibration", {})
    recipe = parse(document | {"calibration": calibration, "model": str(folder / "model")})
    return prepare(recipe, resolve(recipe.model, cache=folder / "cache"))


def run(folder: Path, document: dict[str, Any], shared: Shared | None = None) -> dict[str, bytes]:
    """The artifact's files."""
    out = folder / f"run{sum(1 for _ in folder.glob('run*'))}"
    quantize(prepared(folder, document), Settings(out, folder / "cache", shared=shared or Shared()))
    return {path.name: path.read_bytes() for path in sorted((out / "quantized").iterdir())}


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "manifest.json"}


class Counted:
    """Counts the batches that run through a block beside its rounded self."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        make = stages.Stages._original_runs

        def counted(of: Any) -> Any:
            runs = make(of)
            self.batches += len(runs)
            return runs

        monkeypatch.setattr(stages.Stages, "_original_runs", counted)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2_moe", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "gemma3"))]
)
def test_runs_that_share_write_the_same_bytes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    more = {"formats": ["gptq"] if family == "gpt2" else ["compressed-tensors"]}
    monkeypatch.setattr("quantpress.engine.blocks.BATCH_TOKENS", 128)  # two batches: of four samples and of two
    shared = Shared(tmp_path / "shared", 1 << 30)
    counted = Counted(monkeypatch)
    alone = [run(tmp_path, one | more) for one in (W4, W3)]
    once = counted.batches // 2
    together = [run(tmp_path, one | more, shared) for one in (W4, W3)]
    assert [weights(files) for files in together] == [weights(files) for files in alone]
    assert counted.batches == 3 * once
    kept = sum(file.stat().st_size for file in (tmp_path / "shared").glob("original/*/*/*.bin"))
    assert kept == kept_bytes(prepared(tmp_path, W4 | more))


def test_a_tuned_run_takes_the_originals_outputs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    alone, shared = run(tmp_path, TUNED), Shared(tmp_path / "shared", 1 << 30)
    run(tmp_path, W4, shared)  # does not need the last block's outputs
    counted = Counted(monkeypatch)
    assert weights(run(tmp_path, TUNED, shared)) == weights(alone)
    assert counted.batches == 1  # of the last block
    assert weights(run(tmp_path, TUNED, shared)) == weights(alone)
    assert counted.batches == 1


def test_where_the_limit_is_reached_the_original_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    alone, told = run(tmp_path, W3), []
    limit = int(0.7 * kept_bytes(prepared(tmp_path, W3)))
    shared = Shared(tmp_path / "shared", limit, told.append)
    for document in (W4, W3):
        files = run(tmp_path, document, shared)
    assert weights(files) == weights(alone)
    assert told[0].startswith("the original's activations are kept for other runs up to block 1: the next takes ")
    assert sum(file.stat().st_size for file in (tmp_path / "shared").glob("original/*/*/*.bin")) <= limit
    counted = Counted(monkeypatch)
    run(tmp_path, W4, shared)
    assert counted.batches == 1


@pytest.mark.parametrize(
    ("document", "again"),
    [
        ({"transforms": [{"name": "awq", "points": 3}]}, 2),  # scales what the linears receive
        ({"transforms": [{"name": "hadamard"}]}, 2),
        ({"calibration": {"samples": 5}}, 2),
        ({"ignore": ["*.q_proj"]}, 0),  # k and v receive the same
        ({"activations": {"type": "int8"}, "weights": {"bits": 8, "group_size": -1}}, 0),
        ({"method": {"name": "gptq", "error_correction": 0}}, 0),
    ],
)
def test_only_what_is_the_same_is_shared(
    document: dict[str, Any], again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    alone, shared = run(tmp_path, W4 | document), Shared(tmp_path / "shared", 1 << 30)
    run(tmp_path, W3, shared)
    counted = Counted(monkeypatch)
    assert weights(run(tmp_path, W4 | document, shared)) == weights(alone)
    assert counted.batches == again


def test_another_model_does_not_get_this_ones(tmp_path: Path) -> None:
    shared, files = Shared(tmp_path / "shared", 1 << 30), []
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        build("llama", folder / "model", torch.bfloat16, seed)
        files.append((run(folder, W4, shared), run(folder, W4)))
    for together, alone in files:
        assert weights(together) == weights(alone)


def test_a_run_that_is_stopped_leaves_no_half_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    alone, shared = run(tmp_path, W4), Shared(tmp_path / "shared", 1 << 30)
    seen = 0

    def stopped(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:  # in the middle of the second block
            raise KeyboardInterrupt
        round_stage(*args)

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "round_stage", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, W4, shared)
    assert [place.name for place in (tmp_path / "shared").glob("original/*/*")] == ["00000"]
    assert weights(run(tmp_path, W4, shared)) == weights(alone)


def test_text_the_model_writes_itself_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    itself = {"calibration": {"source": "self"}}
    alone, shared = run(tmp_path, W3 | itself), Shared(tmp_path / "shared", 0)
    run(tmp_path, W4 | itself, shared)
    monkeypatch.setattr(pipeline, "generated_tokens", lambda *args: pytest.fail("written again"))
    files = run(tmp_path, W3 | itself, shared)
    assert weights(files) == weights(alone)
    told = [json.loads(one["manifest.json"])["calibration"] for one in (files, alone)]
    assert told[0] == told[1]


def test_an_importance_matrix_is_measured_once(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    job, shared = prepared(tmp_path, W4), Shared(tmp_path / "shared", 0)
    tokens = Tokens(torch.arange(192).view(6, 32), "numbers", False)
    sums, counts = np.float32([[0.1, 1e-30, 3e7], [0, 0, 0]]), np.float32([192, 0])
    for make in (lambda: {"blk.0.ffn_up.weight": imatrix.Importance(sums, counts)}, lambda: pytest.fail("again")):
        found = shared.importance(job, tokens, make)["blk.0.ffn_up.weight"]
        assert (found.sums == sums).all()
        assert (found.counts == counts).all()
