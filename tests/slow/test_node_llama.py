"""node-llama-cpp, the prebuilt llama.cpp of Node's users, reads a GGUF file of ours as we do.

make setup-loaders && .venv/bin/pytest tests/slow/test_node_llama.py
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from quantpress import Options, api, load
from quantpress.calibrate.tokens import open_tokenizer

from .loaders import HERE, libraries

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName a color of the rainbow.<|im_end|>\n<|im_start|>assistant\n",
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M"])
def test_its_tokens_and_its_greedy_continuations_are_ours(type: str, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    there = libraries("node")
    recipe = {"method": "rtn", "formats": ["gguf"], "gguf": {"type": type}, "evaluation": None}
    made = api.run(recipe, "smollm2-135m", tmp_path / "run", Options(cache=tmp_path / "cache")).out / "quantized"
    command = ["node", str(HERE / "node_llama.mjs"), str(there), str(made / "model.gguf"), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer, model = open_tokenizer(made), load(made, torch.device("cpu"), torch.float32)
    for prompt, answer in zip(PROMPTS, json.loads(done.stdout), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert answer["ids"] == ids
        assert len(answer["continued"]) > 3
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer["continued"]])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer["continued"])[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.3  # ours too, or a close call: llama.cpp rounds inputs
