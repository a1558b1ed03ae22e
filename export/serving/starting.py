"""A server on an artifact: started on this machine from its launcher, or reached where it already runs."""

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

import httpx

from quantpress.core import machine
from quantpress.core.errors import BadInput

from ..servers.server import Launch, Launcher
from .load import Wanted
from .process import Child, ServerFailed, free_port, running, wait_until_healthy

DEFAULT_CONTEXT = 1024  # tokens of prompt and answer
_PROBE = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "found = [[d, m.version(d)] for d in m.packages_distributions().get(sys.argv[1], [])]\n"
    "print(json.dumps(found if u.find_spec(sys.argv[1]) and all(u.find_spec(n) for n in sys.argv[2:]) else []))"
)


@dataclass(frozen=True)
class Options:
    """What the recipe or the command line sets for the smoke test."""

    python: str | None = None
    url: str | None = None
    concurrency: int = 4
    max_model_len: int | None = None  # None: 1024, or the maximum of a server that is not started here
    deadline_s: float = 600  # vLLM compiles as it starts: minutes on a busy CPU
    api_key: str | None = field(default=None, repr=False)
    lacks: Mapping[str, str] = field(default_factory=dict)  # as Launcher.lacks, of the server at `url`
    load: Wanted | None = None
    original: Path | None = None  # whose load is measured beside the artifact's, on a server started for it


@dataclass(frozen=True)
class Running:
    """A healthy server. `child` and `log` are None for one that was not started here."""

    name: str
    url: str
    model: str | None  # None: ask the server
    version: str | None
    lacks: Mapping[str, str]
    child: Child | None = None
    log: Path | None = None
    load_seconds: float | None = None
    command: tuple[str, ...] = ()


@contextlib.contextmanager
def serve(
    launcher: Launcher,
    artifact: Path,
    log: Path,
    options: Options,
    tell: Callable[[str], None] = lambda line: None,
    template: Mapping[str, bool] | None = None,
) -> Iterator[Running]:
    """Start a server on an artifact folder or .gguf file, on a free loopback port; yields it once it is healthy.

    template: arguments that llama.cpp has to give the chat template (`template_arguments`). The server and all the
    processes it has started end with the block. Raises BadInput when it is not installed or does not load such an
    artifact, ServerFailed when it does not become healthy.
    """
    if launcher.reads != "anything" and (launcher.reads == "gguf") != (artifact.suffix == ".gguf"):
        kind = "a .gguf file" if launcher.reads == "gguf" else "a Hugging Face folder"
        raise BadInput(f"{launcher.name} reads {kind}, and {artifact} is not one")
    python, version = interpreter(launcher, options.python)
    context = options.max_model_len or DEFAULT_CONTEXT
    device = machine.device().type
    launch = Launch(python, artifact.absolute(), _port(launcher), context, options.concurrency, device, template or {})
    url, started = f"http://127.0.0.1:{launch.port}", time.monotonic()
    command = launcher.command(launch)
    with _cleared(launcher), running(command, launcher.environment(launch), log) as child:
        wait_until_healthy(launcher.name, child, url + launcher.health, options.deadline_s, tell)
        took = time.monotonic() - started
        name = launcher.model and launcher.model(launch.artifact)
        yield Running(launcher.name, url, name, version, launcher.lacks, child, log, took, tuple(command))


@contextlib.contextmanager
def _cleared(launcher: Launcher) -> Iterator[None]:
    """Run the launcher's cleanup command after the block."""
    try:
        yield
    finally:
        if launcher.cleanup:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(launcher.cleanup, capture_output=True, timeout=60, check=False)


def _port(launcher: Launcher) -> int:
    """The launcher's fixed port, after checking that it is free, or any free one."""
    if launcher.port is None:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a port that was in use a moment ago counts as free
        try:
            probe.bind(("127.0.0.1", launcher.port))
        except OSError as error:
            raise BadInput(f"{launcher.name}: port {launcher.port} is taken ({error.strerror})") from None
    return launcher.port


@contextlib.contextmanager
def reach(url: str, api_key: str | None = None, lacks: Mapping[str, str] | None = None) -> Iterator[Running]:
    """The server already running at `url`, with or without /v1. Raises ServerFailed when none answers."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=10)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServerFailed(f"no server answers at {base}: {error}") from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServerFailed(
            f"{base} answers {answer.status_code}: it asks for a key: set QUANTPRESS_API_KEY in the environment"
        )
    yield Running("url", base, None, answer.headers.get("server"), lacks or {})


def interpreter(launcher: Launcher, given: str | None) -> tuple[str, str]:
    """The Python that has the server, and the server's version: `given`, else its own environment's, else ours.

    A path is made absolute, since servers start in another folder, but symlinks are kept: they tell a virtual
    environment from the Python it was made with. Raises BadInput with the install command when none has the server.
    """
    if launcher.version is not None:
        return sys.executable, launcher.version
    if given and os.path.dirname(given):  # otherwise a command on PATH
        given = os.path.abspath(given)
    own = Path(launcher.venv or "", "bin/python").absolute()
    candidates = [given] if given else [str(own)] if launcher.venv and own.is_file() else []
    for python in candidates if given else [*candidates, sys.executable]:
        if version := _version(python, launcher.needs):
            return python, version
    where = f"{given} has no" if given else "no Python here has"
    raise BadInput(f"{where} {', '.join(launcher.needs)}: {launcher.install}")


@functools.cache
def _version(python: str, needs: tuple[str, ...]) -> str | None:
    """`distribution version` of the first module if all are installed, else None. Imports none of them."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, *needs],
            capture_output=True, text=True, timeout=60, check=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: a program that is no Python
        return None
    return " ".join(found[0]) if found else None


def installed(launcher: Launcher, python: str | None = None) -> str | None:
    """The server's version; None where it cannot be started here."""
    with contextlib.suppress(BadInput):
        return interpreter(launcher, python)[1]
    return None
