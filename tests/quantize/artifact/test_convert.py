"""Conversion keeps every code, scale and zero, and refuses what it cannot keep."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantpress import cli
from quantpress.artifact import convert
from quantpress.artifact.convert import convert as convert_folder
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.formats import FORMATS, ModelScheme, detect
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import write_part
from quantpress.numbers.grid import Grid, QuantizedLinear

from ..formats.artifacts import Schemes, linears, load, logits, make, quantization_config, uniform
from ..formats.records import equal, with_scales

FOUR = Grid(group_size=32)
ASYMMETRIC = Grid(group_size=32, symmetric=False)


def several() -> Schemes:
    schemes = uniform(FOUR, dense=("o_proj",))
    return schemes | {n: Grid(bits=8, group_size=-1) for n in schemes if n.endswith("down_proj")}


CASES: dict[str, Schemes] = {
    "4 bits": uniform(FOUR),
    "4 bits asymmetric": uniform(ASYMMETRIC, dense=("v_proj",)),
    "3 bits": uniform(Grid(bits=3, group_size=16)),
    "2 bits channel": uniform(Grid(bits=2, group_size=-1, symmetric=False)),
    "several": several(),
}


def records(folder: Path, schemes: Schemes, shapes: dict[str, tuple[int, int]]) -> dict[str, QuantizedLinear]:
    checkpoint = Checkpoint(folder)
    format = detect(checkpoint.config)
    assert format is not None
    grids = FORMATS[format].grids(checkpoint.config["quantization_config"], list(schemes))
    assert {n: g for n, g in grids.items() if g is not None} == {n: g for n, g in schemes.items() if g is not None}
    return {n: FORMATS[format].unpack(n, checkpoint.read, g, shapes[n]) for n, g in schemes.items() if g is not None}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_PART_BYTES", 10_000)  # several parts
    before, _ = make(tmp_path / "ct", "compressed-tensors", CASES[case])
    shapes = {name: (q.out_features, q.in_features) for name, q in before.items()}
    convert_folder(tmp_path / "ct", tmp_path / "gptq", "gptq")
    convert_folder(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    as_gptq, back = (records(tmp_path / f, CASES[case], shapes) for f in ("gptq", "back"))
    for name, q in before.items():
        assert equal(as_gptq[name], with_scales(q, torch.float16))
        assert equal(back[name], q)
    first, last = Checkpoint(tmp_path / "ct"), Checkpoint(tmp_path / "back")
    assert set(first.names()) == set(last.names())
    assert all(torch.equal(first.read(n), last.read(n)) for n in first.names())
    if case != "several":  # their groups may change places
        assert first.config == last.config
    # A converted folder says what one written in that format says.
    direct = FORMATS["gptq"].config(ModelScheme(CASES[case], outside=["lm_head"]))
    assert quantization_config(tmp_path / "gptq") == direct
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == direct
    assert "quantize_config.json" in Checkpoint(tmp_path / "gptq").file_hashes()
    assert (tmp_path / "gptq" / "tokenizer.json").read_bytes() == (tmp_path / "ct" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back" / "quantize_config.json").exists()


@pytest.mark.parametrize("origin", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("grid", [FOUR, ASYMMETRIC, Grid(group_size=-1)], ids=str)
def test_to_awq_and_back(origin: str, grid: Grid, tmp_path: Path) -> None:
    schemes = uniform(grid, dense=("down_proj",))
    before, _ = make(tmp_path / "a", origin, schemes)
    convert_folder(tmp_path / "a", tmp_path / "awq", "awq")
    convert_folder(tmp_path / "awq", tmp_path / "back", origin)
    shapes = {name: (q.out_features, q.in_features) for name, q in before.items()}
    for name, q in records(tmp_path / "awq", schemes, shapes).items():
        assert equal(q, with_scales(before[name], torch.float16))
    first, last = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "back")
    assert set(first.names()) == set(last.names())
    assert all(torch.equal(first.read(n), last.read(n)) for n in first.names())
    assert first.config == last.config
    assert quantization_config(tmp_path / "awq") == FORMATS["awq"].config(ModelScheme(schemes, outside=["lm_head"]))


@pytest.mark.parametrize(
    ("origin", "grid"),
    [
        *((origin, Grid(group_size=64)) for origin in ("compressed-tensors", "gptq", "awq")),
        *((origin, Grid(bits=8, group_size=-1)) for origin in ("compressed-tensors", "gptq")),
    ],
    ids=str,
)
def test_to_modelopt_and_back(origin: str, grid: Grid, tmp_path: Path) -> None:
    schemes = uniform(grid, dense=("down_proj",))  # 96 columns
    before, _ = make(tmp_path / "a", origin, schemes)
    convert_folder(tmp_path / "a", tmp_path / "m", "modelopt")
    convert_folder(tmp_path / "m", tmp_path / "back", origin)
    shapes = {name: (q.out_features, q.in_features) for name, q in before.items()}
    for name, q in records(tmp_path / "m", schemes, shapes).items():
        assert equal(q, before[name])
    first, last = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "back")
    assert set(first.names()) == set(last.names())
    assert all(torch.equal(first.read(n), last.read(n)) for n in first.names())
    assert first.config == last.config
    direct = FORMATS["modelopt"].config(ModelScheme(schemes, outside=["lm_head"]))
    assert quantization_config(tmp_path / "m") == direct
    file = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())
    assert file == FORMATS["modelopt"].extra_files(direct)["hf_quant_config.json"]


def with_cache(folder: Path) -> dict[str, torch.Tensor]:
    """Gives an artifact of compressed-tensors the scales of an FP8 cache; returns them by name."""
    checkpoint = Checkpoint(folder)
    scales = {f"model.layers.{k}.self_attn.{x}_scale": torch.tensor(0.1 + k) for k in range(2) for x in "kv"}
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    for old in folder.glob("model*"):
        old.unlink()
    write_part(folder / "model.safetensors", tensors | scales)
    config = checkpoint.config
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    write_json(folder / "config.json", config)
    return scales


def test_the_scales_of_the_cache_go_along(tmp_path: Path) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(Grid(bits=8, group_size=-1)))
    scales = with_cache(tmp_path / "a")
    convert_folder(tmp_path / "a", tmp_path / "m", "modelopt")
    written = Checkpoint(tmp_path / "m")
    for name, scale in scales.items():
        letter = name[-7]
        assert name not in written
        assert written.read(name.replace(f".{letter}_scale", f".{letter}_proj.{letter}_scale")) == scale
    assert FORMATS["modelopt"].kv_cache(quantization_config(tmp_path / "m")) == "fp8"
    file = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())
    assert file["quantization"]["kv_cache_quant_algo"] == "FP8"
    with pytest.raises(BadInput, match="gptq holds weights only"):
        convert_folder(tmp_path / "a", tmp_path / "g", "gptq")


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_routers_are_named_where_the_source_does_not(to: str, tmp_path: Path) -> None:
    """A source that lists its targets says nothing of what they do not take in."""
    names = linears("mixtral", tmp_path / "names")
    make(tmp_path / "a", "compressed-tensors", dict.fromkeys(names, FOUR), family="mixtral")
    config = Checkpoint(tmp_path / "a").config
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*_proj$", r"re:.*\.w\d$"]
    write_json(tmp_path / "a" / "config.json", config)
    convert_folder(tmp_path / "a", tmp_path / "b", to)
    routers = sorted(n.removesuffix(".weight") for n in Checkpoint(tmp_path / "b").names() if n.endswith("gate.weight"))
    assert len(routers) == 2
    assert FORMATS[to].grids(quantization_config(tmp_path / "b"), routers) == dict.fromkeys(routers)
    assert not any("embed" in str(value) for value in quantization_config(tmp_path / "b").values())


def test_transformers_loads_what_came_from_gptq(tmp_path: Path) -> None:
    _, expected = make(tmp_path / "gptq", "gptq", uniform(ASYMMETRIC, dense=("down_proj",)))
    convert_folder(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors")
    assert torch.equal(logits(load(tmp_path / "ct")), logits(expected))


def test_an_untied_head_stays_out_of_both(tmp_path: Path) -> None:
    make(tmp_path / "gptq", "gptq", uniform(FOUR))
    checkpoint = Checkpoint(tmp_path / "gptq")
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    head = torch.randn(256, 64, dtype=torch.bfloat16)
    for old in (tmp_path / "gptq").glob("model*"):
        old.unlink()
    write_part(tmp_path / "gptq" / "model.safetensors", tensors | {"lm_head.weight": head})
    write_json(tmp_path / "gptq" / "config.json", checkpoint.config | {"tie_word_embeddings": False})
    convert_folder(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors")
    assert quantization_config(tmp_path / "ct")["ignore"] == ["lm_head"]
    assert torch.equal(load(tmp_path / "ct").lm_head.weight, head)


def test_asymmetric_version_1_becomes_version_2(tmp_path: Path) -> None:
    """An older tool's file: the label is changed, so the same stored zeros now mean one more."""
    before, _ = make(tmp_path / "old", "gptq", uniform(ASYMMETRIC))
    config = Checkpoint(tmp_path / "old").config
    config["quantization_config"]["checkpoint_format"] = "gptq"
    write_json(tmp_path / "old" / "config.json", config)
    convert_folder(tmp_path / "old", tmp_path / "new", "gptq")
    shapes = {name: (q.out_features, q.in_features) for name, q in before.items()}
    for name, q in records(tmp_path / "new", uniform(ASYMMETRIC), shapes).items():
        assert torch.equal(q.zeros, before[name].zeros + 1 & 15)
        assert torch.equal(q.codes, before[name].codes)
    assert quantization_config(tmp_path / "new")["checkpoint_format"] == "gptq_v2"


