"""text-generation-inference: the launcher on the artifact.

Flags: docs/source/reference/launcher.md of huggingface/text-generation-inference; image: its README. In maintenance.
"""

from quantpress.recipe import Tgi

from ..deployment import HOST, MODEL, PORT, Deployment, Server
from .vllm import completion

VERSION = "3.3.5"
_HEALTH = "/health"


def server(target: Tgi, model: Deployment) -> Server:
    """How to start it."""
    arguments = ["--model-id", MODEL, "--hostname", HOST, "--port", PORT, "--num-shard", str(target.tensor_parallel)]
    arguments += ["--max-concurrent-requests", str(target.max_num_seqs), "--usage-stats", "off"]
    if target.max_model_len is not None:
        # Input tokens have to be fewer than all tokens, or nothing could be answered.
        arguments += ["--max-total-tokens", str(target.max_model_len)]
        arguments += ["--max-input-tokens", str(target.max_model_len - 1)]
    if model.kv_cache == "fp8":
        arguments += ["--kv-cache-dtype", "fp8_e4m3fn"]
    return Server(
        name=model.name,
        title=f"text-generation-inference {VERSION}",
        image=f"ghcr.io/huggingface/text-generation-inference:{VERSION}",
        local=("text-generation-launcher",),
        entrypoint=("/tgi-entrypoint.sh",),
        arguments=tuple(arguments),
        needs="text-generation-launcher, built from source; the container is the usual way",
        port=target.port,
        health=_HEALTH,
        check=("curl", "-fsS", f"http://127.0.0.1:{target.port}{_HEALTH}"),
        probe=completion(model.name, target.port),
        resources=model.resources,
        env={"HF_HUB_OFFLINE": "1"},
    )
