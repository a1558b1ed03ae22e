"""llama.cpp: llama-server on a GGUF file.

Flags: tools/server/README.md of ggml-org/llama.cpp; images: ghcr.io/ggml-org/llama.cpp, a tag for each build.
"""

import json

from quantpress.recipe import LlamaCpp

from ..deployment import HOST, MODEL, PORT, Deployment, Server
from .vllm import completion

BUILD = "b10423"
_HEALTH = "/health"
_ALL_LAYERS = "999"  # more than any model has


def server(target: LlamaCpp, model: Deployment) -> Server:
    """How to start it."""
    cuda = target.device == "cuda"
    arguments = ["--model", f"{MODEL}/{model.file}", "--alias", model.name, "--host", HOST, "--port", PORT]
    arguments += ["--parallel", str(target.max_num_seqs)]
    # Shared by the slots, and taken when it starts: as much as the folder says it needs.
    arguments += ["--ctx-size", str(model.resources.tokens)]
    arguments += ["--n-gpu-layers", _ALL_LAYERS] if cuda else []
    if model.template:
        arguments += ["--chat-template-kwargs", json.dumps(dict(model.template))]
    arguments += ["--offline"]
    return Server(
        name=model.name,
        title=f"llama.cpp {BUILD}" + (" on a GPU" if cuda else ""),
        image=f"ghcr.io/ggml-org/llama.cpp:{'server-cuda' if cuda else 'server'}-{BUILD}",
        local=("llama-server",),
        entrypoint=("/app/llama-server",),
        arguments=tuple(arguments),
        needs="llama-server of llama.cpp",
        port=target.port,
        health=_HEALTH,
        check=("curl", "-fsS", f"http://127.0.0.1:{target.port}{_HEALTH}"),
        probe=completion(model.name, target.port),
        resources=model.resources,
        cuda=cuda,
    )
