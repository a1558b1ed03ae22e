"""The recipes that ship, and the others kept here so that their combinations stay tested.

Each loads, fits a model, is named after what it does and warns of what refuses it.
"""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.exports.servers import loaders
from quantpress.exports.servers.loader import refusal
from quantpress.formats import FORMATS
from quantpress.numbers.types import Activations, NumberType
from quantpress.recipe import Recipe
from quantpress.recipe.loading import groups, shipped
from quantpress.recipe.loading import load as load_file

TESTS = Path(__file__).parent
SHIPPED = sorted((TESTS.parent / "recipes").rglob("*.yaml"))
FILES = {path.stem: path for path in (*SHIPPED, *sorted((TESTS / "recipes").glob("*.yaml")))}
NAMES = sorted(FILES)
GGUF = [name for name in NAMES if name.startswith("gguf-")]
PACKED = [name for name in NAMES if name not in GGUF]


# What the first part of a name says: type and bits of the weights, type of the inputs (None: 16 bit).
NUMBERS: dict[str, tuple[str, int, str | None]] = {
    **{f"w{bits}a16": ("int", bits, None) for bits in (2, 3, 4, 8)},
    "w8a8": ("int", 8, "int8"), "w4a8": ("int", 4, "int8"), "w4afp8": ("int", 4, "fp8"),
    "fp8": ("fp8", 8, "fp8"), "mxfp8": ("mxfp8", 8, "mxfp8"), "mxfp4": ("mxfp4", 4, "mxfp4"),
    "mxfp4a16": ("mxfp4", 4, None), "nvfp4": ("nvfp4", 4, "nvfp4"), "nvfp4a16": ("nvfp4", 4, None),
}  # fmt: skip


def load(name: str) -> Recipe:
    """The recipe of that name, by its file."""
    return load_file(str(FILES[name]))


def linears(hidden: int, intermediate: int) -> dict[str, int]:
    """Linears {name: in_features} of a Llama-style model of three blocks."""
    attention = {f"model.layers.{i}.self_attn.{n}_proj": hidden for i in range(3) for n in "qkvo"}
    mlp = {f"model.layers.{i}.mlp.{n}_proj": hidden for i in range(3) for n in ("gate", "up")}
    return attention | mlp | {f"model.layers.{i}.mlp.down_proj": intermediate for i in range(3)}


DEFAULT_MODEL = linears(576, 1536)
LARGER_MODEL = linears(1024, 2816)


