"""ModelOpt files, read by the rules of vLLM's and TensorRT-LLM's loaders said again in numpy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantpress.core.errors import BadInput
from quantpress.formats import FORMATS, ModelScheme, detect
from quantpress.formats.base import AS_WEIGHTS
from quantpress.formats.statement import stated_quantization
from quantpress.numbers.grid import Grid, Inputs, QuantizedLinear
from quantpress.numbers.types import Activations

from .records import equal, record

MODELOPT = FORMATS["modelopt"]
FP8, CHANNEL = Grid.model_validate({"type": "fp8", "group_size": 0}), Grid.model_validate({"type": "fp8"})
NVFP4 = Grid.model_validate({"type": "nvfp4"})
FOUR, EIGHT = Grid(group_size=64), Grid(bits=8, group_size=-1)
STATIC, DYNAMIC = Activations(type="fp8", dynamic=False), Activations(type="fp8")
INPUTS = {"FP8": STATIC, "FP8_PER_CHANNEL_PER_TOKEN": DYNAMIC, "NVFP4": Activations(type="nvfp4")}
ALGORITHMS = {
    "FP8": FP8, "FP8_PER_CHANNEL_PER_TOKEN": CHANNEL, "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4,
    "W4A16_AWQ": FOUR, "W8A16": EIGHT,
}  # fmt: skip


def sample(grid: Grid, n_out: int = 32, n_in: int = 128) -> QuantizedLinear:
    """Any codes but NaN, scales as the grid stores them."""
    if grid.type == "int":
        return record(grid, n_out, n_in)
    make = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << grid.bits, (n_out, n_in), generator=make, dtype=torch.uint8)
    if grid.type == "nvfp4":
        scales = (torch.rand(n_out, n_in // 16, generator=make) * 400 + 1).to(torch.float8_e4m3fn)
        return QuantizedLinear(
            codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), grid, None, torch.tensor(2.0**13)
        )
    codes[codes & 127 == 127] = 126
    scales = torch.rand(1 if grid.group_size == 0 else n_out, 1, generator=make) * 0.01
    return QuantizedLinear(codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), grid)


def comparable(q: QuantizedLinear) -> QuantizedLinear:
    """torch.equal does not know E4M3."""
    return replace(q, scales=q.scales.view(torch.uint8)) if q.grid.type == "nvfp4" else q


def number(code: int, exponents: int, fractions: int, bias: int) -> float:
    """A float of 1 + `exponents` + `fractions` bits, by IEEE's rule without infinities."""
    sign = -1.0 if code >> (exponents + fractions) else 1.0
    exponent = code >> fractions & ((1 << exponents) - 1)
    fraction = (code & ((1 << fractions) - 1)) / (1 << fractions)
    return sign * (2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction)


E4M3 = np.array([number(code, 4, 3, 7) for code in range(256)], dtype=np.float32)
E2M1 = np.array([number(code, 2, 1, 1) for code in range(16)], dtype=np.float32)


def raw(tensor: Tensor) -> Any:
    """The bytes as they lie in the file."""
    return tensor.view(torch.uint8).numpy()


def published(algorithm: str, tensors: dict[str, Tensor]) -> Any:
    """The weight [out, in], float32.

    FP8: KFp8StaticTensor and KFp8StaticChannel of vLLM. NVFP4: KNvfp4Static, with break_fp4_bytes of its emulation.
    W4A16_AWQ: TensorRT-LLM's preprocess_weights_for_mixed_gemm of weight.T, which sign-extends low nibble, then high.
    """
    weight, scale = tensors["x.weight"], tensors["x.weight_scale"]
    if algorithm.startswith("FP8"):
        rows = scale.numpy() if scale.dim() == 0 else scale.numpy()[:, None]
        return E4M3[raw(weight)] * rows
    if "NVFP4" in algorithm:
        low, high = E2M1[raw(weight) & 15], E2M1[raw(weight) >> 4]
        numbers = np.stack([low, high], -1).reshape(len(low), -1)
        blocks = E4M3[raw(scale)] * tensors["x.weight_scale_2"].numpy()
        return numbers * blocks.repeat(16, 1)
    if algorithm == "W8A16":
        return weight.numpy().astype(np.float32) * scale.float().numpy()[:, None]
    packed = weight.numpy().view(np.int8).T  # [in, out/2]
    low, high = (packed << 4).astype(np.int8) >> 4, packed >> 4
    numbers = np.stack([low, high], -1).reshape(len(packed), -1).T.astype(np.float32)
    return numbers * scale.float().numpy().repeat(64, 1) * tensors["x.pre_quant_scale"].float().numpy()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(32, 128), (6, 64)])
