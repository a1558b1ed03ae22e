"""The recipes that ship: each loads, fits a model, is named after what it does and warns of what refuses it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from quantpress.quantize.errors import BadInput
from quantpress.quantize.recipe import Gptq, Recipe
from quantpress.quantize.recipe_file import load, shipped

FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
NAMES = sorted(path.stem for path in FILES)


def linears(hidden: int, intermediate: int) -> dict[str, int]:
    """Linears {name: in_features} of a Llama-style model of three blocks."""
    attention = {f"model.layers.{i}.self_attn.{n}_proj": hidden for i in range(3) for n in "qkvo"}
    mlp = {f"model.layers.{i}.mlp.{n}_proj": hidden for i in range(3) for n in ("gate", "up")}
    return attention | mlp | {f"model.layers.{i}.mlp.down_proj": intermediate for i in range(3)}


DEFAULT_MODEL = linears(576, 1536)
LARGER_MODEL = linears(1024, 2816)


def comment(name: str) -> str:
    """The comment a recipe file opens with, on one line."""
    lines = (FILES[0].parent / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in opening)


def refusals(recipe: Recipe) -> list[str]:
    """What vLLM, on CPU, refuses in the artifacts of a recipe."""
    grids = [grid for grid in recipe.schemes(LARGER_MODEL).values() if grid is not None]
    reasons = []
    if any(grid.bits != 4 or grid.type != "int" for grid in grids):
        reasons.append("bits")
    if "modelopt" in recipe.formats and any(grid.type == "int" for grid in grids):
        reasons.append("integers of ModelOpt")
    if any(grid.group_size == -1 for grid in grids):
        reasons.append("per channel")
    if any(grid.group_size not in (-1, 32, 64, 128) for grid in grids):
        reasons.append("group size")
    if "gptq" in recipe.formats and any(not grid.symmetric for grid in grids):
        reasons.append("asymmetric GPTQ")
    if isinstance(recipe.method, Gptq) and not recipe.method.static_groups:
        reasons.append("desc_act")
    return reasons


def test_the_package_holds_every_recipe_file() -> None:
    assert shipped() == NAMES
    assert "w4a16-gptq" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_says_when_to_choose_it(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.description
    assert len(comment(name)) > 60


@pytest.mark.parametrize("name", NAMES)
def test_its_name_tells_the_truth(name: str) -> None:
    recipe = load(name)
    bits, *rest = name.removeprefix("modelopt-").split("-")
    assert name.startswith("modelopt-") == (recipe.formats == ("modelopt",))
    assert bits == (f"w{recipe.weights.bits}a16" if recipe.weights.type == "int" else recipe.weights.type)
    if recipe.weights.type == "int":
        assert rest[0] in (recipe.method.name, *(transform.name for transform in recipe.transforms))
    assert ("kv8" in rest) <= (recipe.kv_cache is not None)
    groups = [part for part in rest if part.startswith("g") and part[1:].isdigit()]
    assert groups in ([], [f"g{recipe.weights.group_size}"])
    assert "sym" not in rest or recipe.weights.symmetric
    assert "channel" not in rest or recipe.weights.group_size == -1
    assert "-as-" not in name or recipe.formats == (name.rpartition("-as-")[2],)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_default_model_or_says_that_it_does_not(name: str) -> None:
    recipe = load(name)
    recipe.schemes(LARGER_MODEL)
    if recipe.weights.group_size == 128:
        with pytest.raises(BadInput, match="576 is not a multiple of group_size 128"):
            recipe.schemes(DEFAULT_MODEL)
        assert "576" in recipe.description
        assert "576" in comment(name)
    else:
        recipe.schemes(DEFAULT_MODEL)


@pytest.mark.parametrize("name", NAMES)
def test_it_warns_of_what_vllm_refuses(name: str) -> None:
    text = comment(name)
    warns = "vLLM" in text and any(word in text for word in ("refuses", "fails", "not for serving"))
    assert warns == bool(refusals(load(name))), refusals(load(name))


def test_no_two_do_the_same() -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        settings = load(name).model_dump_json(exclude={"name", "description"})
        assert settings not in seen, f"{name} is {seen[settings]}"
        seen[settings] = name


def test_bits_methods_and_formats_are_all_covered() -> None:
    covered = {(r.weights.bits, r.method.name, f) for r in map(load, NAMES) for f in r.formats}
    assert {(b, m, "compressed-tensors") for b in (2, 3, 4, 8) for m in ("rtn", "gptq")} <= covered
    assert {(b, "gptq", "gptq") for b in (2, 3, 4, 8)} <= covered


def test_no_file_sets_its_name() -> None:
    documents: dict[str, dict[str, Any]] = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FILES}
    assert [name for name, document in documents.items() if "name" in document] == []
