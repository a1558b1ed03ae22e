"""Runs whose blocks are computed on another device than the CPU: the same bytes, nothing left on the wrong side."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.room import Room
from quantpress.engine.sources import resolve
from quantpress.recipe.loading import parse

from ...other_device import DEVICE, products_of_torch, run_there
from ...tiny import build, text
from ..gguf import models
from .test_gguf_rounding import matrix

INT4 = {"bits": 4, "group_size": 32, "symmetric": False}
INT8 = {"weights": {"bits": 8, "group_size": -1, "symmetric": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("llama", {"method": {"name": "rtn"}}),
    "gptq": ("llama", {"method": {"name": "gptq"}}),
    "states on the host": ("llama", {"method": {"name": "gptq"}}),
    "batches that run again": ("qwen3_moe", {"method": {"name": "gptq"}, "targets": ["vllm"]}),
    "desc_act": (
        "gemma3",
        {"method": {"name": "gptq", "order": "activation", "static_groups": False},
         "formats": ["gptq"], "weights": INT4 | {"symmetric": True}},
    ),
    "experts": ("qwen3_moe", {"method": {"name": "gptq"}, "targets": ["vllm"]}),
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
    "gguf": ("llama", {"method": {"name": "gptq"}, "formats": ["gguf"], "gguf": {"type": "Q5_0"}}),
    "gguf with a matrix": (
        "llama", {"method": {"name": "rtn"}, "formats": ["gguf"], "gguf": {"type": "Q5_1", "imatrix": "matrix.gguf"}},
    ),
}  # fmt: skip
QUICK = ("gptq", "batches that run again", "awq", "fp8 and its cache", "nvfp4", "gguf with a matrix")
ROOMS = {
    "states on the host": Room(on_device=False),
    "batches that run again": Room(on_device=False, restarts=True),
}


def run(folder: Path, case: str, device: torch.device) -> None:
    """One case's artifact in `folder`/<case>/run, with its model and its text beside it."""
    family, document = CASES[case]
    place = folder / case
    if "gguf" in document:
        models.build(family, place / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    else:
        build(family, place / "model", torch.bfloat16)
    (place / "text.txt").write_text(text())
    calibration = {"samples": 6, "seq_len": 32, "source": str(place / "text.txt")}
    if "imatrix" in document.get("gguf", {}):
        matrix(place / "matrix.gguf", {"blk.0.ffn_down.weight": (64, 96)})
        document = document | {"gguf": document["gguf"] | {"imatrix": str(place / "matrix.gguf")}}
    numbers = {} if "gguf" in document else {"weights": INT4}
    recipe = parse(numbers | document | {"calibration": calibration, "model": str(place / "model")})
    job = prepare(recipe, resolve(recipe.model, cache=place / "cache"), device)
    if case in ROOMS and device.type != "cpu":
        job = replace(job, plan=replace(job.plan, room=ROOMS[case]))
    quantize(job, Settings(place / "run", place / "cache"))


def run_all(folder: str) -> None:
    """The cases whose folders are there, on the other device; what one cannot do is in its error.txt."""
    for case in sorted(path.name for path in Path(folder).iterdir()):
        try:
            run(Path(folder), case, DEVICE)
        except Exception:
            (Path(folder) / case / "error.txt").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder with what the other device made of every case that is tested."""
    folder = tmp_path_factory.mktemp("there")
    for item in request.session.items:
        if item.path == request.path:
            (folder / item.callspec.params["case"]).mkdir()  # type: ignore[attr-defined]
    run_there(__name__, "run_all", folder)
    return folder


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_another_device_makes_the_same_bytes(case: str, there: Path, tmp_path: Path) -> None:
    failed = there / case / "error.txt"
    assert not failed.exists(), failed.read_text()
    with products_of_torch(), sdpa_kernel(SDPBackend.MATH):  # what attention is where nobody has written a kernel
        run(tmp_path, case, torch.device("cpu"))
    made = {path.name: path.read_bytes() for path in (there / case / "run" / "quantized").iterdir()}
    for path in sorted((tmp_path / case / "run" / "quantized").iterdir()):
        if path.name not in ("manifest.json", "README.md"):  # names the folders
            assert made[path.name] == path.read_bytes(), path.name
