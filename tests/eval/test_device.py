"""An evaluation on another device than the CPU: the same figures."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.eval.measure import evaluate, prepare
from quantpress.eval.records import Results
from quantpress.quantize import machine
from quantpress.quantize.recipe import Evaluation, Gates
from tests.other_device import DEVICE, other_device
from tests.quantize.test_pipeline import make
from tests.tiny import build, text


@pytest.mark.parametrize("method", ["rtn", "w8a8"])
def test_what_another_device_measures(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    int8 = {"weights": {"bits": 8, "group_size": -1, "symmetric": True}, "activations": {"type": "int8"}}
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}} | (int8 if method == "w8a8" else {}))
    wanted = Evaluation(source=str(tmp_path / "text.txt"), windows=2, window=48, new_tokens=4)

    def measured(cache: Path) -> Results:
        prepared = prepare(tmp_path / "model", wanted, cache)
        return evaluate(tmp_path / "model", tmp_path / "run" / "quantized", prepared, Gates())

    with sdpa_kernel(SDPBackend.MATH):
        here = measured(tmp_path / "here")
    with other_device():
        monkeypatch.setattr(machine, "device", lambda: DEVICE)
        there = measured(tmp_path / "there")
    assert there.device == str(DEVICE)
    assert there.divergence is not None
    assert here.divergence is not None
    assert there.divergence.kl_mean > 0
    assert there.divergence.kl_mean == pytest.approx(here.divergence.kl_mean, rel=1e-3)
    assert there.artifact == here.artifact
    assert there.generations == here.generations
