"""How a server is started on an exported model: one record, from which all launch files are written."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .resources import Resources

EXPORT_RECORD = "export.json"  # in every exported folder
# Blanks in commands, filled in for the place where they run. ORIGINAL: the model that the artifact is the draft of.
MODEL, ORIGINAL, HOST, PORT, PYTHON = "{model}", "{original}", "{host}", "{port}", "{python}"
_ANYWHERE = "0.0.0.0"
# Servers in containers run as a user that the image may not know, on a root that is read-only: caches go to /tmp.
USER_ID = 1000
_NOBODY = {"HOME": "/tmp", "USER": "quantpress"}
_DRAFT = (
    "The artifact is the draft of the model it was made from: the figures here are the draft's alone, and the weights "
    "and cache of the original come on top. In a Kubernetes volume a local original is expected as original/, beside "
    "model/."
)


@dataclass(frozen=True)
class ModelFolder:
    """What a launch command has to know about the exported model.

    name: under which it is served; kv_cache: the type that the files have cache scales for; positions: that its config
    states, whether or not rotary scaling extends them; chat: whether it has a chat template. Of a GGUF model: its
    (first) file, the arguments that llama.cpp has to give its chat template, and the text of its Modelfile.
    """

    name: str
    resources: Resources
    kv_cache: str | None = None
    positions: int | None = None
    chat: bool = False
    gguf_file: str = ""
    template_arguments: Mapping[str, bool] = field(default_factory=dict)
    modelfile: str | None = None


@dataclass(frozen=True)
class Mount:
    """A mounted folder: its path, relative to the exported folder or absolute; its path in the container; its blank."""

    folder: str
    path: str
    blank: str = MODEL

    @property
    def inside(self) -> str:
        """Its path in a volume that holds all the folders."""
        return self.path.lstrip("/") if self.folder.startswith("/") else self.folder

    def on_host(self, here: str) -> str:
        return self.folder if self.folder.startswith("/") else f"{here}/{self.folder}"


@dataclass(frozen=True)
class Deployment:
    """One server on one model, ready to be started.

    local: argv of the server on this machine, entrypoint: in its container, both followed by `arguments`, with blanks;
    needs: what has to be installed for it; health: the path that answers 200 once requests can come; check: argv that
    asks for it in the container; probe: a request to try; files: more files of the exported folder, by path;
    contained: the launch script starts the container too, for servers that come as one only; clustered: Kubernetes can
    run it.
    """

    name: str
    title: str
    image: str
    local: tuple[str, ...]
    entrypoint: tuple[str, ...]
    arguments: tuple[str, ...]
    needs: str
    port: int
    health: str
    check: tuple[str, ...]
    probe: str
    resources: Resources
    cuda: bool = True
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = (Mount("model", "/model"),)
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    contained: bool = False
    clustered: bool = True

    @property
    def _inside(self) -> dict[str, str]:
        return {HOST: _ANYWHERE, PORT: str(self.port)} | {mount.blank: mount.path for mount in self.mounts}

    def in_container(self) -> list[str]:
        """The command as it runs in the container, which listens on all of its own addresses."""
        return [fill(part, self._inside) for part in (*self.entrypoint, *self.arguments)]

    @property
    def confined(self) -> bool:
        """Whether its container runs as USER_ID, on a read-only root; Ollama stores the model below its own root."""
        return self.clustered

    def container_env(self) -> dict[str, str]:
        own = _NOBODY if self.confined else {}
        return own | {key: fill(value, self._inside) for key, value in self.env.items()}


def fill(part: str, blanks: Mapping[str, str]) -> str:
    """A word of a command with its blanks filled in."""
    for blank, value in blanks.items():
        part = part.replace(blank, value)
    return part


def drafted(draft_for: str | None) -> tuple[str, list[Mount], list[str]]:
    """What is served, what is mounted, and notes: for the artifact alone, or for the model `draft_for` (a folder or a
    hub id) with the artifact as its draft."""
    mounts = [Mount("model", "/model")]
    if draft_for is None:
        return MODEL, mounts, []
    if not draft_for.startswith("/"):
        return draft_for, mounts, [_DRAFT]
    return ORIGINAL, [*mounts, Mount(draft_for, "/original", ORIGINAL)], [_DRAFT]


def served_as(folder: ModelFolder, draft_for: str | None) -> str:
    """The name that requests give: the artifact's, or the original's where that is what is served."""
    if draft_for is None:
        return folder.name
    return re.sub(r"[^a-z0-9.-]+", "-", draft_for.rstrip("/").rpartition("/")[2].lower()).strip("-.") or folder.name


def curl_free_check(port: int, path: str) -> tuple[str, ...]:
    """A health check for images that have Python and may have no curl."""
    return ("python3", "-c", f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}{path}', timeout=5)")


def completion(folder: ModelFolder, port: int, name: str | None = None) -> str:
    """A request to any OpenAI-compatible server, as a shell command: in a chat where the model has a template, since
    chat models may end other prompts at once. name: under which it is served, where not folder.name."""
    request: dict[str, Any] = {"model": name or folder.name, "prompt": "The sea is"}
    if folder.chat:
        request = {"model": name or folder.name, "messages": [{"role": "user", "content": "What is the sea?"}]}
    path = "chat/completions" if folder.chat else "completions"
    body = json.dumps({**request, "max_tokens": 16, "temperature": 0})
    return f"curl -fsS http://127.0.0.1:{port}/v1/{path} -H 'Content-Type: application/json' -d '{body}'"
