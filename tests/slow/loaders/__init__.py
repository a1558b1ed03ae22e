"""Scripts that ask other projects' loaders, each in a Python of its own, with the libraries of that project's release.

`make setup-loaders` puts these into .loaders/<name>, for PYTHONPATH; QUANTPRESS_LOADERS names another folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LOADERS = Path(os.environ.get("QUANTPRESS_LOADERS") or HERE.parents[2] / ".loaders").absolute()


def libraries(name: str) -> Path:
    """The folder with a loader's libraries; the test skips where it is not there."""
    if not (LOADERS / name).is_dir():
        pytest.skip(f"no {LOADERS / name}: run `make setup-loaders`")
    return LOADERS / name


def asked(script: str, name: str, *arguments: str, source: bool = False) -> Any:
    """What `script`.py prints after SAID, run with the libraries called `name`; source: its first argument is the
    folder of the project's source, which lies beside them."""
    first = [str(libraries(f"{name}-source"))] if source else []
    environment = os.environ | {"PYTHONPATH": str(libraries(name)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / f"{script}.py"), *first, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert "SAID" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("SAID")[2].splitlines()[0])
