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

from ...other_device import DEVICE, run_there
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


def measured_there(place: str, cache: str) -> None:
    machine.device = lambda: DEVICE
    measured(place, cache)


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_device_measures_the_same(recipe: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}} | RECIPES[recipe])
    with sdpa_kernel(SDPBackend.MATH):
        measured(str(tmp_path), str(tmp_path / "here"))
    run_there(__name__, "measured_there", tmp_path, tmp_path / "there")
    here, there = (json.loads((tmp_path / f"{side}.json").read_text()) for side in ("here", "there"))
    assert there["device"] == str(DEVICE)
    assert there["divergence"]["kl_mean"] > 0
    assert there["divergence"]["kl_mean"] == pytest.approx(here["divergence"]["kl_mean"], rel=1e-3)
    assert there["artifact"] == here["artifact"]
    assert there["generations"] == here["generations"]
