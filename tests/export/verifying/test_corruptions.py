"""Damaged artifacts of every format: each kind of damage is seen, by what is said to see it; a good one is not."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantpress.exports.verify import verify

from . import damage, gguf_damage, runs
from .damage import Damage

# Of each format, and each way that numbers are stored in it.
FAST = ("w4a16-rtn", "fp8-kv8", "nvfp4a16", "gguf-q8_0")
ALL = (
    *FAST, "w4a16-gptq-sym-g64", "w4a16-awq-as-awq", "w4a16-awq", "nvfp4", "w8a8-smoothquant-gptq", "modelopt-fp8",
    "modelopt-nvfp4", "modelopt-w4a16-awq", "gguf-gptq-q4_k_m", "w3a16-gptq", "mxfp4",
)  # fmt: skip
TABLES = {"itself": "BY_ITSELF", "manifest": "BY_MANIFEST", "original": "BY_ORIGINAL"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrupted")
    runs.original(folder / "model")
    return folder


def made(place: Path, recipe: str) -> Path:
    """The artifact folder of a run of the recipe, made when it is first asked for."""
    if not (place / recipe).is_dir():
        runs.make(recipe, place / "model", place / recipe)
    return place / recipe / "quantized"


def damages(recipe: str, level: str) -> dict[str, tuple[Damage, str]]:
    found: dict[str, tuple[Damage, str]] = getattr(gguf_damage if recipe.startswith("gguf") else damage, TABLES[level])
    return found


def told(place: Path, recipe: str, level: str, name: str, scratch: Path) -> list[str] | None:
    """What is said of a copy that was damaged so; None where the damage does not apply. Hashes are of no use."""
    source, copy = made(place, recipe), scratch / "artifact"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["artifact"]["files"] = manifest["model"]["files"] = {}
    if level != "manifest" and not (level == "original" and manifest["recipe"]["transforms"]):
        (copy / "manifest.json").unlink()  # what transforms did can only be undone with it
    else:
        (copy / "manifest.json").write_text(json.dumps(manifest))
    apply, _ = damages(recipe, level)[name]
    if apply(copy) is False:
        return None
    return list(verify(copy, original=place / "model" if level == "original" else "").problems)


def cases(recipes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    for recipe in recipes:
        for level in TABLES:
            for name in damages(recipe, level):
                yield recipe, level, name


# In the quick suite each kind of damage is done once, to the first artifact that it applies to.
@pytest.mark.parametrize("recipe", FAST)
def test_every_kind_of_damage_is_seen_once(recipe: str, place: Path, tmp_path: Path) -> None:
    if recipe.startswith("gguf"):
        pytest.importorskip("llama_cpp")  # its quantizer makes the file
    missed = {}
    for _, level, name in cases((recipe,)):
        if (level, name) in DONE:
            continue
        lines = told(place, recipe, level, name, tmp_path)
        if lines is None:
            continue
        DONE.add((level, name))
        if not any(re.search(damages(recipe, level)[name][1], line) for line in lines):
            missed[level, name] = lines
    assert missed == {}


DONE: set[tuple[str, str]] = set()


@pytest.mark.slow
def test_all_damage_to_all_formats(place: Path, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """Prints the share that is seen, of every kind of artifact."""
    missed = {}
    for level in TABLES:
        tried = seen = 0
        for recipe, _, name in (case for case in cases(ALL) if case[1] == level):
            lines = told(place, recipe, level, name, tmp_path)
            if lines is None:
                continue
            tried, seen = tried + 1, seen + bool(lines)
            if not any(re.search(damages(recipe, level)[name][1], line) for line in lines):
                missed[recipe, level, name] = lines
        tell(f"damage by {level}: {seen} of {tried} seen")
    assert missed == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", runs.RECIPES)
def test_no_good_artifact_is_told_of(recipe: str, place: Path) -> None:
    """Of every recipe that ships or is tested: by its manifest, without it, beside the original."""
    try:
        run = made(place, recipe).parent
    except Exception as error:  # what this machine lacks for it, or what the tiny model is too small for
        pytest.skip(str(error)[:100])
    done = verify(run, original=place / "model")
    assert done.problems == ()
    assert len(done.reached) == 3
    bare = place / "bare"
    shutil.rmtree(bare, ignore_errors=True)
    shutil.copytree(run / "quantized", bare, ignore=shutil.ignore_patterns("manifest.json"))
    assert verify(bare).problems == ()
