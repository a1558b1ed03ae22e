"""The server of an export folder in its container, started as an operator would: with the folder's compose.yaml."""

import json
import subprocess
from pathlib import Path

from quantpress.quantize.errors import BadInput

from .servers import Launch, Server

RECORD = "export.json"
_OWN_PROTOCOL = {"triton": "Triton's own protocol: start its OpenAI frontend on the repository"}
_LACKS = {
    "loopback": "Docker publishes the container's port, where compose.yaml says",
    "memory": "Docker keeps the container's processes, and not this one",
}


def composed(folder: Path) -> Server:
    """The row of an export folder, for `serve`.

    Raises BadInput when Docker does not answer, with the command to give where it does, and for a server that does not
    speak OpenAI's protocol.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    target, image, port = record["target"]["name"], str(record["image"]), int(record["port"])
    at = f"--server url --url http://127.0.0.1:{port}"
    if target in _OWN_PROTOCOL:
        raise BadInput(f"{folder} speaks {_OWN_PROTOCOL[target]}, and give {at}")
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
            f"`docker compose --file {file} up`, then quantpress smoke with {at}"
        ) from None

    def command(launch: Launch) -> list[str]:
        return [*docker, "up", "--no-color", "--abort-on-container-exit"]

    return Server(
        name=target, reads="anything", needs=(), install="", command=command, health=str(record["health"]), model=None,
        lacks=_LACKS, version=f"{image} in Docker {version}", port=port, after=(*docker, "down", "--timeout", "10"),
    )  # fmt: skip
