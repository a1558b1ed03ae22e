"""Every tensor of the original is quantized, kept for a reason that is said, or copied."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.artifact.manifest import read_manifest
from quantpress.engine.accounting import account
from quantpress.exports.verify import structure
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ... import tiny
from .test_pipeline import make

CPU = torch.device("cpu")
EXTRA = "model.layers.9.eh_proj.weight"
RECIPE = {"weights": {"bits": 4, "group_size": 32, "symmetric": True}, "method": {"name": "rtn"}}


def test_tensors_beyond_the_model_are_said_at_plan_and_copied(tmp_path: Path) -> None:
    tiny.build("qwen3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = torch.randn(64, 128)
    save_file(load_file(file) | {EXTRA: extra}, file)
    skeleton = Skeleton(Checkpoint(tmp_path / "model"), device=CPU)
    (line,) = account(skeleton, skeleton.linears(), {})
    assert line.startswith(f"{EXTRA}: ")
    make(tmp_path / "run", tmp_path / "model", RECIPE)
    torch.testing.assert_close(load_file(tmp_path / "run/quantized/model.safetensors")[EXTRA], extra, rtol=0, atol=0)
    manifest = read_manifest(tmp_path / "run")
    assert manifest.kept == (EXTRA,)
    assert line in manifest.fallbacks
    assert structure(tmp_path / "run/quantized") == []


def test_a_tensor_whose_name_the_artifact_needs_is_left_out(tmp_path: Path) -> None:
    tiny.build("qwen3", tmp_path / "model")
    file, stray = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight_scale"
    save_file(load_file(file) | {stray: torch.ones(64, 1)}, file)
    manifest = make(tmp_path / "run", tmp_path / "model", RECIPE)
    assert [n for n in manifest.fallbacks if n.startswith(f"{stray}: left out, the artifact needs the name")]
    assert manifest.kept == ()
    assert structure(tmp_path / "run/quantized") == []


def test_experts_that_cannot_be_split_are_named_with_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("qwen3_moe", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    assert account(skeleton, skeleton.linears(), {}) == ()
    monkeypatch.setattr("quantpress.models.placed_model.split_experts", lambda block, names_of: {})
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    lines = account(skeleton, skeleton.linears(), {})
    inside = sum(x.out_features * x.in_features for x in skeleton.linears())
    share = inside / (inside + 2 * (4 * 64 + 4 * 3 * 64 * 32))
    assert lines[0] == f"only {share:.0%} of the blocks' weights are in layers that can be quantized"
    assert any(
        line.startswith("model.layers.*.mlp.experts.gate_up_proj stays in 16 bit (2 tensors, 32768 weights)")
        for line in lines
    )
