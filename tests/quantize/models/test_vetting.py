"""Files are read once, whole: hashes and what is not finite, as reading them one by one gives them."""

from pathlib import Path

import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.models import vetting
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import merge_parts, write_part
from quantpress.models.vetting import Fault, not_finite


def checkpoint(folder: Path, **changed: torch.Tensor) -> Checkpoint:
    """Three shards; tensors of several pieces, of one value, empty, and no floats."""
    folder.mkdir()
    tensors = {f"w{i}": torch.randn(300, 7).to(torch.bfloat16) for i in range(6)}
    tensors |= {"one": torch.ones(()), "none": torch.ones(0, 3), "codes": torch.full((50,), 255, dtype=torch.uint8)}
    write_part(folder / "part", tensors | changed)
    merge_parts([folder / "part"], folder, 9000)
    (folder / "part").unlink()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint(folder)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_PIECE", 1024)


def test_the_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    with vetting.vetting(found) as vetted:
        assert vetted.hashes() == found.file_hashes()


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """It is no weight of the model; its codes are, under a name of their own in the file."""
    checkpoint(tmp_path / "model", scale=torch.full((3,), float("nan")))
    found = Checkpoint(tmp_path / "model")
    hidden = [name for name in found.names() if name != "scale"]
    found.names = lambda: hidden  # type: ignore[method-assign]
    with vetting.vetting(found) as vetted, pytest.raises(BadInput, match="scale holds NaN; the checkpoint is damaged"):
        vetted.hashes()


def test_a_value_that_cannot_be_rounded_is_named_before_the_work(tmp_path: Path) -> None:
    big = torch.randn(300, 7).to(torch.bfloat16)
    big[200, 3] = -1e30
    found = checkpoint(tmp_path / "model", w3=big)
    with vetting.vetting(found, {"w3": 2e30, "w4": 1e18}) as vetted:
        assert vetted.hashes() == found.file_hashes()
    with (
        vetting.vetting(found, {"w3": 1e18}) as vetted,
        pytest.raises(vetting.Damaged, match=r"w3 holds 1\.00026e\+30, and more than 1e\+18 cannot be rounded; the"),
    ):
        vetted.hashes()


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "inf")])
@pytest.mark.parametrize("at", [0, 299 * 7 + 6])
def test_a_weight_that_is_not_finite_is_named(value: float, kind: str, at: int, tmp_path: Path) -> None:
    bad = torch.randn(300, 7).to(torch.bfloat16)
    bad.view(-1)[at] = value
    found = checkpoint(tmp_path / "model", w3=bad)
    with (
        vetting.vetting(found) as vetted,
        pytest.raises(BadInput, match=rf"{found.file_of('w3')}: w3 holds {kind}; the checkpoint is damaged"),
    ):
        vetted.hashes()


def test_nan_is_named_before_inf() -> None:
    assert not_finite(torch.tensor([1.0, float("inf"), float("nan")])) == Fault("NaN")
    assert not_finite(torch.tensor([])) is None


def test_a_file_that_was_cut_meanwhile_is_refused(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "model")
    path = tmp_path / "model" / found.file_of("w3")
    path.write_bytes(path.read_bytes()[:-1])
    with vetting.vetting(found) as vetted, pytest.raises(BadInput, match="the file ended early"):
        vetted.hashes()


def test_what_ends_the_run_ends_the_reading(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "model")
    with pytest.raises(KeyError), vetting.vetting(found):
        raise KeyError
