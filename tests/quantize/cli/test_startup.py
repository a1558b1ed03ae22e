"""What must be quick: help, version, recipes, the schema and a mistake in a recipe do not import torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "resvg_py", "scipy", "huggingface_hub")
_PROBE = f"""
import sys
from quantpress.cli import main
sys.argv = ["quantpress", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["run", "--help"], 0),
        (["recipes"], 0),
        (["schema"], 0),
        (["run", "w4a16-gtpq"], 2),
        (["quantize", "w4a16-gptq", "--set", "methud=rtn"], 2),
        (["plan", "w4a16-gptq", "--set", "weights.bits=9"], 2),
        (["sweep", "w4a16-gptq", "no-such-recipe"], 2),
        (["eval"], 2),
        (["verify", "x", "--way", "guess"], 2),
    ],
)
def test_it_starts_without_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = start(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: []"


def test_importing_the_package_imports_nothing_heavy() -> None:
    names = "from quantpress import BadInput, Callbacks, Recipe, load_recipe"
    code = f"import sys; {names}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
