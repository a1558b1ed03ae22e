"""The plan's memory beside the peak that the kernel counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ...tiny import text

MAKE = Path(__file__).parent.parent / "bench" / "checkpoints.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA takes more memory before any work")
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a16-gptq", "w4a16-awq"])
def test_memory_is_as_planned(recipe: str, tmp_path: Path) -> None:
    """Never more than the plan says, and the plan no more than 15 % above it."""
    size = ["--blocks", "2", "--hidden", "512", "--intermediate", "1408"]
    subprocess.run([sys.executable, str(MAKE), str(tmp_path / "model"), *size], check=True)
    (tmp_path / "text.txt").write_text(text(16_000))
    sets = [f"calibration={{source: {tmp_path / 'text.txt'}, samples: 16, seq_len: 512}}"]
    command = [sys.executable, "-m", "quantpress"]
    options = [recipe, "--model", str(tmp_path / "model"), *(f"--set={one}" for one in sets)]
    said = subprocess.run([*command, "plan", *options, "--json"], check=True, capture_output=True, text=True).stdout
    planned = json.loads(said.splitlines()[-1])["memory_bytes"]
    subprocess.run([*command, "quantize", *options, "--out", str(tmp_path / "run")], check=True, capture_output=True)
    timing = json.loads((tmp_path / "run" / "manifest.json").read_text())["timing"]
    assert timing["peak_rss_bytes"] <= planned <= 1.15 * timing["peak_rss_bytes"]
