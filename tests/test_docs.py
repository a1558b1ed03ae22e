"""The pipelines in docs/ci do what they say: their commands parse, and their recipes are valid."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantpress.quantize.recipe.file import load

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
