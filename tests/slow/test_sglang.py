"""What SGLang's own quantization classes make of our files, beside its table: refused or loaded alike, with room for
each tensor that the files hold.

    make setup-loaders && .venv/bin/pytest tests/slow/test_sglang.py

Its kernels, and the rest of its server, are left out.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantpress.artifact.artifact import Artifact
from quantpress.exports.load_check import will_load
from quantpress.exports.servers.sglang import Sglang
from quantpress.numbers.types import Activations, Grid

from .. import tiny
from ..quantize.formats.artifacts import make, uniform
from .loaders import asked
from .loaders.files import CT, STATIC, WIDE
from .loaders.files import FILES as COMMON

NVFP4 = Activations(type="nvfp4")
FILES = COMMON | {
    "nvfp4, inputs": (CT, Grid(type="nvfp4"), NVFP4),
    "modelopt, fp8": ("modelopt", Grid(type="fp8", group_size=0), STATIC),
    "modelopt, nvfp4": ("modelopt", Grid(type="nvfp4"), NVFP4),
    "modelopt, nvfp4 weights": ("modelopt", Grid(type="nvfp4"), None),
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
UNSAID = {"input_scale"}  # of weights alone: it makes room for it, and does not use it
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose linears Marlin takes."""
    monkeypatch.setitem(tiny.FAMILIES, "wide", ("LlamaConfig", tiny._LLAMA | WIDE))


@pytest.mark.parametrize("kind", FILES)
def test_its_classes_agree_with_the_table(kind: str, tmp_path: Path) -> None:
    format, grid, inputs = FILES[kind]
    make(tmp_path / "it", format, uniform(grid), family="wide", spec=inputs)
    shapes = {name: list(shape) for name, shape in Artifact(tmp_path / "it").shapes.items()}
    said = asked("sglang", "sglang", str(tmp_path / "it"), json.dumps(shapes))
    contract = will_load(tmp_path / "it", Sglang(), way="contract")
    assert contract.loads == (not said["why"]), (contract.reason, said["why"])
    held = {
        name: tensor for file in (tmp_path / "it").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for fused, room in said["room"].items():
        folder, _, name = fused.partition(".")
        parts = [f"model.layers.0.{folder}.{part}" for part in PARTS.get(name, (name,))]
        of_files = {key.rpartition(".")[2] for key in held if key.rpartition(".")[0] == parts[0]}
        assert of_files <= room.keys() <= of_files | UNSAID
        for suffix in of_files:
            shape, dtype = room[suffix]
            tensors = [held[f"{part}.{suffix}"] for part in parts]
            assert fits(tensors, shape), (fused, suffix, shape, tensors[0].shape)
            assert dtype == str(tensors[0].dtype) or ("scale" in suffix and not dtype.startswith("torch.float8"))


def fits(tensors: list[torch.Tensor], shape: list[int]) -> bool:
    """Whether these are what a fused layer's parameter is loaded from: beside each other, one number each, or (g_idx,
    weight_shape) one after the other in the same place."""
    first = tensors[0]
    if first.numel() == 1:
        return shape == [len(tensors)]
    beside = [[*first.shape[:d], sum(t.shape[d] for t in tensors), *first.shape[d + 1 :]] for d in range(first.dim())]
    return shape in [list(first.shape), *beside]
