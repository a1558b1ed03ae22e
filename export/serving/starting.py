"""The servers that can be started here, one row each: the command, its environment, and what it does differently."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from quantpress.core import machine
from quantpress.core.errors import BadInput

from .process import Child, ServerFailed, free_port, running, wait_until_healthy

SERVED_NAME = "quantpress"
DEFAULT_CONTEXT = 1024  # tokens of prompt and answer
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "found = [[d, m.version(d)] for d in m.packages_distributions().get(sys.argv[1], [])]\n"
    "print(json.dumps(found if u.find_spec(sys.argv[1]) and all(u.find_spec(n) for n in sys.argv[2:]) else []))"
)


@dataclass(frozen=True)
class Launch:
    """What a server is started with."""

    python: str
    artifact: Path  # a folder or a .gguf file, absolute
    port: int
    max_model_len: int  # tokens of prompt and answer together
    concurrency: int  # requests at a time
    template: Mapping[str, bool] = field(default_factory=dict)  # arguments that the chat template has to be given


@dataclass(frozen=True)
class Server:
    """A row of the table.

    reads: what it takes an artifact as. needs: modules its interpreter has to have, its own first. model: the name that
    requests give it, by the artifact. lacks: the checks that cannot be made on it, and the abilities that others make
    use of where they are, each with the reason. version: where it is known already, and no interpreter is asked.
    port: the one it always takes. after: a command that ends what the server leaves.
    """

    name: str
    reads: Literal["folder", "gguf", "anything"]
    needs: tuple[str, ...]
    install: str
    command: Callable[[Launch], list[str]]
    environment: Callable[[], Mapping[str, str]] = dict
    environment_folder: str | None = None  # the virtual environment of its own that is looked into first
    health: str = "/health"
    model: Callable[[Path], str] | None = lambda artifact: SERVED_NAME  # None: the server is asked
    lacks: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    port: int | None = None
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What the recipe or the command line says about serving."""

    python: str | None = None
    url: str | None = None
    concurrency: int = 4
    max_model_len: int | None = None  # None: 1024, or all that one takes which is not started here
    deadline_s: float = 600  # vLLM compiles as it starts: minutes on a busy CPU
    api_key: str | None = field(default=None, repr=False)
    lacks: Mapping[str, str] = field(default_factory=dict)  # as Server.lacks, of the server at `url`


@dataclass(frozen=True)
class Running:
    """A healthy server. `child` and `log` are None for one that somebody else runs."""

    name: str
    url: str
    model: str | None  # None: ask the server
    version: str | None
    lacks: Mapping[str, str]
    child: Child | None = None
    log: Path | None = None
    load_seconds: float | None = None
    command: tuple[str, ...] = ()


def _vllm(launch: Launch) -> list[str]:
    return [
        launch.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.artifact),
        "--host", "127.0.0.1", "--port", str(launch.port), "--served-model-name", SERVED_NAME,
        "--max-model-len", str(launch.max_model_len), "--max-num-seqs", str(launch.concurrency),
    ]  # fmt: skip


