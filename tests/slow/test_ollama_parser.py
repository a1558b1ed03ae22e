"""Ollama's own parser reads our Modelfiles as they are meant, and every case of the grammar as the tests restate it.

    QUANTPRESS_OLLAMA=checkout .venv/bin/pytest tests/slow/test_ollama_parser.py

The checkout is of github.com/ollama/ollama, v0.33; `go` comes from `make setup-loaders` or PATH, and gets the modules
that the checkout asks for by its own settings (GOPROXY, GOFLAGS, or GO111MODULE=off with all of them below GOPATH).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..quantize.gguf.ollama_grammar import CASES, commands
from ..quantize.gguf.test_modelfile import KNOWN
from ..quantize.gguf.test_modelfile_grammar import ODD, written
from .loaders import HERE, libraries

CHECKOUT = os.environ.get("QUANTPRESS_OLLAMA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHECKOUT is None, reason="QUANTPRESS_OLLAMA names no checkout")]


def asked(texts: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    checkout = Path(CHECKOUT or "").absolute()
    go = shutil.which("go") or libraries("go") / "go" / "bin" / "go"
    overlay = tmp_path / "overlay.json"  # lays the program into the checkout, which stays as it is
    overlay.write_text(json.dumps({"Replace": {str(checkout / "probe" / "main.go"): str(HERE / "ollama_parser.go")}}))
    done = subprocess.run([go, "run", "-overlay", overlay, "./probe"], cwd=checkout, input=json.dumps(texts),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_ollama_reads_what_was_meant(tmp_path: Path) -> None:
    names = list(KNOWN | ODD)
    ours = [written((KNOWN | ODD)[name], name not in ("chatml", "phi3", "quotes")) for name in names]
    found = asked([*(text for text, _ in CASES), *(text for text, _ in ours)], tmp_path)
    for (text, wanted), read in zip(CASES, found, strict=False):
        if isinstance(wanted, str):
            assert "error" in read, text
        else:
            assert [tuple(one) for one in read["commands"]] == wanted
    for (text, meant), read in zip(ours, found[len(CASES) :], strict=True):
        assert [tuple(one) for one in read["commands"]] == commands(text)
        assert [tuple(one) for one in read["commands"]][: len(meant)] == meant
        assert "refused" not in read
        assert {key: read["parameters"][key] for key in ("num_ctx", "top_k")} == {"num_ctx": 512, "top_k": 2_000_000}
        assert read["parameters"]["temperature"] == pytest.approx(0.6)
