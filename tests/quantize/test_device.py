"""Runs whose blocks are computed on another device than the CPU: the same bytes, nothing left on the wrong side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.quantize.pipeline import Settings, prepare, quantize
from quantpress.quantize.recipe.file import parse
from quantpress.quantize.sources import resolve
from tests.other_device import DEVICE, other_device
from tests.tiny import build, text

INT4 = {"bits": 4, "group_size": 32, "symmetric": False}
INT8 = {"weights": {"bits": 8, "group_size": -1, "symmetric": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("llama", {"method": {"name": "rtn"}}),
    "gptq": ("llama", {"method": {"name": "gptq"}}),
    "gptaq, act-order": (
        "gemma3",
        {"method": {"name": "gptq", "correction": "gptaq", "order": "activation", "static_groups": False},
         "formats": ["gptq"], "weights": INT4 | {"symmetric": True}},
    ),
    "experts": ("qwen3_moe", {"method": {"name": "gptq"}}),
    "conv1d": ("gpt2", {"method": {"name": "gptq"}, "formats": ["gptq"]}),
    "awq": ("qwen3", {"transforms": [{"name": "awq", "points": 3}], "method": {"name": "rtn"}}),
    "smoothquant": (
        "llama", INT8 | {"transforms": [{"name": "smoothquant"}], "activations": {"type": "int8", "dynamic": False}},
    ),
    "hadamard": ("llama", {"transforms": [{"name": "hadamard"}]}),
    "fp8 and its cache": (
        "llama", {"weights": {"type": "fp8"}, "activations": {"type": "fp8"}, "kv_cache": "fp8"},
    ),
    "nvfp4": ("llama", {"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}}),
    "mxfp4": ("llama", {"weights": {"type": "mxfp4"}}),
}  # fmt: skip


def run(folder: Path, model: Path, document: dict[str, Any], device: torch.device) -> dict[str, bytes]:
    words = folder.parent / "calibration.txt"
    words.write_text(text())
    given = {"calibration": {"samples": 6, "seq_len": 32, "source": str(words)}, "model": str(model)}
    recipe = parse({"weights": INT4} | document | given)
    cache = folder.parent / "cache"
    quantize(prepare(recipe, resolve(recipe.model, cache=cache), device), Settings(folder, cache))
    return {path.name: path.read_bytes() for path in sorted((folder / "quantized").iterdir())}


@pytest.mark.parametrize("case", CASES)
def test_what_another_device_makes(case: str, tmp_path: Path) -> None:
    family, document = CASES[case]
    build(family, tmp_path / "model", torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):  # what attention is where nobody has written a kernel
        here = run(tmp_path / "here", tmp_path / "model", document, torch.device("cpu"))
    with other_device():
        there = run(tmp_path / "there", tmp_path / "model", document, DEVICE)
    assert [name for name in here if there.get(name) != here[name]] == []
