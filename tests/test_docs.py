"""What the documents show can be done: their commands exist, and their recipes are valid, to us and to editors."""

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from quantpress.cli.app import app
from quantpress.recipe import Recipe
from quantpress.recipe.loading import load, parse

ROOT = Path(__file__).parent.parent


def scripts(document: Any) -> list[str]:
    """Every command line of a pipeline."""
    if isinstance(document, dict):
        own = [document["run"]] if isinstance(document.get("run"), str) else document.get("script", [])
        return [*own, *(line for value in document.values() for line in scripts(value))]
    return [line for item in document for line in scripts(item)] if isinstance(document, list) else []


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml"])
def test_a_pipeline_runs_a_valid_recipe_with_gates(name: str) -> None:
    document = yaml.safe_load((ROOT / "docs" / "ci" / name).read_text(encoding="utf-8"))
    variables = document.get("env") or document["variables"]
    lines = scripts(document)
    targets = {target for line in lines for target in re.findall(r"^make ([\w-]+)", line)}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    run = shlex.split(next(line for line in lines if "quantpress run" in line))
    assert run[2:5] == ["$RECIPE", "--model", "$MODEL"]
    sets = [run[i + 1] for i, word in enumerate(run) if word == "--set"]
    recipe = load(variables["RECIPE"], sets)
    assert recipe.gates.limits()
    assert recipe.targets
    assert recipe.smoke is not None


def test_gitlabs_cache_has_a_key_whatever_the_model() -> None:
    """A key may hold no slash, and neither may what is filled in: MODEL is a hub id, RECIPE may be a file."""
    document = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab.yml").read_text(encoding="utf-8"))
    key = document["release"]["cache"]["key"]
    assert "/" not in key
    assert not any(f"${name}" in key for name in document["variables"])


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipe_of_the_readme_is_valid() -> None:
    block = re.search(r"\n((?:    .*\n)*?    name: .*\n(?:    .*\n)+)", README)
    assert block is not None
    assert parse(yaml.safe_load(block[1])).gates.limits()


def test_editors_accept_what_loads_and_refuse_what_does_not() -> None:
    schema = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    block = re.search(r"\n((?:    .*\n)*?    name: .*\n(?:    .*\n)+)", README)
    assert block is not None
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
    for text in (*texts, block[1], "{method: rtn, transforms: [awq], gates: {max_kl: 0.1}, evaluation: {tasks: [a]}}"):
        schema.validate(yaml.safe_load(text))
    for wrong in ("{method: {name: gtpq}}", "{methud: rtn}", "{weights: {bits: 5}}", "{calibration: {samples: many}}"):
        assert not schema.is_valid(yaml.safe_load(wrong)), wrong


def test_the_commands_of_the_readme_exist_with_their_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = {found[1] for found in re.finditer(r"(?<!from )quantpress ([a-z][^`\n|]*)", README)}
    for name, *words in (line.split() for line in lines):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, name
    shown = {line.split()[0] for line in lines} | set(re.findall(r"`([a-z]+)[ `]", README))
    assert set(commands) - shown == set()


def test_the_repository_layout_of_the_readme_has_every_folder() -> None:
    layout = README[README.index("## Repository layout") :].split("\n## ")[0]
    there = {
        path.parent.name for top in ("quantize", "eval", "export", "recipes") for path in ROOT.glob(f"{top}/**/*.py")
    }
    assert {name for name in there if f" {name}/" not in layout} == set()
