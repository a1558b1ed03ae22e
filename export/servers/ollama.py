"""Ollama: a Modelfile over a GGUF file, and a script that serves and registers it.

Instructions: docs/modelfile.mdx of ollama/ollama; environment: its envconfig/config.go. What it does differently:
openai.FromCompleteRequest and server/routes.go.
"""

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion
from .llama_cpp import GGUF_FILES, parse_gguf
from .loader import Loader
from .served_model import ServedModel
from .server import Server
from .target_settings import LISTENS_ON, ServerSettings

VERSION = "0.33.3"
# A model can only be registered with a running server; without its model the server is useless and is ended.
_SERVE = """ollama serve & server=$!
trap 'kill "$server"' INT TERM
until ollama list > /dev/null 2>&1; do kill -0 "$server" || exit 1; sleep 1; done
ollama create "$2" --file "$1/Modelfile" || { kill "$server"; exit 1; }
wait "$server\""""


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    if model.parts > 1:  # ollama/ollama issue 5245
        yield f"Ollama imports one GGUF file, and this one is split into {model.parts}: write it whole"


LOADER = Loader("ollama", "Ollama", GGUF_FILES, _limits, parse_gguf, version=VERSION)


class Ollama(ServerSettings):
    """Ollama, from a Modelfile."""

    name: Literal["ollama"] = Field("ollama", description="selects Ollama")
    _loader: ClassVar[Loader] = LOADER
    port: int = Field(11434, ge=1, le=65535, description=LISTENS_ON)
    max_num_seqs: int = Field(4, ge=1, description="requests answered at one time")
    device: Literal["cuda", "cpu"] = Field("cpu", description="cuda: the container is given the GPUs")


def deploy(target: Ollama, folder: ModelFolder) -> Deployment:
    """How Ollama is started on the model in `folder`."""
    env = {"OLLAMA_HOST": f"{HOST}:{PORT}", "OLLAMA_NUM_PARALLEL": str(target.max_num_seqs), "OLLAMA_KEEP_ALIVE": "-1"}
    if target.max_model_len is not None:
        env["OLLAMA_CONTEXT_LENGTH"] = str(target.max_model_len)
    return Deployment(
        name=folder.name,
        title=f"Ollama {VERSION}",
        image=f"ollama/ollama:{VERSION}",
        local=("/bin/sh",),
        entrypoint=("/bin/sh",),
        arguments=("-c", _SERVE, "sh", MODEL, folder.name),
        needs=f"ollama {VERSION} or later",
        port=target.port,
        health=f"/v1/models/{folder.name}",  # / answers before the model is there (server/routes.go)
        check=("ollama", "show", folder.name),
        probe=completion(folder, target.port),
        resources=folder.resources,
        cuda=target.device == "cuda",
        env=env,
        files={"model/Modelfile": _modelfile(target, folder)},
        clustered=False,
    )


def _modelfile(target: Ollama, folder: ModelFolder) -> str:
    """The artifact's Modelfile, pointed at the GGUF file beside it, with the target's context length."""
    # Its first line is its own FROM; texts of several lines come before the parameters.
    texts, quotes, settings = (folder.modelfile or "").partition("\n")[2].rpartition('"""')
    lines = settings.rstrip("\n").split("\n") if settings or quotes else []
    if target.max_model_len is not None:
        lines = [line for line in lines if not _sets("num_ctx", line)]
        lines.append(f"PARAMETER num_ctx {target.max_model_len}")
    # Until mid-2026 Ollama penalized repeated tokens by default (ollama/ollama pull request 17679).
    if not any(_sets("repeat_penalty", line) for line in lines):
        lines.append("PARAMETER repeat_penalty 1")
    return f"FROM ./{folder.gguf_file}\n{texts}{quotes}" + "\n".join(lines) + "\n"


def _sets(parameter: str, line: str) -> bool:
    return re.match(rf"(?i)\s*parameter\s+{parameter}\s", line) is not None


SERVER = Server(
    name="ollama",
    settings=Ollama,
    deploy=deploy,
    variants=(Ollama(),),
    hub_command="ollama run hf.co/{name}",
    container_lacks={
        "plain_prompts": "Ollama puts every prompt into the chat template",
        "context": "Ollama cuts prompts that are too long, and answers",
    },
)