def test_the_published_rule_gives_our_weights(algorithm: str, shape: tuple[int, int]) -> None:
    q = sample(ALGORITHMS[algorithm], *shape)
    assert (published(algorithm, MODELOPT.pack("x", q)) == q.dequantize().numpy()).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_record_comes_back(algorithm: str) -> None:
    grid = ALGORITHMS[algorithm]
    for n_out, n_in in ((32, 128), (6, 64)):
        q = sample(grid, n_out, n_in)
        tensors = MODELOPT.pack("a.b", q)
        assert all(t.is_contiguous() for t in tensors.values())
        back = MODELOPT.unpack("a.b", tensors.__getitem__, grid, (n_out, n_in))
        assert equal(comparable(back), comparable(q))
        assert back.global_scale == q.global_scale
        assert MODELOPT.packed_bytes(grid, n_out, n_in, 2) == sum(t.nbytes for t in tensors.values())
        assert {n.rpartition(".")[2] for n in tensors} <= set(MODELOPT.suffixes)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()} | {"a.b.bias": (n_out,), "c.weight": (8, 8)}
        assert MODELOPT.linears(shapes, tensors.__getitem__) == {"a.b": (n_out, n_in)}


def test_the_dtypes_and_shapes_that_loaders_make_room_for() -> None:
    found = {
        algorithm: {n.removeprefix("x."): (t.dtype, list(t.shape)) for n, t in MODELOPT.pack("x", sample(grid)).items()}
        for algorithm, grid in ALGORITHMS.items()
    }
    e4m3, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    nvfp4 = {"weight": (torch.uint8, [32, 64]), "weight_scale": (e4m3, [32, 8]), "weight_scale_2": (f32, [])}
    assert found == {
        "FP8": {"weight": (e4m3, [32, 128]), "weight_scale": (f32, [])},
        "FP8_PER_CHANNEL_PER_TOKEN": {"weight": (e4m3, [32, 128]), "weight_scale": (f32, [32])},
        "NVFP4": nvfp4,
        "W4A16_NVFP4": nvfp4,
        "W4A16_AWQ": {
            "weight": (torch.uint8, [16, 128]), "weight_scale": (bf16, [32, 2]), "pre_quant_scale": (bf16, [128]),
        },
        "W8A16": {"weight": (torch.int8, [32, 128]), "weight_scale": (bf16, [32])},
    }  # fmt: skip


def test_the_scales_of_inputs() -> None:
    """vLLM divides by input_scale: for FP8 the scale itself, for NVFP4 the inverse of the global scale."""
    for spec, grid, stored in ((STATIC, FP8, 0.125), (Activations(type="nvfp4"), NVFP4, 8.0)):
        inputs = Inputs(spec, 0 if grid == FP8 else 16, torch.tensor(0.125))
        tensors = MODELOPT.pack("x", replace(sample(grid), inputs=inputs))
        assert tensors["x.input_scale"].dtype == torch.float32
        assert tensors["x.input_scale"].item() == stored
        assert MODELOPT.inputs("x", tensors.__getitem__, spec, grid) == inputs
        size = MODELOPT.packed_bytes(grid, 32, 128, 2, spec)  # type: ignore[call-arg]
        assert size == sum(t.nbytes for t in tensors.values())
    assert MODELOPT.inputs("x", {}.__getitem__, DYNAMIC, CHANNEL) == Inputs(DYNAMIC)
    assert "x.input_scale" not in MODELOPT.pack("x", replace(sample(CHANNEL), inputs=Inputs(DYNAMIC)))