def test_the_manifest_follows(tmp_path: Path) -> None:
    make(tmp_path / "ct", "compressed-tensors", uniform(FOUR))
    write_json(tmp_path / "ct" / "manifest.json", {"name": "r", "artifact": {"format": "x", "parameters": 1000}})
    convert_folder(tmp_path / "ct", tmp_path / "gptq", "gptq")
    manifest = json.loads((tmp_path / "gptq" / "manifest.json").read_text())
    total = Checkpoint(tmp_path / "gptq").total_bytes
    assert manifest["name"] == "r"
    assert manifest["converted_from"] == {"format": "compressed-tensors"}
    sizes = manifest["artifact"]
    assert (sizes["format"], sizes["bytes"], sizes["bits_per_parameter"]) == ("gptq", total, 8 * total / 1000)
    # 4 bits, 16/32 for scales, 4/32 for zeros, and g_idx: 32 bits a column over 16 to 96 rows.
    assert 4.625 < sizes["quantized_bits_per_weight"] < 4.625 + 32 / 32


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("format", "schemes", "to", "message"),
    [
        ("compressed-tensors", uniform(FOUR), "compressed-tensors", "is in format compressed-tensors already"),
        ("compressed-tensors", uniform(FOUR), "hqq", "unknown format 'hqq'"),
        ("compressed-tensors", uniform(FOUR), "gptq-v1-asymmetric", "unknown format"),
        (
            "compressed-tensors",
            uniform(FOUR) | {"model.layers.1.mlp.up_proj": ASYMMETRIC},
            "gptq",
            "symmetric and asymmetric layers in one model",
        ),
        ("gptq", uniform(FOUR), "modelopt", r"_proj: modelopt: no reader takes int4 g32 sym weights"),
        ("gptq", several(), "awq", r"down_proj: awq holds 4-bit integers, not int8 channel sym"),
        (
            "gptq",
            uniform(FOUR) | {"model.layers.1.mlp.up_proj": Grid(group_size=16)},
            "awq",
            "awq has one kind of weight",
        ),
    ],
)
def test_what_cannot_be_converted(format: str, schemes: Schemes, to: str, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a", format, schemes)
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=message):
        convert_folder(tmp_path / "a", tmp_path / "b", to)
    assert listing(tmp_path) == before


