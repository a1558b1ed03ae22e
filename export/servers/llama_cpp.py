"""llama.cpp: llama-server on a GGUF file.

Flags: tools/server/README.md of ggml-org/llama.cpp; images: ghcr.io/ggml-org/llama.cpp, a tag for each build. The smoke
test starts the same server out of the package xllamacpp.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion
from .loader import ANY_SYMMETRY, CannotAsk, Loadable, Loader, ParserQuestion
from .server import SERVED_NAME, Launch, Launcher, Server
from .target_settings import LISTENS_ON, ServerSettings

BUILD = "b10423"
_HEALTH = "/health"
_ALL_LAYERS = "999"  # more than any model has
_SCRIPT = Path(__file__).with_name("llama_server.py")

GGUF_FILES = (Loadable("gguf", types=(), symmetric=ANY_SYMMETRY),)  # ggml loads every type that a GGUF file may have


def parse_gguf(question: ParserQuestion) -> tuple[str, str]:
    """llama.cpp's own reader, which has already read the file to describe the model."""
    if question.model.format != "gguf":
        raise CannotAsk("llama.cpp's own reader is for GGUF files")
    return f"llama.cpp's own reader (gguf {version('gguf')})", ""


LOADER = Loader("llama.cpp", "llama.cpp", GGUF_FILES, parse=parse_gguf, version=BUILD)


class LlamaCpp(ServerSettings):
    """llama.cpp's llama-server."""

    name: Literal["llama.cpp"] = Field("llama.cpp", description="selects llama.cpp")
    _loader: ClassVar[Loader] = LOADER
    max_model_len: int | None = Field(
        None, ge=16, description="tokens of prompt and answer; null: what the model has, 4096 at most"
    )
    port: int = Field(8080, ge=1, le=65535, description=LISTENS_ON)
    max_num_seqs: int = Field(4, ge=1, description="slots; each has max_model_len tokens")
    device: Literal["cuda", "cpu"] = Field("cpu", description="cuda: all layers on the GPU")


def deploy(target: LlamaCpp, folder: ModelFolder) -> Deployment:
    """How llama-server is started on the model in `folder`."""
    cuda = target.device == "cuda"
    arguments = ["--model", f"{MODEL}/{folder.gguf_file}", "--alias", folder.name, "--host", HOST, "--port", PORT]
    arguments += ["--parallel", str(target.max_num_seqs)]
    # Shared by the slots and allocated at the start: as much as the README says.
    arguments += ["--ctx-size", str(folder.resources.tokens)]
    arguments += ["--n-gpu-layers", _ALL_LAYERS] if cuda else []
    if folder.template_arguments:
        arguments += ["--chat-template-kwargs", json.dumps(dict(folder.template_arguments))]
    arguments += ["--offline"]
    return Deployment(
        name=folder.name,
        title=f"llama.cpp {BUILD}" + (" on a GPU" if cuda else ""),
        image=f"ghcr.io/ggml-org/llama.cpp:{'server-cuda' if cuda else 'server'}-{BUILD}",
        local=("llama-server",),
        entrypoint=("/app/llama-server",),
        arguments=tuple(arguments),
        needs="llama-server of llama.cpp",
        port=target.port,
        health=_HEALTH,
        check=("curl", "-fsS", f"http://127.0.0.1:{target.port}{_HEALTH}"),
        probe=completion(folder, target.port),
        resources=folder.resources,
        cuda=cuda,
    )


def _command(launch: Launch) -> list[str]:
    numbers = (launch.port, launch.max_model_len, launch.concurrency)
    return [
        launch.python, str(_SCRIPT), str(launch.artifact), *map(str, numbers), SERVED_NAME,
        json.dumps(dict(launch.template)),
    ]  # fmt: skip


SERVER = Server(
    name="llama.cpp",
    settings=LlamaCpp,
    deploy=deploy,
    variants=(LlamaCpp(),),
    hub_command="llama-server -hf {name}",
    launcher=Launcher(
        name="llama.cpp",
        reads="gguf",
        needs=("xllamacpp",),
        install="`pip install 'quantpress[llamacpp-server]'`",
        command=_command,
    ),
)
