"""compressed-tensors files of every number type, with and without rounded inputs, read by the library and transformers.

The llama has sizes that blocks of 128 divide. Its inputs go up to some 4, where the static scales of records.py end.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from torch import Tensor

from quantpress.artifact import artifact as artifact_module
from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.artifact.convert import convert
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.eval.measure.divergence import last_hidden
from quantpress.formats import FORMATS, ModelScheme
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import write_part
from quantpress.numbers import activations as activations_module
from quantpress.numbers.grid import Grid, Inputs
from quantpress.numbers.types import Activations

from ... import tiny
from .artifacts import linears, load, logits, make, quantization_config, uniform
from .records import FLOATS, PAIRS, equal, record

CT = FORMATS["compressed-tensors"]
ALL: list[tuple[Grid, Activations | None]] = [*((grid, None) for grid in FLOATS), *PAIRS]
# What the library multiplies in bfloat16 whatever the model's dtype.
_BFLOAT16 = ("mxfp8", "mxfp4", "nvfp4")
PRESETS = {
    "INT8": PAIRS[0], "FP8": (Grid(type="fp8", group_size=0), Activations(type="fp8", dynamic=False)),
    "FP8_DYNAMIC": (Grid(type="fp8"), Activations(type="fp8")),
    "FP8_BLOCK": (Grid(type="fp8-block"), Activations(type="fp8")),
    "MXFP8": (Grid(type="mxfp8"), Activations(type="mxfp8")), "MXFP8A16": (Grid(type="mxfp8"), None),
    "MXFP4": (Grid(type="mxfp4"), Activations(type="mxfp4")), "MXFP4A16": (Grid(type="mxfp4"), None),
    "NVFP4": (Grid(type="nvfp4"), Activations(type="nvfp4")), "NVFP4A16": (Grid(type="nvfp4"), None),
    "W4A8": (Grid(), Activations(type="int8")), "W4AFP8": (Grid(), Activations(type="fp8")),
    "W4A16": (Grid(), None), "W4A16_ASYM": (Grid(symmetric=False), None), "W8A16": (Grid(bits=8), None),
}  # fmt: skip
LAYOUTS = {
    "INT8": "int-quantized", "W4A8": "int-quantized", "W4AFP8": "pack-quantized", "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized", "MXFP8": "mxfp8-quantized",
    "MXFP4": "mxfp4-pack-quantized", "NVFP4": "nvfp4-pack-quantized", "NVFP4A16": "nvfp4-pack-quantized",
}  # fmt: skip


def ids(value: object) -> str:
    return str(value).replace(" ", "-")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
    monkeypatch.setitem(tiny.FAMILIES, "llama", ("LlamaConfig", tiny.FAMILIES["llama"][1] | sizes))


@pytest.mark.parametrize(("grid", "spec"), ALL, ids=ids)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
def test_the_library_finds_our_weights(grid: Grid, spec: Activations | None, shape: tuple[int, int]) -> None:
    q = record(grid, *shape, spec=spec)
    scheme = QuantizationConfig.model_validate(CT.config(ModelScheme({"x": grid}, activations=spec))).config_groups[
        "group_0"
    ]
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    state = {name.removeprefix("x."): tensor for name, tensor in CT.pack("x", q).items()}
    assert set(state) - {"input_scale", "input_zero_point"} <= set(compressor.compression_param_names(scheme)) | {
        "input_global_scale"
    }
    weight = compressor.decompress(state, scheme)["weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize(("grid", "spec"), ALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_record_comes_back_in_the_bytes_announced(grid: Grid, spec: Activations | None, dtype: torch.dtype) -> None:
    for n_out, n_in in ((128, 128), (256, 384), *(() if grid.type == "fp8-block" else ((7, 32), (33, 96)))):
        q = record(grid, n_out, n_in, spec=spec, dtype=dtype)
        CT.check(grid, n_out, n_in, False)
        tensors = CT.pack("a.b", q)
        assert all(t.is_contiguous() for t in tensors.values())
        assert equal(CT.unpack("a.b", tensors.__getitem__, grid, (n_out, n_in)), q)
        scale_bytes = q.scales.element_size()
        assert CT.packed_bytes(grid, n_out, n_in, scale_bytes, spec) == sum(t.nbytes for t in tensors.values())
        assert {n.rpartition(".")[2] for n in tensors} <= set(CT.suffixes)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()} | {"a.b.bias": (n_out,), "c.weight": (8, 8)}
        assert CT.linears(shapes, tensors.__getitem__) == {"a.b": (n_out, n_in)}
        if spec is not None and q.inputs is not None:
            read = CT.inputs("a.b", tensors.__getitem__, spec, grid)
            assert (read.spec, read.columns, read.scale, read.zero) == (
                spec, q.inputs.columns, q.inputs.scale, q.inputs.zero,
            )  # fmt: skip


@pytest.mark.parametrize(("grid", "spec"), ALL, ids=ids)
def test_tensors_of_another_shape_are_refused(grid: Grid, spec: Activations | None) -> None:
    tensors = CT.pack("x", record(grid, 128, 128, spec=spec))
    for name, tensor in tensors.items():
        broken = (tensors | {name: tensor[:-1]}).__getitem__
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            assert CT.unpack("x", broken, grid, (128, 128)) and spec and CT.inputs("x", broken, spec, grid)  # noqa: PT018


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_are_the_presets_of_the_library(name: str) -> None:
    """What servers know by its values. Observers and zero-point dtypes say how a file was made, not what it holds."""
    grid, spec = PRESETS[name]
    config = CT.config(ModelScheme({"x": grid}, activations=spec))
    ours = QuantizationConfig.model_validate(config).config_groups["group_0"]
    preset = preset_name_to_scheme(name, ["Linear"])
    made = {"observer": None, "zp_dtype": None}
    for a, b in ((ours.weights, preset.weights), (ours.input_activations, preset.input_activations)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.model_copy(update=made) == b.model_copy(update=made)
    if name in LAYOUTS:
        assert config["format"] == config["config_groups"]["group_0"]["format"] == LAYOUTS[name]
    # Configs that other tools made from the presets are read.
    other = copy.deepcopy(config)
    other["config_groups"]["group_0"] = preset.model_dump(mode="json") | {"format": config["format"]}
    for read in (config, other):
        assert CT.grids(read, ["x"]) == {"x": grid}
        assert CT.activations(read) == spec


def as_the_library_rounds(x: Tensor, inputs: Inputs) -> Tensor:
    """Where its rule for scales is another than servers': amax / 127.5 for int8."""
    spec = inputs.spec
    if spec.type == "int8" and spec.dynamic and spec.symmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale
    if spec.type == "int8" and spec.dynamic:  # rounds after adding the zero: another number on a tie
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / scale).clamp(-128, 127).round()
        return ((x / scale + zero).clamp(-128, 127).round() - zero) * scale
    return activations_module.round_inputs(x, inputs)


