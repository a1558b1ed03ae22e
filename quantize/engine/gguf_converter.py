"""llama.cpp's own converter, run as a program of its own from a checkout that the user has."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from ..core.errors import BadInput
from ..core.files import expanded, whole_folder
from ..gguf.conversion import FloatType
from .sources import default_cache

_SCRIPT = "convert_hf_to_gguf.py"


def convert(checkout: Path, checkpoint: Path, kind: FloatType) -> Path:
    """The GGUF file of this float type that the converter in `checkout` makes of a checkpoint folder.

    It is kept in the cache for as long as neither changes. Raises BadInput, with the converter's reason, where it makes
    none.
    """
    script = expanded(checkout)
    script = script / _SCRIPT if script.is_dir() else script
    if script.name != _SCRIPT or not script.is_file():
        raise BadInput(f"gguf.converter {checkout}: no {_SCRIPT} there; give the folder of a checkout of llama.cpp")
    target = default_cache() / "converted" / _key(script, checkpoint, kind)
    if not target.is_dir():
        with whole_folder(target) as new:
            _run(script.resolve(), checkpoint, new / "model.gguf", kind)
    return target / "model.gguf"


def _run(script: Path, checkpoint: Path, file: Path, kind: FloatType) -> None:
    command = [sys.executable, str(script), str(checkpoint), "--outfile", str(file), "--outtype", kind.lower()]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    made = subprocess.run(command, capture_output=True, text=True, env=kept | {"HF_HUB_OFFLINE": "1"}, check=False)
    if made.returncode != 0 or not file.is_file():
        said = [" ".join(line.split()) for line in made.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()]
        reason = (errors or said or [f"exit code {made.returncode}"])[-1]
        raise BadInput(f"gguf.converter: {script} does not convert {checkpoint}: {reason[:300]}")


def _key(script: Path, checkpoint: Path, kind: FloatType) -> str:
    """Differs when a file of the checkpoint or of the converter does."""
    files = sorted([*checkpoint.iterdir(), script, *script.parent.glob("conversion/*.py")])
    stats = [f"{f.resolve()}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files if f.is_file()]
    return hashlib.sha256("\n".join([kind, *stats]).encode()).hexdigest()[:32]
