"""GPTQModel, alone and under transformers with optimum, computes on the CPU what our GPTQ and AWQ files say.

make setup-loaders && .venv/bin/pytest tests/slow/test_gptqmodel.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantpress.numbers.types import Grid

from .. import tiny
from ..quantize.formats.artifacts import make, uniform
from .loaders import asked

IDS = torch.randint(2, tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
FILES = {
    "gptq": ("gptq", Grid(group_size=32), False),
    "gptq, zeros": ("gptq", Grid(group_size=32, symmetric=False), False),
    "gptq, int8": ("gptq", Grid(bits=8, group_size=-1), False),
    "gptq, scattered": ("gptq", Grid(group_size=32), True),
    "awq": ("awq", Grid(group_size=32, symmetric=False), False),
}
KERNELS = {"gptq": "TorchLinear", "awq": "AwqTorchLinear"}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["gptqmodel", "transformers"])
@pytest.mark.parametrize("kind", FILES)
def test_its_logits_are_those_of_the_dequantized_weights(kind: str, how: str, tmp_path: Path) -> None:
    if how == "transformers" and kind not in ("gptq", "awq"):
        pytest.skip("the same kernels read it")
    format, grid, scattered = FILES[kind]
    _, plain = make(tmp_path / "it", format, uniform(grid), shuffled=scattered, dtype=torch.float16)
    kernels = asked("gptqmodel_folder", "gptqmodel", how, str(tmp_path / "it"), json.dumps(IDS.tolist()),
                    str(tmp_path / "out"))  # fmt: skip
    assert KERNELS[format] in kernels
    with torch.inference_mode():
        wanted = plain.float()(IDS).logits
    found = load_file(tmp_path / "out")["logits"]
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())