def ours(folder: Path) -> Tensor:
    """Logits [2, 16, VOCAB] of our own forward over the artifact, its inputs rounded."""
    _, skeleton = open_artifact(folder, torch.device("cpu"))
    tokens = torch.randint(tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    return torch.stack([skeleton.logits(h) for h in last_hidden(skeleton, tokens, lambda: None)]).float()


@pytest.mark.parametrize(("grid", "spec"), ALL, ids=ids)
def test_transformers_computes_what_our_forward_does(
    grid: Grid, spec: Activations | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit in float32; in bfloat16, where the library takes that, too."""
    dtype = torch.bfloat16 if grid.type in _BFLOAT16 else torch.float32
    _, plain = make(tmp_path / "a", "compressed-tensors", uniform(grid), spec=spec, dtype=dtype)
    theirs = logits(load(tmp_path / "a"))
    servers = ours(tmp_path / "a")
    monkeypatch.setattr(artifact_module, "round_inputs", as_the_library_rounds)
    assert torch.equal(theirs, ours(tmp_path / "a"))
    weights_only = logits(plain)
    if spec is None:
        assert torch.equal(theirs, weights_only)
        return
    rounding = float((theirs - weights_only).norm() / weights_only.norm())
    assert 0.005 < rounding < 0.5  # the inputs were rounded at all
    assert float((theirs - servers).norm() / weights_only.norm()) < 1.5 * rounding


def test_layers_of_several_types_and_dense_ones(tmp_path: Path) -> None:
    schemes = uniform(Grid(type="fp8"), dense=("o_proj",))
    schemes |= {n: Grid(bits=4, group_size=32) for n in schemes if n.endswith("down_proj")}
    schemes["model.layers.1.mlp.up_proj"] = Grid(type="mxfp4")
    _, plain = make(tmp_path / "a", "compressed-tensors", schemes)
    assert quantization_config(tmp_path / "a")["format"] == "mixed-precision"
    assert torch.equal(logits(load(tmp_path / "a")), logits(plain))
    assert Artifact(tmp_path / "a").linears == {n: g for n, g in schemes.items() if g is not None}


def test_weights_alone_may_go_by_the_name_of_the_plain_layout() -> None:
    """What older versions of the library infer for fp8 weights with 16-bit inputs."""
    config = CT.config(ModelScheme({"x": Grid(type="fp8")}))
    assert config["format"] == "float-quantized"
    config["config_groups"]["group_0"]["format"] = None
    assert CT.grids(config | {"format": "naive-quantized"}, ["x"]) == {"x": Grid(type="fp8")}
    with pytest.raises(BadInput, match="format 'mxfp8-quantized' cannot be read for fp8 channel weights"):
        CT.grids(config | {"format": "mxfp8-quantized"}, ["x"])


def test_several_kinds_with_one_kind_of_inputs_are_read() -> None:
    spec = Activations(type="int8")
    schemes = {"a.x": Grid(bits=8, group_size=-1), "a.y": Grid(group_size=32)}
    config = CT.config(ModelScheme(dict(schemes), activations=spec))
    assert config["format"] == "int-quantized"
    assert CT.grids(config, list(schemes)) == schemes
    assert CT.activations(config) == spec
    config["config_groups"]["group_1"]["input_activations"] = None
    with pytest.raises(BadInput, match=r"2 kinds of activations in one model cannot be read, .*16 bit, int8 dynamic"):
        CT.activations(config)
    config["config_groups"]["group_1"]["input_activations"] = {"num_bits": 8, "strategy": "tensor", "dynamic": True}
    with pytest.raises(BadInput, match="strategy 'tensor', dynamic True"):
        CT.activations(config)


def test_dynamic_inputs_beside_static_ones() -> None:
    spec, names = Activations(type="int8", dynamic=False), [f"m.{k}.{x}" for k in range(2) for x in ("up", "down")]
    grid = Grid(bits=8, group_size=-1)
    config = CT.config(ModelScheme(dict.fromkeys(names, grid), activations=spec, dynamic=["m.1.down"]))
    assert CT.grids(config, names) == dict.fromkeys(names, grid)
    assert CT.activations(config) == spec
    assert CT.dynamic(config, names) == {"m.1.down"}
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    assert [(x.input_activations.strategy, x.input_activations.dynamic) for x in groups] == [
        ("tensor", False), ("token", True),
    ]  # fmt: skip
    alone = CT.config(ModelScheme(dict.fromkeys(names, grid), activations=spec))
    assert CT.dynamic(alone, names) == frozenset()


@pytest.mark.parametrize("shape", [(128, 192), (192, 128)])
def test_blocks_that_readers_refuse_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(BadInput, match=f"whole blocks of 128 x 128, and the weight is {shape[0]} x {shape[1]}"):
        CT.check(Grid(type="fp8-block"), *shape, shuffled=False)


def test_a_quantized_cache_is_announced_and_its_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    schemes = uniform(Grid(bits=8, group_size=-1))
    _, plain = make(tmp_path / "a", "compressed-tensors", schemes)
    checkpoint = Checkpoint(tmp_path / "a")
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    tensors |= {f"model.layers.{k}.self_attn.{n}_scale": torch.tensor([0.02]) for k in range(2) for n in "kv"}
    for file in (tmp_path / "a").glob("model*"):
        file.unlink()
    write_part(tmp_path / "a/model.safetensors", tensors)
    quantization = CT.config(ModelScheme(schemes, outside=["lm_head"], kv_cache="fp8"))
    scheme = quantization["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    assert (scheme["symmetric"], scheme["dynamic"]) == (True, False)
    write_json(tmp_path / "a/config.json", checkpoint.config | {"quantization_config": quantization})
    assert set(Artifact(tmp_path / "a").linears) == set(schemes)
    off = (ours(tmp_path / "a") - logits(plain)).norm() / logits(plain).norm()
    assert 0 < off < 0.1  # keys and values were rounded, and nothing else
    assert CT.kv_cache(quantization) == "fp8"
    with pytest.raises(BadInput, match="kv_cache int8"):
        CT.config(ModelScheme(schemes, kv_cache="int8"))
    with pytest.raises(BadInput, match="gptq holds weights only"):
        convert(tmp_path / "a", tmp_path / "gptq", "gptq")


@pytest.mark.parametrize("grid", FLOATS, ids=ids)
def test_numbers_that_gptq_cannot_hold_are_not_converted(grid: Grid, tmp_path: Path) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(grid))
    with pytest.raises(BadInput, match="gptq holds weights of type int, not"):
        convert(tmp_path / "a", tmp_path / "gptq", "gptq")


def test_rounded_inputs_are_not_dropped_by_a_conversion(tmp_path: Path) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(Grid(bits=8, group_size=-1)), spec=Activations(type="int8"))
    with pytest.raises(BadInput, match="gptq holds weights only: no activations"):
        convert(tmp_path / "a", tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("grid", [FLOATS[0], FLOATS[1], Grid(type="mxfp4")], ids=ids)
def test_transformers_loads_experts(grid: Grid, tmp_path: Path) -> None:
    names = linears("qwen3_moe", tmp_path / "names")
    _, plain = make(tmp_path / "a", "compressed-tensors", dict.fromkeys(names, grid), family="qwen3_moe")
    assert torch.equal(logits(load(tmp_path / "a")), logits(plain))


@pytest.mark.parametrize(
    ("grid", "spec"),
    [(Grid(bits=8, group_size=-1), Activations(type="int8")), (Grid(type="fp8"), Activations(type="fp8"))],
    ids=ids,
)
def test_our_forward_rounds_the_inputs_of_experts(grid: Grid, spec: Activations, tmp_path: Path) -> None:
    """vLLM loads such experts. transformers refuses integers one a byte, and leaves the inputs of fp8 experts alone."""
    names = linears("qwen3_moe", tmp_path / "names")
    made, plain = make(
        tmp_path / "a", "compressed-tensors", dict.fromkeys(names, grid), family="qwen3_moe", spec=spec,
        dtype=torch.float32,
    )  # fmt: skip
    artifact = Artifact(tmp_path / "a")
    assert all(equal(artifact.linear(name), q) for name, q in made.items())
    assert all(artifact.inputs(name) == q.inputs for name, q in made.items())
    found, weights_only = ours(tmp_path / "a"), logits(plain)
    assert 0.005 < float((found - weights_only).norm() / weights_only.norm()) < 0.5
    if grid.type == "int":
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            load(tmp_path / "a")
