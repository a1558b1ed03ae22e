"""What TGI's own loader code makes of our files, beside its table: refused or loaded alike, with equal weights.

    make setup-loaders && .venv/bin/pytest tests/slow/test_tgi.py

It runs with the transformers and compressed-tensors of TGI's container; its CUDA kernels are left out.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantpress.artifact.artifact import Artifact
from quantpress.exports.load_check import will_load
from quantpress.exports.servers.tgi import LOADER, Tgi
from quantpress.numbers.types import Grid

from .. import tiny
from ..quantize.formats.artifacts import make, uniform
from .loaders import asked
from .loaders.files import CT, WIDE
from .loaders.files import FILES as COMMON

FILES = COMMON | {
    "awq, symmetric": ("awq", Grid(group_size=64), None),
}
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
THETA = 50_000.0
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose linears Marlin takes."""
    sizes = WIDE | {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    monkeypatch.setitem(tiny.FAMILIES, "wide", ("LlamaConfig", tiny._LLAMA | sizes))


@pytest.mark.parametrize("kind", FILES)
def test_its_loader_agrees_with_the_table(kind: str, tmp_path: Path) -> None:
    format, grid, inputs = FILES[kind]
    make(tmp_path / "it", format, uniform(grid), family="wide", spec=inputs)
    said = asked("tgi", "tgi", str(tmp_path / "it"), str(tmp_path / "out"), source=True)
    assert {name: said[name] for name in LOADER.inside} == LOADER.inside
    assert said["rope_theta"] == THETA
    contract = will_load(tmp_path / "it", Tgi(), way="contract")
    assert contract.loads == (not said["why"]), (contract.reason, said["why"])
    if said["why"]:
        return
    ours, theirs = Artifact(tmp_path / "it"), load_file(tmp_path / "out")
    for name, parts in FUSED.items():
        whole = torch.cat([ours.read(f"model.layers.0.{part}.weight").float() for part in parts])
        torch.testing.assert_close(theirs[name], whole, rtol=0.01, atol=1e-4)  # ours is rounded to bfloat16


def test_sides_that_its_kernel_has_no_threads_for_are_refused_by_both(tmp_path: Path) -> None:
    make(tmp_path / "it", CT, uniform(Grid(group_size=32)))
    said = asked("tgi", "tgi", str(tmp_path / "it"), str(tmp_path / "out"), source=True)
    assert "thread configuration" in said["why"]
    assert "multiples" in will_load(tmp_path / "it", Tgi(), way="contract").reason
