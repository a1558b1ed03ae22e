"""What the bits of a run are said to depend on."""

import gc
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


def test_what_is_there_already_is_not_collected_until_the_outermost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(machine, "_LEFT_ALONE", False)  # all tests leave libraries alone
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("unfreeze"))
    for _ in range(2):
        with machine.collecting_only_what_is_new():
            with machine.collecting_only_what_is_new():
                assert done == ["freeze"]
            assert done == ["freeze"]
        assert done == ["freeze", "unfreeze"]
        done.clear()
