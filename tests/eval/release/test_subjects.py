"""What is measured of the folder that is given."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantpress.core.errors import BadInput
from quantpress.eval.release.callbacks import Options
from quantpress.eval.release.subjects import _measured

from ... import tiny


def test_of_a_checkpoint_of_pickles_its_safetensors_are_measured(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.build("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    assert _measured(folder, Options(cache=tmp_path / "cache")) == folder
    torch.save(tensors, folder / "pytorch_model.bin")
    assert _measured(folder, Options(cache=tmp_path / "cache")) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="pass --allow-pickle"):
        _measured(folder, Options(cache=tmp_path / "cache"))
    found = load_file(_measured(folder, Options(cache=tmp_path / "cache", allow_pickle=True)) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
