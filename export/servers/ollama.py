"""Ollama: a Modelfile over a GGUF file, and a script that serves and registers it.

Instructions: docs/modelfile.mdx of ollama/ollama; environment: its envconfig/config.go.
"""

import re

from quantpress.recipe import Ollama

from ..deployment import HOST, MODEL, PORT, Deployment, Server
from .vllm import completion

VERSION = "0.33.3"
# The server has to run before a model can be registered with it; without its model it is of no use.
_SERVE = """ollama serve & server=$!
trap 'kill "$server"' INT TERM
until ollama list > /dev/null 2>&1; do kill -0 "$server" || exit 1; sleep 1; done
ollama create "$2" --file "$1/Modelfile" || { kill "$server"; exit 1; }
wait "$server\""""


def server(target: Ollama, model: Deployment) -> Server:
    """How to start it."""
    env = {"OLLAMA_HOST": f"{HOST}:{PORT}", "OLLAMA_NUM_PARALLEL": str(target.max_num_seqs), "OLLAMA_KEEP_ALIVE": "-1"}
    if target.max_model_len is not None:
        env["OLLAMA_CONTEXT_LENGTH"] = str(target.max_model_len)
    return Server(
        name=model.name,
        title=f"Ollama {VERSION}",
        image=f"ollama/ollama:{VERSION}",
        local=("/bin/sh",),
        entrypoint=("/bin/sh",),
        arguments=("-c", _SERVE, "sh", MODEL, model.name),
        needs=f"ollama {VERSION} or later",
        port=target.port,
        health=f"/v1/models/{model.name}",  # / answers before the model is there (server/routes.go)
        check=("ollama", "show", model.name),
        probe=completion(model.name, target.port),
        resources=model.resources,
        cuda=False,
        env=env,
        clustered=False,
    )


def modelfile(file: str, given: str | None, target: Ollama) -> str:
    """The artifact's own Modelfile, on the GGUF beside it, with the target's context."""
    lines = [f"FROM ./{file}"]
    if given is not None:
        lines += [line for line in given.splitlines() if not re.match(r"(?i)\s*from\s", line)]
    if target.max_model_len is not None:
        lines = [line for line in lines if not _sets("num_ctx", line)]
        lines.append(f"PARAMETER num_ctx {target.max_model_len}")
    # Up to the summer of 2026 it punished repeated tokens unless told not to (ollama/ollama pull request 17679).
    if not any(_sets("repeat_penalty", line) for line in lines):
        lines.append("PARAMETER repeat_penalty 1")
    return "\n".join(lines) + "\n"


def _sets(parameter: str, line: str) -> bool:
    return re.match(rf"(?i)\s*parameter\s+{parameter}\s", line) is not None
