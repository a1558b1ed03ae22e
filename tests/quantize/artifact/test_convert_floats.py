"""Float weights and the scales of inputs go from compressed-tensors to ModelOpt and back without a change."""

from pathlib import Path

import pytest
import torch

from quantpress.artifact.convert import convert
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.formats import FORMATS, ModelScheme
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import write_part
from quantpress.numbers.grid import Grid
from quantpress.numbers.types import Activations

from ..formats.artifacts import make, quantization_config, uniform

PAIRS = {
    "FP8": (Grid(type="fp8", group_size=0), Activations(type="fp8", dynamic=False)),
    "FP8_PER_CHANNEL_PER_TOKEN": (Grid(type="fp8"), Activations(type="fp8")),
    "NVFP4": (Grid(type="nvfp4"), Activations(type="nvfp4")),
    "W4A16_NVFP4": (Grid(type="nvfp4"), None),
}


@pytest.mark.parametrize("algorithm", PAIRS)
def test_there_and_back(algorithm: str, tmp_path: Path) -> None:
    grid, spec = PAIRS[algorithm]
    schemes = uniform(grid, dense=("o_proj",))
    before, _ = make(tmp_path / "a", "compressed-tensors", schemes, spec=spec)
    convert(tmp_path / "a", tmp_path / "m", "modelopt")
    convert(tmp_path / "m", tmp_path / "back", "compressed-tensors")
    config, checkpoint = quantization_config(tmp_path / "m"), Checkpoint(tmp_path / "m")
    assert config["quant_algo"] == algorithm
    writer = FORMATS["modelopt"]
    assert config == writer.config(ModelScheme(schemes, outside=["lm_head"], activations=spec))
    for name, q in before.items():
        read = writer.unpack(name, checkpoint.read, grid, (q.out_features, q.in_features))
        assert torch.equal(read.dequantize(), q.dequantize())
        assert spec is None or writer.inputs(name, checkpoint.read, spec, grid) == q.inputs
    first, last = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "back")
    assert set(first.names()) == set(last.names())
    assert first.config == last.config
    for name in first.names():
        x, y = first.read(name), last.read(name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize(
    ("grid", "spec", "to", "message"),
    [
        (Grid(type="nvfp4"), None, "gptq", "gptq holds weights of type int, not nvfp4"),
        (Grid(type="fp8"), Activations(type="fp8"), "awq", "awq holds 4-bit integers, not fp8 channel"),
        (Grid(type="mxfp4"), None, "modelopt", "no reader takes mxfp4 weights"),
        (Grid(type="fp8"), Activations(type="fp8", dynamic=False), "modelopt", "fp8 channel weights with fp8 static"),
        (Grid(bits=8, group_size=-1), Activations(type="int8"), "modelopt", "with int8 dynamic activations"),
        (Grid(bits=8, group_size=-1), Activations(type="int8"), "gptq", "gptq holds weights only"),
    ],
)
def test_what_has_no_exact_counterpart(
    grid: Grid, spec: Activations | None, to: str, message: str, tmp_path: Path
) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(grid), spec=spec)
    with pytest.raises(BadInput, match=message):
        convert(tmp_path / "a", tmp_path / "b", to)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("scale", [896.0, float("nan"), float("inf"), 0.0, -2.0])
def test_a_global_scale_without_an_exact_inverse_is_not_converted(suffix: str, scale: float, tmp_path: Path) -> None:
    """As other tools write them: the largest that fits, and not the power of two below."""
    grid, spec = PAIRS["NVFP4"]
    make(tmp_path / "a", "compressed-tensors", uniform(grid), spec=spec)
    checkpoint = Checkpoint(tmp_path / "a")
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    for old in (tmp_path / "a").glob("model*"):
        old.unlink()
    changed = f"model.layers.1.mlp.up_proj.{suffix}"
    assert changed in tensors
    write_part(tmp_path / "a" / "model.safetensors", tensors | {changed: torch.tensor([scale])})
    expected = "global scale 896 is not a power of two" if scale == 896 else f"{suffix}: one positive, finite number"
    with pytest.raises(BadInput, match=expected):
        convert(tmp_path / "a", tmp_path / "b", "modelopt")
    assert not (tmp_path / "b").exists()


def test_a_cache_goes_there_and_back(tmp_path: Path) -> None:
    grid, spec = PAIRS["FP8"]
    make(tmp_path / "a", "compressed-tensors", uniform(grid), spec=spec)
    checkpoint = Checkpoint(tmp_path / "a")
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    for old in (tmp_path / "a").glob("model*"):
        old.unlink()
    scales = {f"model.layers.{k}.self_attn.{x}_scale": torch.tensor(0.1 + k) for k in range(2) for x in "kv"}
    write_part(tmp_path / "a" / "model.safetensors", tensors | scales)
    stated = FORMATS["compressed-tensors"].config(
        ModelScheme(uniform(grid), outside=["lm_head"], activations=spec, kv_cache="fp8")
    )
    write_json(tmp_path / "a" / "config.json", checkpoint.config | {"quantization_config": stated})
    convert(tmp_path / "a", tmp_path / "m", "modelopt")
    convert(tmp_path / "m", tmp_path / "back", "compressed-tensors")
    last = Checkpoint(tmp_path / "back")
    assert quantization_config(tmp_path / "back") == stated
    assert all(last.read(name) == scale for name, scale in scales.items())
