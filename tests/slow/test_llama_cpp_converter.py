"""llama.cpp's own converter and ours write the same file: every key, every tensor.

    QUANTPRESS_LLAMA_CPP=checkout .venv/bin/pytest tests/slow/test_llama_cpp_converter.py

The checkout is of llama.cpp, with convert_hf_to_gguf.py and gguf-py; llama-cpp-python's source archive holds one, too.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.cli.options import make_options
from quantpress.engine.sources import resolve

CHECKOUT = os.environ.get("QUANTPRESS_LLAMA_CPP")
CARD = """---
license: apache-2.0
language: [en, fr]
tags: [tiny, text-generation]
base_model: some-org/some-base-v2
datasets: [some-org/some-text]
pipeline_tag: text-generation
---
# A model
"""
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
# Theirs makes a title of the folder's name.
OURS = {"general.name"}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHECKOUT is None, reason="QUANTPRESS_LLAMA_CPP names no checkout")]


def keys(reader: Any) -> dict[str, Any]:
    return {name: ([kind.name for kind in field.types], field.contents())
            for name, field in reader.fields.items() if not name.startswith("GGUF.")}  # fmt: skip


def test_both_write_the_same(tmp_path: Path) -> None:
    model = tmp_path / "Some-Model-135M-Instruct"
    shutil.copytree(resolve("smollm2-135m", cache=make_options().cache).path, model)
    (model / "README.md").write_text(CARD)
    advice = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(advice | SAMPLING))
    checkout = Path(CHECKOUT or "").absolute()
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    convert = [sys.executable, checkout / "convert_hf_to_gguf.py", model, "--outfile", theirs, "--outtype", "bf16"]
    paths = os.pathsep.join([str(checkout / "gguf-py"), str(checkout)])
    subprocess.run(convert, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    subprocess.run(
        [sys.executable, "-m", "quantpress", "gguf", model, ours, "--type", "BF16"], check=True, capture_output=True
    )
    first, second = gguf.GGUFReader(theirs), gguf.GGUFReader(ours)
    wanted, found = keys(first), keys(second)
    assert wanted.keys() == found.keys()
    assert {name for name in wanted if wanted[name] != found[name]} <= OURS
    assert found["general.license"][1] == "apache-2.0"
    assert found["general.sampling.top_k"][1] == 20
    tensors = {tensor.name: tensor for tensor in second.tensors}
    assert tensors.keys() == {tensor.name for tensor in first.tensors}
    for tensor in first.tensors:
        assert tensor.tensor_type == tensors[tensor.name].tensor_type
        assert np.array_equal(tensor.data, tensors[tensor.name].data), tensor.name
