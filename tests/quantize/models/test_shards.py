"""The weights of an artifact out of the files of its blocks."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantpress.core.files import write_json
from quantpress.models import shards
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import gather_parts, write_part


def parts_in(folder: Path) -> tuple[dict[Path, str], dict[str, Tensor]]:
    """Three parts, the middle one empty, and what they hold."""
    held: list[dict[str, Tensor]] = [{f"{k}.w": torch.randn(3, 5), f"{k}.b": torch.randn(3).half()} for k in range(3)]
    held[1] = {}
    written = {folder / f"part{k}": write_part(folder / f"part{k}", one) for k, one in enumerate(held)}
    return written, {name: tensor for one in held for name, tensor in one.items()}


@pytest.mark.parametrize("links", [True, False])
def test_parts_of_a_large_artifact_are_its_shards(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(shards, "JOINED", 20)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    parts, held = parts_in(tmp_path)
    (out := tmp_path / "out").mkdir()
    write_json(out / "config.json", {})
    written = gather_parts(parts, out)
    assert list(written) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert written == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in written}
    checkpoint = Checkpoint(out)
    assert sorted(checkpoint.names()) == sorted(held)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in held.items())
    assert all(part.exists() for part in parts if "part1" in part.name or links)
    if links:  # nothing is copied
        assert (out / "model-00001-of-00002.safetensors").samefile(tmp_path / "part0")


def test_those_of_a_small_one_are_joined(tmp_path: Path) -> None:
    parts, held = parts_in(tmp_path)
    (out := tmp_path / "out").mkdir()
    write_json(out / "config.json", {})
    assert list(gather_parts(parts, out)) == ["model.safetensors"]
    assert sorted(Checkpoint(out).names()) == sorted(held)


def test_a_tensor_in_two_parts_is_our_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "JOINED", 0)
    parts = {tmp_path / name: write_part(tmp_path / name, {"w": torch.ones(2)}) for name in "ab"}
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="tensor w is also in an earlier part"):
        gather_parts(parts, tmp_path / "out")
