"""The documented plug-in, a package of its own, from recipe to exported folder; and plug-ins that are wrong."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from .tiny import build

EXAMPLE = Path(__file__).parent.parent / "docs" / "plug-in-example"
FROM_RECIPE_TO_PACKAGE = """
import json, sys
from pathlib import Path
from quantpress import BadInput, Recipe, load_recipe
from quantpress.recipe.loading import parse

torch_free = not {"torch", "transformers"} & set(sys.modules)
import quantpress
from quantpress.artifact.artifact import open_artifact
import torch

folder = Path(sys.argv[1])
RECIPE = {"model": str(folder / "model"), "weights": {"group_size": 32}, "method": "stochastic", "formats": ["bytes"],
          "targets": [{"name": "acme", "colour": "blue"}]}

def refusal(ask):
    try:
        ask()
    except BadInput as error:
        return str(error)

quantpress.quantize(RECIPE, out=folder / "run")
artifact, _ = open_artifact(folder / "run" / "quantized", torch.device("cpu"))
name = next(iter(artifact.linears))
exported = quantpress.export(folder / "run", RECIPE["targets"])
answer = quantpress.verify(exported["acme"].folder, ["acme"], way="contract")
quantpress.convert(folder / "run", folder / "as-gptq", "gptq")
other, _ = open_artifact(folder / "as-gptq", torch.device("cpu"))
print(json.dumps({
    "torch_free": torch_free,
    "manifest": json.loads((folder / "run" / "manifest.json").read_text()),
    "codes": artifact.linear(name).codes.tolist(),
    "name": name,
    "converted": bool(torch.equal(artifact.linear(name).dequantize(), other.linear(name).dequantize())),
    "exported": str(exported["acme"].folder),
    "verified": answer.sound,
    "unknown key": refusal(lambda: parse(RECIPE | {"method": {"name": "stochastic", "sead": 1}})),
    "unknown target key": refusal(lambda: parse(RECIPE | {"targets": [{"name": "acme", "color": "red"}]})),
    "another format": refusal(lambda: parse(RECIPE | {"formats": ["awq"]})),
    "left out": refusal(lambda: quantpress.plan(RECIPE | {"ignore": ["*.down_proj"]})),
    "two GPUs": refusal(lambda: quantpress.plan(RECIPE | {"targets": [{"name": "acme", "tensor_parallel": 2}]})),
    "not float": refusal(lambda: parse(RECIPE | {"weights": {"type": "nvfp4"}, "targets": []})),
    "schema": Recipe.model_json_schema()["$defs"],
    "smoke": parse({"smoke": {"server": "acme"}}).smoke.server,
}))
"""


def installed(example: Path, site: Path) -> dict[str, str]:
    """`example` as pip would install it in `site`; returns the environment in which Python finds it."""
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    for package in (path for path in example.iterdir() if path.is_dir()):
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a recipe that names the example's method, format and server comes to."""
    folder = tmp_path_factory.mktemp("plugins")
    build("llama", folder / "model", torch.bfloat16)
    environment = installed(EXAMPLE, folder / "site")
    command = [sys.executable, "-c", FROM_RECIPE_TO_PACKAGE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"folder": str(folder)}


def test_a_recipe_knows_their_keys(found: dict[str, Any]) -> None:
    assert found["unknown key"].endswith(
        "method.stochastic.sead: unknown key, did you mean 'seed'? (known: name, seed)"
    )
    assert "targets.0.acme.color: unknown key, did you mean 'colour'?" in found["unknown target key"]
    assert found["another format"].endswith("Acme reads bytes files, not awq: set formats: [bytes]")
    assert "method stochastic takes weights of type int, not nvfp4" in found["not float"]
    assert found["smoke"] == "acme"
    assert found["torch_free"]


def test_editors_learn_of_them_from_the_schema(found: dict[str, Any]) -> None:
    assert found["schema"]["Acme"]["properties"]["colour"]["enum"] == ["red", "blue"]
    assert found["schema"]["Stochastic"]["properties"]["seed"]["description"] == "of the chance"
    assert "acme" in found["schema"]["Smoke"]["properties"]["server"]["enum"]


def test_the_contract_of_the_server_is_checked_before_the_work(found: dict[str, Any]) -> None:
    assert "Acme wants every linear quantized, and model.layers.0.mlp.down_proj is not" in found["left out"]
    assert "Acme split over 2 GPUs would cut a scale group of 32" in found["two GPUs"]


def test_the_engine_rounds_with_the_method_and_records_the_package(found: dict[str, Any]) -> None:
    manifest = found["manifest"]
    assert manifest["recipe"]["method"] == {"name": "stochastic", "seed": 0}
    assert manifest["versions"]["quantpress-example"] == "0.1"
    import transformers

    from quantpress.methods.rtn import rtn
    from quantpress.numbers.types import Grid
    from quantpress.recipe import Rtn

    model = transformers.AutoModelForCausalLM.from_pretrained(Path(found["folder"], "model"), dtype=torch.bfloat16)
    weight = model.get_submodule(found["name"]).weight.detach()
    nearest = rtn(weight, Grid(group_size=32), Rtn()).linear.codes
    moved = (torch.tensor(found["codes"]) - nearest.int()).abs()
    assert 0.1 < (moved > 0).float().mean() < 0.5  # a quarter, were weights spread evenly between grid points
    assert moved.max() <= 2


def test_the_format_is_written_read_verified_and_converted(found: dict[str, Any]) -> None:
    assert found["manifest"]["artifact"]["format"] == "bytes"
    assert found["converted"]
    assert found["verified"]


def test_the_folder_for_the_server_is_exported(found: dict[str, Any]) -> None:
    folder = Path(found["exported"])
    assert folder.name == "acme"
    assert "exec acme-server" in (folder / "serve.sh").read_text()
    assert json.loads((folder / "export.json").read_text())["command"][-2:] == ["--colour", "blue"]
    said = (folder / "README.md").read_text()
    assert "Acme takes int4 g32 sym weights with 16 bit inputs from version 1.0 on." in said


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ('[quantpress.methods]\nbad = "nowhere:Thing"', "cannot be imported (ModuleNotFoundError: No module named"),
        ('[quantpress.methods]\nbad = "json:dumps"', "has to be a MethodSettings, not <function dumps"),
        ('[quantpress.methods]\ngptq = "quantpress.plugin:MethodSettings"', "the name 'gptq' is taken"),
        ('[quantpress.servers]\nvllm = "json:dumps"', "the name 'vllm' is taken; rename it in its package"),
    ],
)
def test_a_plugin_that_is_wrong_is_one_line(points: str, said: str, tmp_path: Path) -> None:
    info = tmp_path / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points.replace('"', ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "quantpress", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "of bad 1.0" in done.stderr
    assert said in done.stderr