def test_scattered_groups_leave_nothing_behind(tmp_path: Path) -> None:
    make(tmp_path / "a", "gptq", uniform(Grid(group_size=16)), shuffled=True)
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=r"has no g_idx: scattered groups"):
        convert_folder(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("stated", [False, True])
def test_the_columns_decide_and_not_desc_act(stated: bool, tmp_path: Path) -> None:
    for name, scattered in (("plain", False), ("scattered", True)):
        before, _ = make(tmp_path / name, "gptq", uniform(ASYMMETRIC), shuffled=scattered)
        config = Checkpoint(tmp_path / name).config
        config["quantization_config"]["desc_act"] = stated
        write_json(tmp_path / name / "config.json", config)
        if scattered:
            with pytest.raises(BadInput, match=r"layers\.\d\..*_proj: compressed-tensors has no g_idx"):
                convert_folder(tmp_path / name, tmp_path / "ct-scattered", "compressed-tensors")
        else:
            convert_folder(tmp_path / name, tmp_path / "ct", "compressed-tensors")
            shapes = {n: (q.out_features, q.in_features) for n, q in before.items()}
            after = records(tmp_path / "ct", uniform(ASYMMETRIC), shapes)
            assert all(torch.equal(after[n].codes, q.codes) for n, q in before.items())
        # Relabelled as version 1, so that gptq can be written from gptq: what is written says what the columns are.
        config["quantization_config"]["checkpoint_format"] = "gptq"
        write_json(tmp_path / name / "config.json", config)
        convert_folder(tmp_path / name, tmp_path / f"{name}-2", "gptq")
        assert quantization_config(tmp_path / f"{name}-2")["desc_act"] is scattered


def test_one_scattered_linear_is_enough(tmp_path: Path) -> None:
    make(tmp_path / "a", "gptq", uniform(FOUR))
    checkpoint = Checkpoint(tmp_path / "a")
    name = "model.layers.1.mlp.up_proj.g_idx"
    shard = tmp_path / "a" / checkpoint.file_of(name)
    tensors = {n: checkpoint.read(n) for n in checkpoint.names() if checkpoint.file_of(n) == shard.name}
    write_part(shard, tensors | {name: tensors[name].flip(0)})
    with pytest.raises(BadInput, match=r"^model\.layers\.1\.mlp\.up_proj: compressed-tensors has no g_idx"):
        convert_folder(tmp_path / "a", tmp_path / "b", "compressed-tensors")


def test_scales_out_of_range_leave_nothing_behind(tmp_path: Path) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(FOUR))
    checkpoint = Checkpoint(tmp_path / "a")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    shard = tmp_path / "a" / checkpoint.file_of(name)
    tensors = {n: checkpoint.read(n) for n in checkpoint.names() if checkpoint.file_of(n) == shard.name}
    tensors[name][0, 0] = 1e-9
    write_part(shard, tensors)
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj: gptq stores scales in float16"):
        convert_folder(tmp_path / "a", tmp_path / "b", "gptq")
    assert listing(tmp_path) == before


