"""A format is added by its file, a row of FILE_FORMATS and a line in FORMATS: a toy one, written, read, converted."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.convert import convert
from quantpress.artifact.manifest import Manifest
from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.formats import FORMATS, Format, ModelScheme, detect
from quantpress.formats.base import grid_of, take
from quantpress.numbers.grid import QuantizedLinear
from quantpress.numbers.types import Activations, Grid
from quantpress.plugin import FileFormat
from quantpress.recipe import FILE_FORMATS
from quantpress.recipe.loading import parse

from ...tiny import build

CPU = torch.device("cpu")


class Toy(Format):
    """Codes, scales and zeros as they are; the names of the quantized linears stand in the config."""

    name = method = "toy"
    suffixes = ("codes", "scales", "zeros")

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        super().check(grid, out_features, in_features, shuffled)
        if grid.bits == 2:
            raise BadInput("toy takes 3 bits and more; use compressed-tensors")

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        return {f"{name}.codes": q.codes, f"{name}.scales": q.scales, f"{name}.zeros": q.zeros}

    def unpack(self, name: str, read: Callable[[str], Tensor], grid: Grid, shape: tuple[int, int]) -> QuantizedLinear:
        codes = take(f"{name}.codes", read, shape, torch.uint8)
        return QuantizedLinear(codes, read(f"{name}.scales"), read(f"{name}.zeros"), grid)

    def packed_bytes(
        self, grid: Grid, out_features: int, in_features: int, scale_bytes: int, activations: Activations | None = None
    ) -> int:
        return out_features * (in_features + (scale_bytes + 1) * in_features // grid.columns(in_features))

    def linears(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> dict[str, tuple[int, int]]:
        found = {name.removesuffix(".codes"): shape for name, shape in shapes.items() if name.endswith(".codes")}
        return {name: (shape[0], shape[1]) for name, shape in found.items()}

    def config(self, contents: ModelScheme) -> dict[str, Any]:
        grid = self.one_kind(contents)
        return {"quant_method": "toy", "bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric,
                "linears": [name for name, own in contents.schemes.items() if own is not None]}  # fmt: skip

    def grids(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Grid | None]:
        grid = grid_of(config["bits"], config["group_size"], config["sym"])
        return {name: grid if name in config["linears"] else None for name in names}

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"toy.json": {"linears": len(config["linears"])}}


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILE_FORMATS, "toy", FileFormat(("int",)))
    monkeypatch.setitem(FORMATS, "toy", Toy())


def run(folder: Path, model: Path, **document: Any) -> Manifest:
    recipe = parse({"model": str(model), "method": "rtn", "weights": {"group_size": 32}} | document)
    cache = folder.parent / "cache"
    return quantize(prepare(recipe, resolve(recipe.model, cache=cache)), Settings(folder, cache))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"formats": ["toyy"]}, r"formats\.0: unknown format, did you mean 'toy'\? .*gguf, toy\)"),
        ({"formats": ["toy"], "weights": {"type": "nvfp4"}}, "toy cannot hold nvfp4 weights; it takes type int"),
        ({"formats": ["toy"], "kv_cache": "fp8"}, "format toy holds weights only, no kv_cache"),
    ],
)
def test_a_recipe_knows_what_it_holds(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        parse(document)


def test_what_the_model_asks_of_it_is_checked_before_the_work(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    with pytest.raises(BadInput, match="toy takes 3 bits and more"):
        run(tmp_path / "a", tmp_path / "model", formats=["toy"], weights={"bits": 2, "group_size": 32})
    desc_act = {"order": "activation", "static_groups": False}
    with pytest.raises(BadInput, match=r"toy has no g_idx: .* need format gptq"):
        run(tmp_path / "b", tmp_path / "model", formats=["toy"], method=desc_act)
    build("gpt2", tmp_path / "gpt2", torch.bfloat16)
    with pytest.raises(BadInput, match="is a Conv1D, which readers of toy silently leave unquantized"):
        run(tmp_path / "c", tmp_path / "gpt2", formats=["toy"])
    assert not any((tmp_path / name).exists() for name in "abc")


def test_it_is_written_read_back_and_converted_both_ways(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    manifest = run(tmp_path / "run", tmp_path / "model", formats=["toy", "compressed-tensors"])
    assert manifest.artifact.format == "toy"
    artifact, _ = open_artifact(tmp_path / "run" / "quantized", CPU)
    assert (artifact.format, detect(artifact.config)) == ("toy", "toy")
    assert (tmp_path / "run" / "quantized" / "toy.json").read_text() == '{\n  "linears": 14\n}\n'
    convert(tmp_path / "run" / "converted" / "compressed-tensors", tmp_path / "back", "toy")
    again, _ = open_artifact(tmp_path / "back", CPU)
    other, _ = open_artifact(tmp_path / "run" / "converted" / "compressed-tensors", CPU)
    assert set(artifact.linears) == set(again.linears) == set(other.linears)
    for name in artifact.linears:
        weight = artifact.linear(name).dequantize()
        assert torch.equal(weight, again.linear(name).dequantize())
        assert torch.equal(weight, other.linear(name).dequantize())


def test_what_converts_lists_it(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    run(tmp_path / "run", tmp_path / "model")
    with pytest.raises(BadInput, match=r"unknown format 'tow', did you mean 'toy'\? \(known: .*modelopt, toy\)$"):
        convert(tmp_path / "run" / "quantized", tmp_path / "x", "tow")
    with pytest.raises(BadInput, match=r"quantized with 'hqq', which cannot be read; known: .*, toy$"):
        detect({"quantization_config": {"quant_method": "hqq"}})