def _vllm_environment() -> dict[str, str]:
    """Offline, silent to its makers, and on the loopback interface with its own processes too."""
    found = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    found["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if machine.device().type == "cpu":
        found["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; it takes 4 by itself
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return found


def _llama_cpp(launch: Launch) -> list[str]:
    script = Path(__file__).with_name("llama_server.py")
    numbers = (launch.port, launch.max_model_len, launch.concurrency)
    return [
        launch.python, str(script), str(launch.artifact), *map(str, numbers), SERVED_NAME,
        json.dumps(dict(launch.template)),
    ]  # fmt: skip


def _transformers(launch: Launch) -> list[str]:
    return [
        launch.python, "-m", "transformers.cli.transformers", "serve", str(launch.artifact),
        "--host", "127.0.0.1", "--port", str(launch.port),
    ]  # fmt: skip


SERVERS: dict[str, Server] = {
    row.name: row
    for row in (
        Server(
            "vllm", "folder", ("vllm",), "`make setup-vllm`, or `pip install vllm` on a machine with a GPU into an "
            "environment of its own that --server-python names", _vllm, _vllm_environment, ".venv-vllm",
        ),
        Server("llama.cpp", "gguf", ("xllamacpp",), "`pip install 'quantpress[llamacpp-server]'`", _llama_cpp),
        Server(
            "transformers", "folder", ("transformers", "fastapi", "uvicorn", "openai", "accelerate"),
            "`pip install 'quantpress[transformers-server]'`", _transformers,
            lambda: {"HF_HUB_OFFLINE": "1"}, model=str,
            lacks={
                "models": "transformers serve lists the hub's cache, and not the model it serves",
                "done": "transformers serve ends its streams without [DONE]",
                "context": "transformers serve takes prompts of any length",
                "seed": "transformers serve samples only where the model's own generation_config.json says so",
                "stop_left_out": "transformers serve leaves the stop sequence in its answer",
                "token_ids": "transformers serve takes prompts as text only",
                "logprobs": "transformers serve gives no log-probabilities",
            },
        ),
    )
}  # fmt: skip


@contextlib.contextmanager
def serve(
    server: Server,
    artifact: Path,
    log: Path,
    options: Options,
    tell: Callable[[str], None] = lambda line: None,
    template: Mapping[str, bool] | None = None,
) -> Iterator[Running]:
    """`server` on the artifact folder or .gguf file, healthy, on a free port of the loopback address.

    template: what llama.cpp has to tell the chat template (`template_arguments`). The server ends with the block, and
    all it has started. Raises BadInput when it is not installed or cannot take such an artifact, ServerFailed when it
    does not become healthy.
    """
    if server.reads != "anything" and (server.reads == "gguf") != (artifact.suffix == ".gguf"):
        kind = "a .gguf file" if server.reads == "gguf" else "a Hugging Face folder"
        raise BadInput(f"{server.name} reads {kind}, and {artifact} is none")
    python, version = interpreter(server, options.python)
    context = options.max_model_len or DEFAULT_CONTEXT
    launch = Launch(python, artifact.absolute(), _port(server), context, options.concurrency, template or {})
    url, started = f"http://127.0.0.1:{launch.port}", time.monotonic()
    command = server.command(launch)
    with _cleared(server), running(command, server.environment(), log) as child:
        wait_until_healthy(server.name, child, url + server.health, options.deadline_s, tell)
        took = time.monotonic() - started
        name = server.model and server.model(launch.artifact)
        yield Running(server.name, url, name, version, server.lacks, child, log, took, tuple(command))


@contextlib.contextmanager
def _cleared(server: Server) -> Iterator[None]:
    """What the server leaves behind is ended after the block."""
    try:
        yield
    finally:
        if server.after:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(server.after, capture_output=True, timeout=60, check=False)


def _port(server: Server) -> int:
    """Its own port, found to be free, or any free one."""
    if server.port is None:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was served a moment ago is free
        try:
            probe.bind(("127.0.0.1", server.port))
        except OSError as error:
            raise BadInput(f"{server.name}: port {server.port} is taken ({error.strerror})") from None
    return server.port


@contextlib.contextmanager
def reach(url: str, api_key: str | None = None, lacks: Mapping[str, str] | None = None) -> Iterator[Running]:
    """A server that somebody else runs at `url`, with or without /v1. Raises ServerFailed when none answers."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=10)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerFailed(f"no server answers at {base}: {error}") from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServerFailed(f"{base} answers {answer.status_code}: it wants a key (environment QUANTPRESS_API_KEY)")
    yield Running("url", base, None, answer.headers.get("server"), lacks or {})


def interpreter(server: Server, given: str | None) -> tuple[str, str]:
    """The Python that has the server, and the server's version: `given`, else its own environment's, else ours.

    A path comes back absolute, since servers are started in another folder, and with its links: those are what tells a
    virtual environment from the Python it was made with.
    Raises BadInput with the command that installs it when there is none.
    """
    if server.version is not None:
        return sys.executable, server.version
    if given and os.path.dirname(given):  # else it is a command, found on PATH
        given = os.path.abspath(given)
    own = Path(server.environment_folder or "", "bin/python").absolute()
    candidates = [given] if given else [str(own)] if server.environment_folder and own.is_file() else []
    for python in candidates if given else [*candidates, sys.executable]:
        if version := _version(python, server.needs):
            return python, version
    where = f"{given} has no" if given else "no Python here has"
    raise BadInput(f"{where} {', '.join(server.needs)}: {server.install}")


@functools.cache
def _version(python: str, needs: tuple[str, ...]) -> str | None:
    """`distribution version` of the first module, where all are installed; nothing is imported for it."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, *needs],
            capture_output=True, text=True, timeout=60, check=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    found = json.loads(done.stdout)
    return " ".join(found[0]) if found else None


def installed(name: str, python: str | None = None) -> str | None:
    """Version of the named server where it can be started here; None where it cannot."""
    with contextlib.suppress(BadInput):
        return interpreter(SERVERS[name], python)[1]
    return None
