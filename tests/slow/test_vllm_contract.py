"""The table of what vLLM takes, and the flags that its launch files have, beside vLLM itself.

make setup-vllm && .venv/bin/pytest tests/slow/test_vllm_contract.py
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantpress.exports.load_check import will_load
from quantpress.exports.package import export
from quantpress.exports.servers.vllm import Vllm
from quantpress.numbers.types import Grid

from ..quantize.formats.artifacts import make, uniform

OWN = Path(__file__).parents[2] / ".venv-vllm/bin/python"
PYTHON = os.environ.get("QUANTPRESS_VLLM_PYTHON") or (str(OWN) if OWN.is_file() else None)
W4 = Grid(group_size=32)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: run `make setup-vllm`, or set QUANTPRESS_VLLM_PYTHON"),
]


def told(folder: Path, target: Vllm) -> Any:
    return will_load(folder, target, python=PYTHON, way="parser")


@pytest.mark.parametrize(
    ("format", "grid", "shuffled", "said"),
    [
        ("gptq", W4, False, None),
        ("awq", Grid(group_size=32, symmetric=False), False, None),
        ("compressed-tensors", W4, False, None),
        ("gptq", Grid(group_size=32, symmetric=False), False, "Unsupported quantization config"),
        ("gptq", Grid(bits=3, group_size=32), False, "Unsupported quantization config"),
        ("gptq", W4, True, "desc_act"),
    ],
)
def test_vllms_own_classes_agree_with_the_table(
    format: str, grid: Grid, shuffled: bool, said: str | None, tmp_path: Path
) -> None:
    make(tmp_path / "it", format, uniform(grid), shuffled=shuffled)
    contract = will_load(tmp_path / "it", Vllm(), python=PYTHON, way="contract")
    parser = told(tmp_path / "it", Vllm())
    assert contract.loads == parser.loads == (said is None)
    assert said is None or said in parser.reason


def test_a_length_beyond_the_models_is_refused_by_both(tmp_path: Path) -> None:
    make(tmp_path / "it", "gptq", uniform(W4))
    target = Vllm(device="cpu", max_model_len=4096)
    assert "max_model_len" in told(tmp_path / "it", target).reason
    assert "positions" in will_load(tmp_path / "it", target, python=PYTHON, way="contract").reason


def test_every_flag_is_one_of_vllms(tmp_path: Path) -> None:
    make(tmp_path / "quantized", "compressed-tensors", uniform(W4))
    assert PYTHON
    ask = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--help=all"]
    said = subprocess.run(ask, capture_output=True, text=True, check=True, cwd="/").stdout
    known = set(re.findall(r"--[a-z0-9-]+", said))
    for k, target in enumerate(
        (Vllm(max_model_len=64), Vllm(draft_for="/x", prefix_caching=False), Vllm(device="cpu"))
    ):
        command = json.loads((export(tmp_path, target, tmp_path / str(k)).folder / "export.json").read_text())[
            "command"
        ]
        flags = [word for word in command if word.startswith("--")]
        assert len(flags) > 6
        assert set(flags) <= known


def test_the_sampling_that_an_export_carries_is_vllms_default(tmp_path: Path) -> None:
    made = tmp_path / "quantized"
    make(made, "gptq", uniform(W4))
    (made / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    folder = export(tmp_path, Vllm(device="cpu"), tmp_path / "out").folder
    assert "generation-config" not in (folder / "serve.sh").read_text()
    asked = f"""
from vllm.config import ModelConfig
print("SAID", ModelConfig(model={str(folder / "model")!r}).get_diff_sampling_param())
"""
    done = subprocess.run([str(PYTHON), "-c", asked], capture_output=True, text=True, cwd=tmp_path)
    assert "SAID {'temperature': 0.6, 'top_k': 20, 'top_p': 0.95}" in done.stdout, done.stderr[-2000:]