NAMES = [f"model.layers.{k}.{p}" for k in (0, 1, 11) for p in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("cache", [None, "fp8"])
def test_a_config_says_what_it_was_given(algorithm: str, cache: str | None) -> None:
    schemes: dict[str, Grid | None] = {n: None if ".1." in n and "down" in n else ALGORITHMS[algorithm] for n in NAMES}
    config = MODELOPT.config(
        ModelScheme(schemes, outside=["lm_head"], activations=INPUTS.get(algorithm), kv_cache=cache)
    )
    assert config["quant_algo"] == algorithm
    assert config["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert detect({"quantization_config": config}) == "modelopt"
    assert MODELOPT.grids(config, NAMES) == schemes
    assert MODELOPT.activations(config) == INPUTS.get(algorithm)
    assert MODELOPT.kv_cache(config) == cache


def test_the_file_beside_the_config() -> None:
    config = MODELOPT.config(ModelScheme({"x": FOUR, "y": None}, outside=["lm_head"]))
    file = MODELOPT.extra_files(config)["hf_quant_config.json"]
    assert file["producer"]["name"] == "modelopt"
    assert file["quantization"] == {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "exclude_modules": ["y", "lm_head"], "group_size": 64,
        "has_zero_point": False, "pre_quant_scale": True,
    }  # fmt: skip
    config = MODELOPT.config(ModelScheme({"x": NVFP4}, activations=INPUTS["NVFP4"], kv_cache="fp8"))
    assert MODELOPT.extra_files(config)["hf_quant_config.json"]["quantization"] == {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": [], "group_size": 16,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "inputs"),
    [
        ({"FP8": {}, "NVFP4": {"group_size": 16}}, AS_WEIGHTS),
        ({"FP8_PER_CHANNEL_PER_TOKEN": {}, "NVFP4": {"group_size": 16}}, AS_WEIGHTS),
        ({"W4A16_AWQ": {"group_size": 64, "has_zero_point": False, "pre_quant_scale": True}, "W8A16": {}}, None),
    ],
)
def test_layers_of_several_kinds(layers: dict[str, Any], inputs: Activations | None) -> None:
    """As ModelOpt's get_quant_config (torch/export/quant_utils.py) writes MIXED_PRECISION; vLLM's modelopt_mixed and
    TensorRT-LLM look each layer up in quantized_layers."""
    schemes: dict[str, Grid | None] = {f"l.{k}": ALGORITHMS[name] for k, name in enumerate(layers)} | {"l.9": None}
    config = MODELOPT.config(ModelScheme(schemes, outside=["lm_head"], activations=inputs))
    assert config["quant_algo"] == "MIXED_PRECISION"
    stated = {f"l.{k}": {"quant_algo": name} | more for k, (name, more) in enumerate(layers.items())}
    assert config["quantized_layers"] == stated
    assert MODELOPT.extra_files(config)["hf_quant_config.json"]["quantization"] == {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "exclude_modules": ["l.9", "lm_head"],
        "quantized_layers": stated,
    }  # fmt: skip
    assert MODELOPT.grids(config, list(schemes)) == {n: g for n, g in schemes.items() if g is not None}
    assert MODELOPT.activations(config) == inputs


def test_layers_that_are_not_said_or_differ_in_their_inputs_are_refused() -> None:
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "mixed_precision"}
    for layers in (None, {}, {"x": 3}):
        with pytest.raises(BadInput, match="MIXED_PRECISION needs `quantized_layers`"):
            MODELOPT.grids(config | {"quantized_layers": layers}, ["x"])
    both = {"x": {"quant_algo": "NVFP4", "group_size": 16}, "y": {"quant_algo": "W8A16"}}
    with pytest.raises(BadInput, match=r"inputs of several kinds \(16 bit, nvfp4\) cannot be read"):
        MODELOPT.activations(config | {"quantized_layers": both})


@pytest.mark.parametrize(
    ("grid", "activations", "message"),
    [
        (FP8, None, "fp8 tensor weights with 16 bit activations; with these weights: fp8 static"),
        (FP8, DYNAMIC, "with these weights: fp8 static; static activations go with group_size 0, dynamic ones with -1"),
        (CHANNEL, STATIC, "fp8 channel weights with fp8 static activations; with these weights: fp8 dynamic"),
        (EIGHT, Activations(type="int8"), "int8 channel sym weights with int8 dynamic activations"),
        (FOUR, DYNAMIC, "int4 g64 sym weights with fp8 dynamic activations; with these weights: 16 bit"),
    ],
)
def test_pairs_that_no_reader_takes(grid: Grid, activations: Activations | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        MODELOPT.config(ModelScheme({"x": grid}, activations=activations))


@pytest.mark.parametrize(
    "grid",
    [
        Grid(group_size=32),
        Grid(group_size=64, symmetric=False),
        Grid(bits=3, group_size=64),
        Grid(bits=8, group_size=64),
        Grid.model_validate({"type": "mxfp4"}),
        Grid.model_validate({"type": "fp8-block"}),
    ],
    ids=str,
)
def test_weights_that_no_reader_takes(grid: Grid) -> None:
    with pytest.raises(BadInput, match=rf"no reader takes {grid} weights"):
        MODELOPT.check(grid, 128, 128, False)


def test_other_things_that_cannot_be_held() -> None:
    with pytest.raises(BadInput, match=r"scattered groups .* need format gptq"):
        MODELOPT.check(FOUR, 32, 64, True)
    with pytest.raises(BadInput, match="out_features 31 is odd"):
        MODELOPT.check(FOUR, 31, 64, False)
    with pytest.raises(BadInput, match="kv_cache int8: modelopt holds fp8 scales for it; use fp8"):
        MODELOPT.config(ModelScheme({"x": FOUR}, kv_cache="int8"))
    experts: dict[str, Grid | None] = {"m.experts.0.up": FOUR, "m.experts.1.up": EIGHT}
    with pytest.raises(BadInput, match="the experts of m have int4 g64 sym and int8 channel sym weights"):
        MODELOPT.config(ModelScheme(experts))
    with pytest.raises(BadInput, match="as-weights go with fp8 and nvfp4 weights, not with int4 g64 sym"):
        MODELOPT.config(ModelScheme({"x": FOUR, "y": NVFP4}, activations=AS_WEIGHTS))
    with pytest.raises(BadInput, match=r"m\.gate \(16 bit\) is part of m\.gate_proj"):
        MODELOPT.config(ModelScheme({"m.gate_proj": FOUR}, outside=["m.gate"]))
    with pytest.raises(BadInput, match="no linear is quantized"):
        MODELOPT.config(ModelScheme({"x": None}))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_of_another_shape_are_refused(algorithm: str) -> None:
    grid = ALGORITHMS[algorithm]
    tensors = MODELOPT.pack("x", sample(grid))
    for name, tensor in tensors.items():
        broken = tensors | {name: tensor[:-1] if tensor.dim() else tensor.repeat(2)}
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            MODELOPT.unpack("x", broken.__getitem__, grid, (32, 128))
    with pytest.raises(BadInput, match="a weight matrix is needed"):
        MODELOPT.linears({"x.weight_scale": ()}, tensors.__getitem__)


def test_inputs_that_are_scaled_cannot_be_read() -> None:
    tensors = MODELOPT.pack("x", sample(FOUR))
    tensors["x.pre_quant_scale"][3] = 2
    with pytest.raises(BadInput, match=r"x\.pre_quant_scale: inputs are scaled, .* as a model to quantize"):
        MODELOPT.unpack("x", tensors.__getitem__, FOUR, (32, 128))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "pre_quant" not in name}
    with pytest.raises(BadInput, match="x: no pre_quant_scale is there, and others' inputs are scaled"):
        MODELOPT.linears(shapes, tensors.__getitem__)


def test_the_group_size_that_modelopt_leaves_out_of_config_json_is_beside_it() -> None:
    inline = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}
    file = {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}}
    stated = stated_quantization({"quantization_config": inline}, {"hf_quant_config.json": file}.get)
    assert stated == inline | {"group_size": 128}
    assert stated_quantization({"quantization_config": inline}, lambda name: None) == inline


def test_configs_of_other_tools_are_read() -> None:
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "fp8", "ignore": ["lm_head", "model.layers.1*"]}
    assert MODELOPT.grids(config, ["model.layers.0.x", "model.layers.1.x"]) == {
        "model.layers.0.x": FP8,
        "model.layers.1.x": None,
    }
    with pytest.raises(BadInput, match="quant_algo 'W4A8_AWQ' cannot be read; known: FP8, "):
        MODELOPT.grids(config | {"quant_algo": "W4A8_AWQ"}, ["x"])
    with pytest.raises(BadInput, match="W4A16_AWQ needs `group_size`"):
        MODELOPT.grids(config | {"quant_algo": "W4A16_AWQ"}, ["x"])
    with pytest.raises(BadInput, match="W4A16_AWQ in groups of 32 cannot be read"):
        MODELOPT.grids(config | {"quant_algo": "W4A16_AWQ", "group_size": 32}, ["x"])
    with pytest.raises(BadInput, match="kv_cache_scheme NVFP4 cannot be read"):
        MODELOPT.kv_cache(config | {"kv_cache_scheme": "NVFP4"})
