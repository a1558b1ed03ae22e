"""AWQ files, read by the rule of vLLM's dequantizing kernel said again in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantpress.core.errors import BadInput
from quantpress.formats import FORMATS, ModelScheme, detect
from quantpress.numbers.grid import Grid

from .records import GRIDS, equal, record

AWQ = FORMATS["awq"]
FOUR = Grid(group_size=32)
ASYMMETRIC = Grid(group_size=32, symmetric=False)
GRIDS_4 = [grid for grid in GRIDS if grid.bits == 4]


def unpacked(words: Tensor) -> Any:
    """awq_dequantize_kernel of vLLM: each word eight times, shifted by 4 * (0, 4, 1, 5, 2, 6, 3, 7), masked."""
    repeated = np.repeat(words.numpy(), 8, axis=1)
    shifts = (np.arange(2)[None, :] * 4 + np.arange(4)[:, None]).reshape(8) * 4
    return repeated >> np.tile(shifts, words.shape[1]) & 15


def published(tensors: dict[str, Tensor]) -> Any:
    """The weight [out, in], float32: (q - z) * scale, a zero and a scale for each group of rows."""
    codes, zeros = unpacked(tensors["x.qweight"]), unpacked(tensors["x.qzeros"])
    size = len(codes) // len(zeros)
    scales = tensors["x.scales"].numpy().astype(np.float32)
    return ((codes - zeros.repeat(size, 0)).astype(np.float32) * scales.repeat(size, 0)).T


@pytest.mark.parametrize("grid", GRIDS_4, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (8, 96), (96, 32)])
def test_the_published_rule_gives_our_weights(grid: Grid, shape: tuple[int, int]) -> None:
    q = record(grid, *shape)
    tensors = AWQ.pack("x", q)
    assert (published(tensors) == q.dequantize().numpy()).all()
    dtypes = {name.removeprefix("x."): tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}


@pytest.mark.parametrize("grid", GRIDS_4, ids=str)
def test_a_record_comes_back(grid: Grid) -> None:
    for n_out, n_in in ((32, 64), (8, 96), (96, 32)):
        q = record(grid, n_out, n_in, dtype=torch.float16)
        tensors = AWQ.pack("a.b", q)
        assert all(t.is_contiguous() for t in tensors.values())
        assert equal(AWQ.unpack("a.b", tensors.__getitem__, grid, (n_out, n_in)), q)
        assert AWQ.packed_bytes(grid, n_out, n_in, 2) == sum(t.nbytes for t in tensors.values())
        assert {n.rpartition(".")[2] for n in tensors} == set(AWQ.suffixes)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()} | {"a.b.bias": (n_out,), "c.weight": (8, 8)}
        assert AWQ.linears(shapes, tensors.__getitem__) == {"a.b": (n_out, n_in)}


def test_a_word_holds_the_columns_in_their_order() -> None:
    q = record(FOUR, 8, 32)
    q.codes[:, 0] = torch.arange(8, dtype=torch.uint8)
    word = AWQ.pack("x", q)["x.qweight"][0, 0].item() & 0xFFFFFFFF
    assert f"{word:08x}" == "75316420"  # highest nibble first


def test_tensors_of_another_shape_are_refused() -> None:
    tensors = AWQ.pack("x", record(FOUR, 32, 64))
    for name, tensor in tensors.items():
        broken = tensors | {name: tensor[:-1]}
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            AWQ.unpack("x", broken.__getitem__, FOUR, (32, 64))
    with pytest.raises(BadInput, match="where a matrix is needed"):
        AWQ.linears({"x.qweight": (3,)}, tensors.__getitem__)


def test_the_zeros_of_a_symmetric_file_must_be_the_middle() -> None:
    q = record(ASYMMETRIC, 32, 64)
    with pytest.raises(BadInput, match=r"x\.qzeros: the config says symmetric, and the zeros are not 8"):
        AWQ.unpack("x", AWQ.pack("x", q).__getitem__, FOUR, (32, 64))


@pytest.mark.parametrize("scale", [1e-7, 1e5])
def test_scales_that_float16_cannot_hold_are_refused(scale: float) -> None:
    q = record(FOUR, 32, 64)
    q.scales[2, 1] = scale
    with pytest.raises(BadInput, match=r"x: awq stores scales in float16, and .*bfloat16.* is not exact"):
        AWQ.pack("x", q)


@pytest.mark.parametrize(
    ("grid", "n_out", "n_in", "shuffled", "message"),
    [
        (FOUR, 36, 64, False, "out_features 36 is not a multiple of 8"),
        (Grid(group_size=-1), 32, 60, False, "in_features 60 is not a multiple of 8"),
        (Grid(bits=8), 32, 128, False, "4-bit integers, not int8"),
        (Grid(type="nvfp4"), 32, 128, False, "4-bit integers, not nvfp4"),
        (FOUR, 32, 64, True, "scattered groups .* need format gptq"),
    ],
)
def test_what_awq_cannot_hold(grid: Grid, n_out: int, n_in: int, shuffled: bool, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        AWQ.check(grid, n_out, n_in, shuffled)


NAMES = [f"model.layers.{k}.{p}" for k in (0, 1, 11) for p in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize("grid", GRIDS_4, ids=str)
def test_the_config_is_what_readers_expect(grid: Grid) -> None:
    schemes: dict[str, Grid | None] = {n: None if ".1." in n and "down" in n else grid for n in NAMES}
    config = AWQ.config(ModelScheme(schemes, outside=["lm_head"]))
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": grid.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"],
    } | ({"sym": True} if grid.symmetric else {})
    assert detect({"quantization_config": config}) == "awq"
    assert AWQ.grids(config, NAMES) == schemes


def test_one_kind_for_all_layers() -> None:
    with pytest.raises(BadInput, match="one kind of weight for all layers, and these have int4 g32 sym, int4 g32 asym"):
        AWQ.config(ModelScheme({"x": FOUR, "y": ASYMMETRIC}))
    with pytest.raises(BadInput, match="no linear is quantized"):
        AWQ.config(ModelScheme({"x": None}))
    same: dict[str, Grid | None] = {"x": FOUR, "y": FOUR.model_copy(update={"scale_search": "minmax"})}
    assert AWQ.config(ModelScheme(same)) == AWQ.config(ModelScheme({"x": FOUR, "y": FOUR}))


def test_a_name_that_would_take_others_with_it_is_refused() -> None:
    """Readers leave out what has the name in it: the router `gate` would take `gate_proj` along."""
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.gate \(16 bit\) is part of model\.layers\.0\.mlp\.gate_proj"):
        AWQ.config(ModelScheme(dict.fromkeys(NAMES, FOUR), outside=["model.layers.0.mlp.gate"]))
    experts: dict[str, Grid | None] = {f"m.0.mlp.experts.{k}.up_proj": FOUR for k in range(11)}
    router = AWQ.config(ModelScheme(experts, outside=["m.0.mlp.gate"]))
    assert router["modules_to_not_convert"] == ["m.0.mlp.gate"]
    with pytest.raises(BadInput, match=r"m\.0\.mlp\.experts \(16 bit\) is part of m\.0\.mlp\.experts\.0\.up_proj"):
        AWQ.config(ModelScheme(experts | {"m.0.mlp.experts.1.up_proj": None}))
    whole = AWQ.config(ModelScheme(dict.fromkeys(experts) | {"m.0.attn.q": FOUR}))["modules_to_not_convert"]
    assert whole[-1] == "m.0.mlp.experts"  # what a server calls all of them


def test_activations_and_caches_have_no_place() -> None:
    with pytest.raises(BadInput, match="weights only"):
        AWQ.config(ModelScheme({"x": FOUR}, kv_cache="fp8"))


def test_configs_of_other_tools_are_read() -> None:
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    }
    plain = Grid(symmetric=False)
    assert AWQ.grids(config | {"modules_to_not_convert": None}, ["a.b"]) == {"a.b": plain}
    assert AWQ.grids(config | {"modules_to_not_convert": ["visual"]}, ["a.b", "visual.b"]) == {
        "a.b": plain,
        "visual.b": None,
    }
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False, "version": "GEMM"}
    assert AWQ.grids(older, ["a"]) == {"a": Grid(group_size=64)}
    assert detect({"quantization_config": older}) == "awq"
    with pytest.raises(BadInput, match="awq version 'gemv' is laid out for one kernel"):
        detect({"quantization_config": config | {"version": "gemv"}})
    with pytest.raises(BadInput, match="needs `bits` and `group_size`"):
        AWQ.grids({"quant_method": "awq"}, ["a"])
