"""A new server takes its file, its line in the table and its test: a toy, added so to a copy of the package, works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantpress
from quantpress.numbers.types import Grid

from ..quantize.formats.artifacts import make, uniform
from ..tiny import build

FROM_RECIPE_TO_PACKAGE = """
import json, sys
from pathlib import Path
from quantpress.core.errors import BadInput
from quantpress.recipe import Recipe
from quantpress.recipe.loading import parse

torch_free = not {"torch", "transformers"} & set(sys.modules)
from quantpress.engine.job import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.contracts import check_job
from quantpress.exports.load_check import will_load
from quantpress.exports.package import export

folder = Path(sys.argv[1])
RECIPE = {"model": str(folder / "model"), "weights": {"group_size": 32}, "method": "rtn", "formats": ["gptq"],
          "targets": [{"name": "toy", "colour": "blue"}]}

def refusal(ask):
    try:
        ask()
    except BadInput as error:
        return str(error)

def check(keys):
    recipe = parse(RECIPE | keys)
    return check_job(prepare(recipe, resolve(recipe.model, cache=folder)))

recipe = parse(RECIPE)
answer = will_load(folder / "run", recipe.targets[0])
print(json.dumps({
    "torch_free": torch_free,
    "target": recipe.targets[0].model_dump(mode="json"),
    "unknown key": refusal(lambda: parse(RECIPE | {"targets": [{"name": "toy", "color": "red"}]})),
    "another format": refusal(lambda: parse(RECIPE | {"formats": ["awq"]})),
    "taken": check({}),
    "left out": refusal(lambda: check({"ignore": ["*.down_proj"]})),
    "two GPUs": refusal(lambda: check({"targets": [{"name": "toy", "tensor_parallel": 2}]})),
    "exported": str(export(folder / "run", recipe.targets[0]).folder),
    "answer": [answer.loads, answer.way, answer.by, *answer.passed_over],
    "schema": Recipe.model_json_schema()["$defs"],
    "smoke": parse({"smoke": {"server": "toy"}}).smoke.server,
}))
"""


def with_a_toy(folder: Path) -> Path:
    """A copy of the package in `folder`, links but for the servers, to which the toy is added; returns what to put on
    PYTHONPATH."""
    package = Path(quantpress.__file__).parent
    copy = folder / "quantpress"
    (copy / "exports").mkdir(parents=True)
    for inside in ("", "exports"):
        for entry in (package / inside).iterdir():
            if entry.name not in ("exports", "servers", "__pycache__"):
                (copy / inside / entry.name).symlink_to(entry)
    servers = copy / "exports" / "servers"
    shutil.copytree(package / "exports" / "servers", servers, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("toy_server.py"), servers / "toy.py")
    table = servers / "__init__.py"
    text = table.read_text(encoding="utf-8")
    text = text.replace("from . import ", "from . import toy, ", 1).replace("_FILES = (", "_FILES = (toy, ", 1)
    table.unlink()
    table.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a recipe with the toy as its target comes to."""
    folder = tmp_path_factory.mktemp("toy")
    build("llama", folder / "model")
    make(folder / "run" / "quantized", "gptq", uniform(Grid(group_size=32)))
    environment = os.environ | {"PYTHONPATH": str(with_a_toy(folder / "package"))}
    command = [sys.executable, "-c", FROM_RECIPE_TO_PACKAGE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_recipe_may_name_it_and_set_its_keys(found: dict[str, Any]) -> None:
    assert found["target"]["colour"] == "blue"
    assert found["unknown key"].startswith("recipe recipe: targets.0.toy.color: unknown key, did you mean 'colour'?")
    assert found["another format"].endswith("Toy reads gptq files, not awq: set formats: [gptq]")
    assert found["smoke"] == "toy"


def test_its_contract_is_checked_before_the_work(found: dict[str, Any]) -> None:
    assert found["taken"] == {"toy": "gptq"}
    assert "Toy wants every linear quantized, and model.layers.0.mlp.down_proj is not" in found["left out"]
    assert "Toy split over 2 GPUs would cut a scale group of 32" in found["two GPUs"]
    assert found["answer"] == [
        True, "contract", "quantpress's table of what Toy loads", "server: toy is not installed; `pip install toy`",
        "parser: Toy has no parser that runs here",
    ]  # fmt: skip


def test_its_folder_is_exported(found: dict[str, Any]) -> None:
    folder = Path(found["exported"])
    assert folder.name == "toy"
    assert "exec toy-server" in (folder / "serve.sh").read_text()
    assert json.loads((folder / "export.json").read_text())["command"][-2:] == ["--colour", "blue"]
    assert "Toy takes int4 g32 sym weights with 16 bit inputs on toy GPUs only." in (folder / "README.md").read_text()
    assert (folder / "compose.yaml").is_file()
    assert (folder / "kubernetes.yaml").is_file()


def test_editors_learn_of_it_from_the_schema(found: dict[str, Any]) -> None:
    assert found["schema"]["Toy"]["properties"]["colour"]["enum"] == ["red", "blue"]
    assert "toy" in found["schema"]["Smoke"]["properties"]["server"]["enum"]


def test_the_servers_load_without_torch(found: dict[str, Any]) -> None:
    assert found["torch_free"]
