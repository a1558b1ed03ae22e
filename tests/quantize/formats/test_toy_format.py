"""A format is added by its file, a row of FILE_FORMATS and a line in FORMATS: a toy one, written, read, converted."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.convert import convert
from quantpress.artifact.manifest import Manifest
from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.formats import FORMATS, detect
from quantpress.numbers.types import Grid
from quantpress.plugin import FileFormat
from quantpress.recipe import FILE_FORMATS
from quantpress.recipe.loading import parse

from ...tiny import build

CPU = torch.device("cpu")


EXAMPLE = Path(__file__).parents[3] / "docs" / "plug-in-example" / "quantpress_example" / "byte_format.py"
Bytes = runpy.run_path(str(EXAMPLE))["Bytes"]


class Toy(Bytes):
    """The documented example, with a limit and a file of its own."""

    name = method = "toy"

    def check(self, grid: Grid, out_features: int, in_features: int, shuffled: bool) -> None:
        super().check(grid, out_features, in_features, shuffled)
        if grid.bits == 2:
            raise BadInput("toy takes 3 bits and more; use compressed-tensors")

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
