"""Go itself renders the templates of our Modelfiles as transformers renders the chat templates they are made of.

make setup-loaders && .venv/bin/pytest tests/slow/test_go_templates.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from quantpress.gguf.modelfile import translate

from ..quantize.gguf.test_modelfile import KNOWN, TALK, with_template
from .loaders import HERE, libraries

pytestmark = pytest.mark.slow


def test_go_renders_what_jinja_does(tmp_path: Path) -> None:
    go = libraries("go") / "go" / "bin" / "go"
    asked, wanted = [], []
    for name, template in KNOWN.items():
        words, add_bos = with_template(template), name not in ("chatml", "phi3")
        turns = translate(words, add_bos)
        for system in (None, "Speak plainly.\nBe 'kind' & <brief>."):
            if system is not None and turns.system is None:
                continue
            for length in (1, 3, 5):
                talk = [{"role": role, "content": text} for role, text in TALK[:length]]
                given = ([{"role": "system", "content": system}] if system else []) + talk
                rendered = words.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
                wanted.append(rendered.removeprefix(str(words.bos_token)) if add_bos else rendered)
                # As Ollama's server does with a Modelfile's SYSTEM.
                default = [{"role": "system", "content": turns.default}] if turns.default and system is None else []
                asked.append(
                    {"template": turns.go(), "system": system or turns.default or "", "messages": default + given}
                )
    environment = os.environ | {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    done = subprocess.run([go, "run", HERE / "go_templates.go"], input=json.dumps(asked), env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(wanted) > 20
    assert json.loads(done.stdout) == wanted
