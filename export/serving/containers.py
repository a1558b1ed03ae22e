"""The server of an exported folder, started in its container with the folder's compose.yaml, as an operator would."""

import json
import subprocess
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput
from quantpress.recipe.loading import parse_target

from ..servers import SERVERS
from ..servers.deployment import EXPORT_RECORD
from ..servers.server import Launch, Launcher

_DOCKERS = {
    "loopback": "Docker publishes the container's port, at the address in compose.yaml",
    "memory": "the container's processes are Docker's, not this one's",
}


def lacking(folder: Path) -> dict[str, str]:
    """The checks and abilities that the server of an exported folder lacks by its nature, each with the reason.

    Raises BadInput for a server that does not speak OpenAI's protocol.
    """
    target = parse_target(_record(folder)["target"], str(folder / EXPORT_RECORD))
    if (refused := target.smoke_refusal()) is not None:
        raise BadInput(f"{folder} {refused}")
    return dict(SERVERS[target.name].container_lacks)


def composed(folder: Path) -> Launcher:
    """The launcher of an exported folder's container, for `serve`.

    Raises BadInput when Docker does not answer (with the command for a machine where it does), and for a server that
    does not speak OpenAI's protocol.
    """
    record, lacks = _record(folder), lacking(folder) | _DOCKERS
    target, image, port = record["target"]["name"], str(record["image"]), int(record["port"])
    at = f"--server url --url http://127.0.0.1:{port}"
    file = folder.absolute() / "compose.yaml"
    docker = [
        "docker",
        "compose",
        "--project-name",
        f"quantpress-smoke-{target.replace('.', '-')}",
        "--file",
        str(file),
    ]
    try:
        asked = ["docker", "version", "--format", "{{.Server.Version}}"]
        version = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        raise BadInput(
            f"{target} runs in a container, and no Docker answers here; where one does, "
            f"`docker compose --file {file} up`, then `quantpress smoke {folder} {at}`"
        ) from None

    def command(launch: Launch) -> list[str]:
        return [*docker, "up", "--no-color", "--abort-on-container-exit"]

    return Launcher(
        name=target, reads="anything", needs=(), install="", command=command, health=str(record["health"]), model=None,
        lacks=lacks, version=f"{image} in Docker {version}", port=port, cleanup=(*docker, "down", "--timeout", "10"),
    )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
    return document
