"""What the bits of a run are said to depend on."""

from importlib.metadata import version

import pytest
import torch

from quantpress.core import machine


def test_on_a_gpu_the_bits_depend_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a card")
    assert "triton" not in machine.numerics(torch.device("cpu"))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert machine.numerics(torch.device("cuda"))["triton"] == "none"
    monkeypatch.undo()
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a card")
    assert machine.numerics(torch.device("cuda"))["triton"] == version("triton")
