"""GPTQ's kernels compile for real cards, and keep what they work on in registers; no card is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
PTXAS = next(iter(sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))), None)


@pytest.mark.slow
@pytest.mark.skipif(PTXAS is None, reason="this Triton comes without NVIDIA's assembler")
def test_every_variant_compiles_without_spilling(tmp_path: Path) -> None:
    """In a process of its own: here Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "compile_kernels.py"), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 15
    assert [line for line in lines if line["spilled"] or line["registers"] > 255] == []