def comment(name: str) -> str:
    """The comment a recipe file opens with, on one line."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in opening)


# What a comment says of vLLM, and the loaders it says it of.
WARNINGS: dict[str, set[str]] = {
    r"\bvLLM refuses": {"vllm", "vllm-cpu"},
    r"\bvLLM's CPU backend (refuses|fails)": {"vllm-cpu"},
    r"\bvLLM's GPU backend refuses": {"vllm"},
}


def refused(recipe: Recipe) -> dict[str, str]:
    """Why vLLM's loaders do not load all of a recipe's artifacts, by their tables; only those that do not."""
    grids = [("weights", grid) for grid in recipe.schemes(LARGER_MODEL).values() if grid is not None]
    found = {}
    for loader in ("vllm", "vllm-cpu"):
        for format in recipe.formats:
            why = refusal(loaders()[loader], format, grids, recipe.activations, scattered=recipe.shuffled)
            found |= {} if why is None else {loader: why}
    return found


def fit(recipe: Recipe, model: dict[str, int]) -> None:
    """Raise BadInput for a linear of `model` that the grids or the formats cannot take."""
    for name, grid in recipe.schemes(model).items():
        if grid is not None:
            for format in recipe.formats:
                FORMATS[format].check(grid, 128, model[name], recipe.shuffled)


def test_the_package_holds_every_recipe_file_in_its_group() -> None:
    by_folder = {group: sorted(path.stem for path in SHIPPED if path.parent.name == group) for group in groups()}
    assert groups() == by_folder
    assert shipped() == sorted(path.stem for path in SHIPPED)  # each in a folder that is listed
    assert len(FILES) == len(SHIPPED) + len(list((TESTS / "recipes").iterdir()))  # no name twice
    assert 20 <= len(SHIPPED) <= 30
    assert groups()["start-here"][0] == "w4a16-gptq"


def test_a_bare_name_finds_it_in_whichever_group() -> None:
    for path in SHIPPED:
        assert load_file(path.stem) == load(path.stem)


def test_a_comment_names_only_recipes_that_are_there() -> None:
    """The shipped ones in those that ship; in the others any."""
    named = re.compile(r"\b(?:w[0-9]a\w+|gguf|fp8|nvfp4a16|mxfp4a16|modelopt)-[a-z0-9_-]+\b")
    known = set(shipped())
    for name, path in FILES.items():
        allowed = known if path in SHIPPED else set(NAMES)
        assert set(named.findall(comment(name))) <= allowed, name


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_says_when_to_choose_it(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.description
    assert len(comment(name)) > 60


@pytest.mark.parametrize("name", PACKED)
def test_its_name_tells_the_truth(name: str) -> None:
    recipe = load(name)
    weights, inputs = recipe.weights, recipe.activations
    served = name.startswith("modelopt-")
    numbers, *rest = name.removeprefix("modelopt-").split("-")
    family = weights.type.removesuffix("-block")
    assert NUMBERS[numbers] == (family, weights.bits, None if inputs is None else inputs.beside(weights).type)
    steps = [*(transform.name for transform in recipe.transforms), recipe.method.name]
    plain = recipe.method.name == "rtn" and (weights.type != "int" or recipe.transforms)  # goes without saying
    assert rest[: len(steps)] == steps or served or (plain and rest[: len(steps) - 1] == steps[:-1])
    assert served == (recipe.formats == ("modelopt",))
    assert ("kv8" in rest) <= (recipe.kv_cache is not None)
    assert ("block" in rest) == (weights.type == "fp8-block")
    assert ("static" in rest) == (inputs is not None and not inputs.dynamic and not served)
    assert "dynamic" not in rest or (inputs is not None and inputs.dynamic)
    groups = [part for part in rest if part.startswith("g") and part[1:].isdigit()]
    assert groups in ([], [f"g{recipe.weights.group_size}"])
    assert "sym" not in rest or recipe.weights.symmetric
    assert "channel" not in rest or recipe.weights.group_size == -1
    assert "-as-" not in name or recipe.formats == (name.rpartition("-as-")[2],)


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_recipe_is_named_after_its_method_and_type_and_warns_of_vllm(name: str) -> None:
    recipe = load(name)
    assert recipe.formats == ("gguf",)
    how = "" if recipe.method.name == "llama.cpp" else f"{recipe.method.name}-"
    assert name == f"gguf-{how}{'budget' if recipe.gguf_file.budget else recipe.gguf_file.type.lower()}"
    assert "vLLM loads no GGUF file" in comment(name)


@pytest.mark.parametrize("name", PACKED)
def test_it_fits_the_default_model_or_says_that_it_does_not(name: str) -> None:
    recipe = load(name)
    fit(recipe, LARGER_MODEL)
    if recipe.weights.group_size == 128:
        with pytest.raises(BadInput, match=r"576 is not a multiple of group_size 128|whole blocks .* is 128 x 576"):
            fit(recipe, DEFAULT_MODEL)
        assert "576" in recipe.description
        assert "576" in comment(name)
    else:
        fit(recipe, DEFAULT_MODEL)


@pytest.mark.parametrize("name", PACKED)
def test_it_warns_of_what_vllm_refuses(name: str) -> None:
    """On a GPU, on a CPU or on both, as it is."""
    warned = {loader for said, of in WARNINGS.items() if re.search(said, comment(name)) for loader in of}
    assert warned == set(refused(load(name))), refused(load(name))


@pytest.mark.parametrize("name", ["w4a16-gptq-down8", "w4a16-gptq-sensitive", "w8a16-gptq-g64"])
def test_its_8_bit_weights_are_for_vllms_gpu_kernels(name: str) -> None:
    assert "vllm" not in refused(load(name))


def test_no_two_do_the_same() -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        settings = load(name).model_dump_json(exclude={"name", "description"})
        assert settings not in seen, f"{name} is {seen[settings]}"
        seen[settings] = name


def test_bits_methods_and_formats_are_all_covered() -> None:
    covered = {(r.weights.bits, r.method.name, f) for r in map(load, PACKED) for f in r.formats}
    assert {(b, m, "compressed-tensors") for b in (2, 3, 4, 8) for m in ("rtn", "gptq")} <= covered
    assert {(b, "gptq", "gptq") for b in (2, 3, 4, 8)} <= covered


def test_every_pair_of_number_types_is_covered() -> None:
    """The names' first parts, and all types of weights and inputs that the schema knows."""
    recipes = [load(name) for name in PACKED]
    assert {name.removeprefix("modelopt-").split("-")[0] for name in PACKED} == set(NUMBERS)
    assert {recipe.weights.type for recipe in recipes} == set(get_args(NumberType))
    inputs = {recipe.activations.type for recipe in recipes if recipe.activations is not None}
    assert inputs == set(get_args(Activations.model_fields["type"].annotation))


def test_no_file_sets_its_name() -> None:
    documents: dict[str, dict[str, Any]] = {n: yaml.safe_load(path.read_text("utf-8")) for n, path in FILES.items()}
    assert [name for name, document in documents.items() if "name" in document] == []
