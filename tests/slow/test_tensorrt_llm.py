"""What TensorRT-LLM's own readers make of the configs of our files, beside its table.

    make setup-loaders && .venv/bin/pytest tests/slow/test_tensorrt_llm.py

They are two of its files; the model code behind them needs its compiled library.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from quantpress.artifact.artifact import Artifact
from quantpress.exports.load_check import will_load
from quantpress.exports.servers.tensorrt_llm import TensorRtLlm
from quantpress.numbers.types import Activations, Grid

from .. import tiny
from ..quantize.formats.artifacts import make, uniform
from .loaders import asked
from .loaders.files import CT, FP8, STATIC, WIDE

TENSOR, NVFP4 = Grid(type="fp8", group_size=0), Activations(type="nvfp4")
FILES: dict[str, tuple[str, Any, Activations | None, str]] = {  # the last: the algorithm that it takes it for
    "fp8": ("modelopt", TENSOR, STATIC, "FP8"),
    "fp8, rows": ("modelopt", Grid(type="fp8"), FP8, "FP8_PER_CHANNEL_PER_TOKEN"),
    "nvfp4": ("modelopt", Grid(type="nvfp4"), NVFP4, "NVFP4"),
    "int4": ("modelopt", Grid(group_size=64), None, "W4A16_AWQ"),
    "int8": ("modelopt", Grid(bits=8, group_size=-1), None, "W8A16"),
    "ct, fp8": (CT, Grid(type="fp8"), FP8, "FP8_PER_CHANNEL_PER_TOKEN"),
    "ct, fp8 static": (CT, Grid(type="fp8"), STATIC, ""),
    "ct, nvfp4": (CT, Grid(type="nvfp4"), NVFP4, "NVFP4"),
    "ct, nvfp4 weights": (CT, Grid(type="nvfp4"), None, ""),
    "ct, int4": (CT, Grid(group_size=32), None, ""),
}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that groups of 64 divide."""
    monkeypatch.setitem(tiny.FAMILIES, "wide", ("LlamaConfig", tiny._LLAMA | WIDE))


@pytest.mark.parametrize("kind", FILES)
def test_its_readers_agree_with_the_table(kind: str, tmp_path: Path) -> None:
    format, grid, inputs, algorithm = FILES[kind]
    make(tmp_path / "it", format, uniform(grid), family="wide", spec=inputs)
    linears = list(Artifact(tmp_path / "it").linears)
    said = asked("tensorrt_llm", "tensorrt-llm", str(tmp_path / "it"), json.dumps(linears), source=True)
    assert said["warned"] == []  # config.json and hf_quant_config.json say the same
    assert will_load(tmp_path / "it", TensorRtLlm(), way="contract").loads == (not said["why"]) == bool(algorithm)
    if algorithm:
        assert said["algorithm"] == algorithm
        assert said["group_size"] == (grid.group_size if grid.bits == 4 else None)
        assert "lm_head" in said["left_out"]


@pytest.mark.parametrize("format", ["modelopt", CT])
def test_layers_of_two_kinds_are_told_apart(format: str, tmp_path: Path) -> None:
    grids = {name: Grid(type="nvfp4") if "mlp" in name else TENSOR if format == "modelopt" else Grid(type="fp8")
             for name in uniform(TENSOR)}  # fmt: skip
    make(tmp_path / "it", format, grids, family="wide", spec=Activations(type="as-weights"))
    said = asked("tensorrt_llm", "tensorrt-llm", str(tmp_path / "it"), json.dumps(list(grids)), source=True)
    assert (said["why"], said["algorithm"], said["warned"]) == ("", "MIXED_PRECISION", [])
    other = "FP8" if format == "modelopt" else "FP8_PER_CHANNEL_PER_TOKEN"
    assert said["layers"] == {name: "NVFP4" if "mlp" in name else other for name in grids}