def test_a_target_that_exists_and_a_plain_source(tmp_path: Path) -> None:
    make(tmp_path / "a", "compressed-tensors", uniform(FOUR))
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match="b exists; give a new folder"):
        convert_folder(tmp_path / "a", tmp_path / "b", "gptq")
    with pytest.raises(BadInput, match="a-plain is not quantized"):
        convert_folder(tmp_path / "a-plain", tmp_path / "c", "gptq")
    assert listing(tmp_path / "b") == set()


def test_the_inverse_of_a_global_scale_must_be_exact() -> None:
    grid, zeros = Grid.model_validate({"type": "nvfp4"}), torch.zeros(1, 1, dtype=torch.uint8)
    q = QuantizedLinear(torch.zeros(1, 16, dtype=torch.uint8), zeros.float(), zeros, grid)
    for scale, exact in ((2.0**-20, True), (8192.0, True), (2688 / 3, False)):
        given = replace(q, global_scale=torch.tensor(scale))
        if exact:
            convert._check_inverse("x", given)
            continue
        with pytest.raises(BadInput, match="x: its global scale 896 is not a power of two"):
            convert._check_inverse("x", given)


def test_a_gguf_file_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="whose numbers no other format has"):
        convert_folder(tmp_path / "run", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "complaint"), [("notes.txt/x", "Not a directory"), ("n" * 300, "File name too long")]
)
def test_a_target_that_no_folder_can_have_is_one_line(
    target: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "ct", "compressed-tensors", uniform(FOUR))
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(
        sys, "argv", ["quantpress", "convert", str(tmp_path / "ct"), str(tmp_path / target), "--to", "gptq"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"quantpress: {tmp_path / target}")
    assert said.endswith(f": {complaint}; give another path")
