"""An evaluation on another device than the CPU: the same figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.core import machine
from quantpress.eval.measure.evaluate import evaluate, prepare
from quantpress.recipe import Evaluation, Gates

from ...other_device import DEVICE, products_of_torch, run_there
from ...quantize.engine.test_pipeline import make
from ...tiny import build, text

INT8 = {"weights": {"bits": 8, "group_size": -1, "symmetric": True}, "activations": {"type": "int8"}}
RECIPES: dict[str, dict[str, Any]] = {"w4": {}, "w8a8": INT8}


def measured(place: str, cache: str) -> None:
    """The results of the run in `place`, as JSON in `cache`.json."""
    model, artifact = Path(place) / "model", Path(place) / "run" / "quantized"
    wanted = Evaluation(source=str(Path(place) / "text.txt"), windows=2, window=48, new_tokens=4)
    results = evaluate(model, artifact, prepare(model, wanted, Path(cache)), Gates())
    Path(f"{cache}.json").write_text(json.dumps(results.document()))


def measured_there(folder: str) -> None:
    machine.device = lambda: DEVICE
    for recipe in RECIPES:
        measured(f"{folder}/{recipe}", f"{folder}/{recipe}/there")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each recipe, measured on the other device."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe, document in RECIPES.items():
        build("llama", folder / recipe / "model", torch.bfloat16)
        (folder / recipe / "text.txt").write_text(text())
        make(folder / recipe / "run", folder / recipe / "model", {"method": {"name": "rtn"}} | document)
    run_there(__name__, "measured_there", folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_device_measures_the_same(recipe: str, runs: Path) -> None:
    place = runs / recipe
    with products_of_torch(), sdpa_kernel(SDPBackend.MATH):
        measured(str(place), str(place / "here"))
    here, there = (json.loads((place / f"{side}.json").read_text()) for side in ("here", "there"))
    assert there["device"] == str(DEVICE)
    assert there["divergence"]["kl_mean"] > 0
    assert there["divergence"]["kl_mean"] == pytest.approx(here["divergence"]["kl_mean"], rel=1e-3)
    assert there["artifact"] == here["artifact"]
    assert there["generations"] == here["generations"]
