"""SGLang: its OpenAI server on the artifact, or on the original with the artifact as its draft.

Flags and health check: the PyPI package sglang 0.5.23, srt/arg_groups/fields and srt/entrypoints/http_server.py; image:
docs/get-started/install of sgl-project/sglang.
"""

from quantpress.recipe import Sglang

from ..deployment import HOST, MODEL, PORT, PYTHON, Deployment, Server, curl_free_check, drafted
from .vllm import completion

VERSION = "0.5.23"
_HEALTH = "/health"  # generates a token each time nothing else does


def server(target: Sglang, model: Deployment) -> Server:
    """How to start it."""
    served, mounts, notes = drafted(target.draft_for)
    # `sglang serve` is the shorter name for this, and looks for further backends first.
    module = ("-m", "sglang.launch_server")
    arguments = ["--model-path", served, "--served-model-name", model.name, "--host", HOST, "--port", PORT]
    arguments += ["--tensor-parallel-size", str(target.tensor_parallel)]
    arguments += ["--max-running-requests", str(target.max_num_seqs)]
    if target.max_model_len is not None:
        arguments += ["--context-length", str(target.max_model_len)]
    if target.memory_fraction is not None:
        arguments += ["--mem-fraction-static", f"{target.memory_fraction:g}"]
    # auto takes what the files have scales for, and a draft's scales are not the other's
    arguments += ["--kv-cache-dtype", "fp8_e4m3" if target.kv_cache_dtype == "fp8" else "auto"]
    arguments += [] if target.prefix_caching else ["--disable-radix-cache"]
    arguments += [] if target.chunked_prefill else ["--chunked-prefill-size", "-1"]
    if target.draft_for is not None:
        steps = target.draft_tokens
        arguments += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", MODEL]
        arguments += ["--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1"]
        arguments += ["--speculative-num-draft-tokens", str(steps + 1)]  # the original's own one is counted too
    return Server(
        name=model.name,
        title=f"SGLang {VERSION}",
        image=f"lmsysorg/sglang:v{VERSION}",
        local=(PYTHON, *module),
        entrypoint=("python3", *module),
        arguments=tuple(arguments),
        needs=f"`pip install sglang=={VERSION}`",
        port=target.port,
        health=_HEALTH,
        check=curl_free_check(target.port, _HEALTH),
        probe=completion(model.name, target.port),
        resources=model.resources,
        env={"HF_HUB_OFFLINE": "1"} if target.draft_for is None or target.draft_for.startswith("/") else {},
        mounts=tuple(mounts),
        notes=tuple(notes),
    )
