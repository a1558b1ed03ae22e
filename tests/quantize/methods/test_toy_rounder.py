"""A rounder is added by its function, its settings and a line in ROUNDERS: a toy one, from recipe to artifact."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.manifest import Manifest
from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.methods import ROUNDERS, Rounded
from quantpress.methods.rtn import rtn
from quantpress.numbers.types import Grid, NumberType
from quantpress.recipe import Gptq, MethodSettings, Recipe, Rtn, loading

from ...tiny import build, text


class Toy(MethodSettings):
    """Round to nearest after each column moved by a share of the drift that comes in with it."""

    types: ClassVar[tuple[NumberType, ...]] = ("int",)
    calibrated: ClassVar[bool] = True
    paired: ClassVar[bool] = True  # type: ignore[misc, assignment]

    name: Literal["toy"] = "toy"
    share: float = Field(0.5, ge=0, le=1)


class WithToy(Recipe):
    method: Annotated[Rtn | Gptq | Toy, Field(discriminator="name")] = Gptq()  # type: ignore[assignment]


SEEN: list[tuple[Tensor, Tensor | None]] = []


def toy(
    weight: Tensor, grid: Grid, settings: MethodSettings, moment: Tensor | None = None, drift: Tensor | None = None
) -> Rounded:
    if moment is None or not isinstance(settings, Toy):
        raise ValueError("toy needs a moment and its own settings")
    SEEN.append((moment, drift))
    half = (weight.float() * settings.share).to(weight.dtype)
    return Rounded(rtn(half, grid, Rtn()).linear, note=f"shrunk to {settings.share:g}")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> type[Recipe]:
    """The recipe as it is once a line in `Method` and one in ROUNDERS name the toy."""
    monkeypatch.setitem(ROUNDERS, "toy", toy)
    monkeypatch.setattr(loading, "Recipe", WithToy)
    SEEN.clear()
    return WithToy


def run(folder: Path, model: Path, document: dict[str, Any], words: str = "") -> Manifest:
    file = folder.parent / "calibration.txt"
    file.write_text(words or text())
    calibration = {"samples": 4, "seq_len": 32, "source": str(file)} | document.pop("calibration", {})
    settings = document | {"model": str(model), "weights": {"group_size": 32}, "calibration": calibration}
    parsed = loading.parse(settings)
    cache = folder.parent / "cache"
    return quantize(prepare(parsed, resolve(parsed.model, cache=cache)), Settings(folder, cache))


@pytest.mark.usefixtures("recipe")
def test_the_recipe_knows_what_the_toy_says_of_itself() -> None:
    parsed = loading.parse({"method": {"name": "toy", "share": 0.25}})
    assert parsed.method == parsed.rounder == Toy(share=0.25)
    assert (parsed.calibrated, parsed.paired, parsed.tuned, parsed.shuffled) == (True, True, False, False)
    assert loading.parse({"method": "toy"}).method == Toy()
    for document, expected in (
        ({"method": {"name": "toy", "shard": 1}}, r"method\.toy\.shard: unknown key, did you mean 'share'\?"),
        ({"method": "toy", "weights": {"type": "nvfp4"}}, "method toy takes weights of type int, not nvfp4"),
        ({"method": "toy", "formats": ["gguf"]}, "format gguf with method toy: it takes rtn, gptq, llama.cpp"),
        ({"method": "toyy"}, r"unknown name 'toyy', did you mean 'toy'\?"),
    ):
        with pytest.raises(BadInput, match=expected):
            loading.parse(document)


@pytest.mark.usefixtures("recipe")
def test_the_engine_rounds_with_it(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", torch.bfloat16)
    manifest = run(tmp_path / "run", tmp_path / "model", {"method": {"name": "toy", "share": 0.5}})
    assert {layer.note for layer in manifest.layers} == {"shrunk to 0.5"}
    assert manifest.recipe["method"] == {"name": "toy", "share": 0.5}
    artifact, _ = open_artifact(tmp_path / "run" / "quantized", torch.device("cpu"))
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    expected = rtn((weight.float() * 0.5).bfloat16(), Grid(group_size=32), Rtn()).linear
    assert torch.equal(artifact.linear(name).codes, expected.codes)
    assert len(SEEN) == 8  # the linears that share inputs are rounded together: four stages a block
    assert all(drift is not None and drift.shape == moment.shape for moment, drift in SEEN)


@pytest.mark.usefixtures("recipe")
def test_where_no_token_came_by_it_falls_back_to_nearest_and_says_so(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    document = {"method": "toy", "calibration": {"samples": 1, "seq_len": 16}}
    manifest = run(tmp_path / "run", tmp_path / "model", document, words="a" * 4000)  # one token: one pair of experts
    layers = {layer.name: layer for layer in manifest.layers}
    unseen = [layer for layer in layers.values() if not layer.tokens]
    assert unseen
    assert {layer.note for layer in unseen} == {"no calibration token reached it: rounded to nearest"}
    seen = [layer.note or "" for layer in layers.values() if layer.tokens]
    assert all(note.startswith("shrunk to 0.5") for note in seen)
