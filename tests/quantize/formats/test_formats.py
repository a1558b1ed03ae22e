"""What both formats promise: a record comes back as it went in, in the bytes that were announced."""

import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.formats import FORMATS, ModelScheme, detect
from quantpress.numbers.grid import Grid
from quantpress.numbers.types import Activations
from quantpress.recipe import FILE_FORMATS

from .records import FLOATS, GPTQ_GRIDS, GRIDS, equal, record, with_scales

WRITTEN = ("compressed-tensors", "gptq")
SHAPES = ((32, 64), (64, 96), (96, 32))
ODD = ((1, 64), (7, 32), (33, 96), (50, 192))  # only compressed-tensors pads


def ids(value: object) -> str:
    return str(value).replace(" ", "-")


@pytest.mark.parametrize(
    ("grid", "format"),
    [*((grid, "compressed-tensors") for grid in GRIDS), *((grid, "gptq") for grid in GPTQ_GRIDS)],
    ids=ids,
)
def test_a_record_comes_back(format: str, grid: Grid) -> None:
    for n_out, n_in in SHAPES + (ODD if format == "compressed-tensors" else ()):
        q = record(grid, n_out, n_in, dtype=torch.float16)
        FORMATS[format].check(grid, n_out, n_in, False)
        tensors = FORMATS[format].pack("a.b", q)
        assert all(t.is_contiguous() for t in tensors.values())
        assert equal(FORMATS[format].unpack("a.b", tensors.__getitem__, grid, (n_out, n_in)), q)
        assert FORMATS[format].packed_bytes(grid, n_out, n_in, 2) == sum(t.nbytes for t in tensors.values())
        assert {n.rpartition(".")[2] for n in tensors} <= set(FORMATS[format].suffixes)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()} | {"a.b.bias": (n_out,), "c.weight": (8, 8)}
        assert FORMATS[format].linears(shapes, tensors.__getitem__) == {"a.b": (n_out, n_in)}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "modelopt"])
@pytest.mark.parametrize("spec", [None, Activations(type="int8")], ids=ids)
@pytest.mark.parametrize("grid", [*FLOATS, Grid(group_size=128), Grid(bits=8, group_size=-1)], ids=ids)
def test_which_codes_are_packed_as_they_are(format: str, grid: Grid, spec: Activations | None) -> None:
    if spec is not None and grid.type != "int":
        return
    try:
        FORMATS[format].check(grid, 128, 256, False)
    except BadInput:
        return
    q = record(grid, 128, 256, dtype=torch.float16, spec=spec)
    places = {t.untyped_storage().data_ptr() for t in FORMATS[format].pack("a.b", q).values()}
    assert FORMATS[format].keeps_codes(grid, spec) == (q.codes.untyped_storage().data_ptr() in places)


def test_scales_keep_their_dtype_where_the_format_allows() -> None:
    q = record(Grid(group_size=32), 32, 64, dtype=torch.bfloat16)
    unpacked = {f: FORMATS[f].unpack("x", FORMATS[f].pack("x", q).__getitem__, q.grid, (32, 64)) for f in WRITTEN}
    assert equal(unpacked["compressed-tensors"], q)
    assert equal(unpacked["gptq"], with_scales(q, torch.float16))


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_of_another_shape_are_refused(format: str, symmetric: bool) -> None:
    grid = Grid(group_size=32, symmetric=symmetric)
    tensors = FORMATS[format].pack("x", record(grid, 32, 64))
    for name, tensor in tensors.items():
        broken = tensors | {name: tensor[:-1]}
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            FORMATS[format].unpack("x", broken.__getitem__, grid, (32, 64))
    with pytest.raises(BadInput, match=r"x\."):
        FORMATS[format].unpack("x", tensors.__getitem__, grid, (64, 64))


def names(layers: int = 3) -> list[str]:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    return [f"model.layers.{k}.{part}" for k in range(layers) for part in parts]


def mixed() -> dict[str, dict[str, Grid | None]]:
    """Ways to spread grids over the layers of a model."""
    four, eight, channel = Grid(group_size=64), Grid(bits=8, group_size=32), Grid(group_size=-1)
    return {
        "one": dict.fromkeys(names(), four),
        "down 8": {n: eight if n.endswith("down_proj") else four for n in names()},
        "first layer 8, down dense": {
            n: None if n.endswith("down_proj") else eight if ".0." in n else four for n in names(12)
        },
        "layer 1 dense": {n: None if ".1." in n else channel for n in names(12)},
        "q, k, v 8": {n: eight if n[-6] in "qkv" else four for n in names()},
    }


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("case", mixed())
def test_a_config_says_what_it_was_given(format: str, case: str) -> None:
    schemes = mixed()[case]
    config = FORMATS[format].config(ModelScheme(schemes, outside=["lm_head"]))
    assert detect({"quantization_config": config}) == format
    read = FORMATS[format].grids(config, list(schemes))
    assert read == schemes
    for file in FORMATS[format].extra_files(config).values():
        assert file == config


@pytest.mark.parametrize("format", WRITTEN)
def test_scale_search_is_not_part_of_a_scheme(format: str) -> None:
    schemes: dict[str, Grid | None] = {n: Grid(scale_search="minmax" if "q_proj" in n else "mse") for n in names()}
    assert FORMATS[format].config(ModelScheme(schemes)) == FORMATS[format].config(
        ModelScheme(dict.fromkeys(names(), Grid()))
    )


@pytest.mark.parametrize("format", WRITTEN)
def test_nothing_quantized_has_no_config(format: str) -> None:
    with pytest.raises(BadInput, match="no linear is quantized"):
        FORMATS[format].config(ModelScheme(dict.fromkeys(names())))


def test_every_name_a_recipe_may_give_is_a_format() -> None:
    assert {format.name for format in FORMATS.values()} == set(FILE_FORMATS)


def test_detect() -> None:
    assert detect({}) is None
    assert detect({"quantization_config": {"quant_method": "gptq"}}) == "gptq"
    assert detect({"quantization_config": {"quant_method": "gptq", "sym": False}}) == "gptq-v1-asymmetric"
    v2 = {"quant_method": "gptq", "sym": False, "checkpoint_format": "gptq_v2"}
    assert detect({"quantization_config": v2}) == "gptq"
    with pytest.raises(BadInput, match="quantized with 'hqq'"):
        detect({"quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(BadInput, match="checkpoint_format 'marlin'"):
        detect({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(("format", "suffix"), [("compressed-tensors", "weight_global_scale"),
                                                ("modelopt", "weight_scale_2")])  # fmt: skip
def test_a_global_scale_of_nvfp4_is_a_positive_number(format: str, suffix: str, scale: float) -> None:
    grid = Grid(type="nvfp4")
    tensors = FORMATS[format].pack("x", record(grid, 32, 64))
    broken = tensors | {f"x.{suffix}": torch.full_like(tensors[f"x.{suffix}"], scale)}
    with pytest.raises(BadInput, match=rf"x\.{suffix}: one positive, finite number is needed"):
        FORMATS[format].unpack("x", broken.__getitem__, grid, (32, 64))
