"""Configs that transformers 4 and 5 read alike."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantpress.core.files import write_json
from quantpress.core.untrusted import read_json
from quantpress.models.architecture import model_config
from quantpress.models.config_forms import readable_by_all

from ...tiny import FAMILIES, SCALED

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {"rope_type": "longrope", "rope_theta": 50000.0, "short_factor": [1.0 + i / 9 for i in range(8)],
         "long_factor": [2.0 + i / 9 for i in range(8)], "original_max_position_embeddings": 32}  # fmt: skip
_THETA = {"rope_type": "default", "rope_theta": 777.0}
_BY_LAYER = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}  # fmt: skip
CASES: dict[str, tuple[str, Any]] = {
    "llama": ("llama", _THETA),
    "llama, scaled": ("llama", _LLAMA3),
    "llama, linear": ("llama", {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
    "mistral": ("mistral", _THETA),
    "qwen2, yarn": ("qwen2", _YARN),
    "qwen3": ("qwen3", _THETA),
    "qwen3_moe": ("qwen3_moe", _THETA),
    "gemma": ("gemma", _THETA),
    "gemma2": ("gemma2", _THETA),
    "gemma3": ("gemma3", _BY_LAYER),
    "phi3": ("phi3", _THETA),
    "phi3, long": ("phi3", _LONG),
    "glm": ("glm", _THETA | {"partial_rotary_factor": 0.5}),
    "glm4": ("glm4", _THETA | {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", _THETA | {"partial_rotary_factor": 0.5}),
    "granite": ("granite", _THETA),
    "olmo2": ("olmo2", _THETA),
    "mixtral": ("mixtral", _THETA),
}
_PYTHON = os.environ.get("TRANSFORMERS4_PYTHON")
_ASK = """
import json, sys, torch, transformers
for folder in json.load(sys.stdin):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(60)[None] * 7 % 200, use_cache=False).logits, folder + "/logits.pt")
print(transformers.__version__)
"""


def config_of(case: str) -> Any:
    family, rope = CASES[case]
    name, settings = (FAMILIES | SCALED)[family]
    return getattr(transformers, name)(**settings, rope_parameters=json.loads(json.dumps(rope)))


def without_type(rope: Any) -> Any:
    return {k: without_type(v) for k, v in rope.items() if k != "type"} if isinstance(rope, dict) else rope


@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_there_and_mean_the_same_to_version_5(case: str, tmp_path: Path) -> None:
    config_of(case).save_pretrained(tmp_path)
    stored = read_json(tmp_path / "config.json") | {"dtype": "bfloat16"}
    both = readable_by_all(stored)
    now, before = model_config(both), model_config(stored)
    assert without_type(now.rope_parameters) == before.rope_parameters
    assert now.dtype == before.dtype
    assert {key: both[key] for key in stored} == stored
    assert both["torch_dtype"] == "bfloat16"
    rope = CASES[case][1].get("full_attention", CASES[case][1])
    assert both["rope_theta"] == rope["rope_theta"]
    scaling = both.get("rope_scaling") or {}
    assert scaling.get("rope_type" if case != "phi3, long" else "type", "default") == rope["rope_type"]


def test_a_config_of_version_4_stays_as_it_is() -> None:
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 500.0, "rope_scaling": None}
    assert readable_by_all(config) == config
    unknown = {"model_type": "nobody_knows", "dtype": "bfloat16"}
    assert readable_by_all(unknown)["torch_dtype"] == "bfloat16"


def test_the_kernel_that_the_original_was_run_with_is_not_passed_on() -> None:
    text = {"model_type": "qwen3", "attn_implementation": "sdpa", "hidden_size": 64}
    config = {"model_type": "llava", "_attn_implementation": "flash_attention_2", "text_config": text}
    assert readable_by_all(config) == {
        "model_type": "llava",
        "text_config": {"model_type": "qwen3", "hidden_size": 64},
    }


@pytest.mark.slow
@pytest.mark.skipif(not _PYTHON, reason="TRANSFORMERS4_PYTHON names no interpreter with transformers 4")
def test_version_4_computes_the_same(tmp_path: Path) -> None:
    """The same logits where its own reading of the configs as saved by version 5 gives others."""
    logits: dict[str, torch.Tensor] = {}
    for i, case in enumerate(CASES):
        torch.manual_seed(i)
        model = transformers.AutoModelForCausalLM.from_config(config_of(case)).float().eval()
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        with torch.no_grad():
            logits[str(folder)] = model(torch.arange(60)[None] * 7 % 200, use_cache=False).logits
        write_json(folder / "config.json", readable_by_all(read_json(folder / "config.json")))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = [str(_PYTHON), "-c", _ASK]
    done = subprocess.run(asked, input=json.dumps(list(logits)), capture_output=True, text=True, env=clean, check=False)
    assert done.stdout.startswith("4."), done.stderr[-2000:]
    wrong = []
    for case, (folder, ours) in zip(CASES, logits.items(), strict=True):
        theirs = torch.load(Path(folder) / "logits.pt")
        if not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
            wrong.append(f"{case}: {float((theirs - ours).abs().max()):.2g}")
    print(f"{len(CASES)} configs read alike by transformers {done.stdout.strip()} and {transformers.__version__}")  # noqa: T201
    assert not wrong
