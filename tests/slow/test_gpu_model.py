"""A block of known models on a GPU that exists on paper: no slower and no larger than it has been."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="the paper GPU stands in for a build without CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the paper GPU's device guard needs g++"),
]
LIMITS = {  # seconds, launches, waits, GB of GPU memory
    "llama8b": (0.8, 5_000, 50, 40),
    "llama70b": (3.2, 5_000, 50, 72),
    "qwen3moe": (0.8, 20_000, 50, 40),
    "llama405b": (22.0, 25_000, 50, 70),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_block_stays_within_its_limits(name: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu_model", name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for limit, key in zip(LIMITS[name], ("seconds", "launches", "syncs", "peak_gb"), strict=True):
        assert found[key] <= limit, key
    assert found["peak_gb"] <= found["planned_gb"]
