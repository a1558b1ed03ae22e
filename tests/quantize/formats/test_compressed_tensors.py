"""compressed-tensors files, read by the library itself and by transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from packaging.version import Version

from quantpress.core.errors import BadInput
from quantpress.formats import FORMATS, ModelScheme
from quantpress.numbers.grid import Grid
from quantpress.numbers.types import Activations

from .artifacts import linears, load, logits, make, quantization_config, uniform
from .records import GRIDS, record

CT = FORMATS["compressed-tensors"]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (50, 96), (7, 32)])
def test_the_library_unpacks_our_weights(grid: Grid, shape: tuple[int, int]) -> None:
    q = record(grid, *shape)
    scheme = QuantizationConfig.model_validate(CT.config(ModelScheme({"x": grid}))).config_groups["group_0"]
    state = {name.removeprefix("x."): tensor for name, tensor in CT.pack("x", q).items()}
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(weight, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("grid", "dense"),
    [
        (Grid(group_size=32), ()),
        (Grid(group_size=32, symmetric=False), ()),
        (Grid(group_size=-1, symmetric=False), ("v_proj", "down_proj")),
        (Grid(bits=8, group_size=16), ()),
        (Grid(bits=3, group_size=32, symmetric=False), ()),
        (Grid(bits=2, group_size=16), ("o_proj",)),
    ],
    ids=str,
)
def test_transformers_loads_the_same_model(grid: Grid, dense: tuple[str, ...], tmp_path: Path) -> None:
    _, expected = make(tmp_path / "a", "compressed-tensors", uniform(grid, dense=dense))
    assert torch.equal(logits(load(tmp_path / "a")), logits(expected))


def test_transformers_loads_layers_of_several_kinds(tmp_path: Path) -> None:
    schemes = uniform(Grid(group_size=32), dense=("o_proj",))
    schemes |= {n: Grid(bits=8, group_size=-1) for n in schemes if n.endswith("down_proj")}
    schemes["model.layers.1.mlp.up_proj"] = Grid(bits=3, group_size=16)
    _, expected = make(tmp_path / "a", "compressed-tensors", schemes)
    assert torch.equal(logits(load(tmp_path / "a")), logits(expected))
    groups = quantization_config(tmp_path / "a")["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [5, 1, 1]


def test_zero_points_beside_another_scheme_load_up_to_transformers_5_22(tmp_path: Path) -> None:
    """The contracts say so; when a newer transformers loads them, they can stop."""
    schemes = uniform(Grid(group_size=32))
    schemes |= {n: Grid(bits=8, group_size=-1, symmetric=False) for n in schemes if n.endswith("down_proj")}
    _, expected = make(tmp_path / "a", "compressed-tensors", schemes)
    assert "dequantize" not in quantization_config(tmp_path / "a")  # by the first scheme, it would be another model
    if Version(transformers.__version__) < Version("5.23"):
        assert torch.equal(logits(load(tmp_path / "a")), logits(expected))
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(tmp_path / "a")


def test_transformers_dequantizes_a_file_of_zero_points_as_it_loads_it() -> None:
    names = dict.fromkeys(["a.q_proj", "a.k_proj"], Grid(symmetric=False))
    config = CT.config(ModelScheme(names))
    assert config["dequantize"] is True
    assert CT.grids(config, names) == names
    assert "dequantize" not in CT.config(ModelScheme(dict.fromkeys(names, Grid())))
    rounded = ModelScheme(names, activations=Activations(type="int8"))
    assert "dequantize" not in CT.config(rounded)  # its inputs would stay in 16 bit


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("several", [False, True])
def test_transformers_loads_other_families(family: str, several: bool, tmp_path: Path) -> None:
    four, eight = Grid(group_size=16), Grid(bits=8, group_size=-1)
    names = linears(family, tmp_path / "names")
    schemes = {n: eight if several and ("attn" in n or "attention" in n) else four for n in names}
    _, expected = make(tmp_path / "a", "compressed-tensors", dict(schemes), family=family)
    assert torch.equal(logits(load(tmp_path / "a")), logits(expected))


def test_experts_that_readers_would_mistake_are_refused() -> None:
    four = Grid(group_size=16)
    experts: dict[str, Grid | None] = {f"m.layers.0.mlp.experts.{k}.up_proj": four for k in range(3)}
    CT.config(ModelScheme(experts))
    CT.config(ModelScheme(experts | {"m.layers.0.attn.q_proj": Grid(symmetric=False)}))
    with pytest.raises(BadInput, match="the experts have 2 formats"):
        CT.config(ModelScheme(experts | {"m.layers.0.mlp.experts.2.up_proj": Grid(bits=8)}))


def test_one_kind_targets_every_linear() -> None:
    config = CT.config(ModelScheme(uniform(Grid(), dense=("down_proj",)), outside=["lm_head"]))
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"


def test_scattered_groups_are_refused() -> None:
    with pytest.raises(BadInput, match=r"has no g_idx: scattered groups .* need format gptq"):
        CT.check(Grid(), 64, 128, shuffled=True)
    with pytest.raises(BadInput, match="scattered columns"):
        CT.pack("x", record(Grid(group_size=16), 32, 64, shuffled=True))


def edited(**changes: object) -> dict[str, object]:
    config = CT.config(ModelScheme({"x": Grid(group_size=32)}))
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {key: value for key, value in changes.items() if key in weights or key == "actorder"}
    return config | {key: value for key, value in changes.items() if key == "format"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actorder": "group"}, "actorder='group' has been removed"),
        ({"type": "float"}, "format 'pack-quantized' cannot be read for mxfp4 weights, only 'mxfp4-pack-quantized'"),
        ({"type": "float", "num_bits": 8, "group_size": 64}, "floats of 8 bits, strategy 'group', group size 64"),
        ({"num_bits": 1}, "quantized to 1 bits"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        CT.grids(edited(**changes), ["x"])


def test_other_layouts_are_refused() -> None:
    config = CT.config(ModelScheme({"x": Grid(group_size=32)}))
    config["config_groups"]["group_0"]["format"] = "float-quantized"
    with pytest.raises(BadInput, match="format 'float-quantized' cannot be read for int4 g32 sym weights"):
        CT.grids(config, ["x"])


def test_configs_of_other_tools_are_read() -> None:
    config = CT.config(ModelScheme({"x": Grid(group_size=32)}))
    config |= {"ignore": ["lm_head", "re:.*gate$"], "version": "0.19.0", "sparsity_config": {}, "transform_config": {}}
    first = config["config_groups"]["group_0"]
    first["weights"] |= {"actorder": "static", "observer": "mse"}
    first["format"] = None
    eight = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    config["config_groups"]["group_1"] = eight
    assert CT.grids(config, ["a.up_proj", "a.down_proj", "a.gate", "lm_head"]) == {
        "a.up_proj": Grid(group_size=32),
        "a.down_proj": Grid(bits=8, group_size=-1),
        "a.gate": None,
        "lm_head": None,
    }
    config["config_groups"] = {"group_1": eight}
    assert CT.grids(config, ["a.up_proj"]) == {}
