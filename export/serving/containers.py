"""The server of an export folder in its container, started as an operator would: with the folder's compose.yaml."""

import json
import subprocess
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput

from .starting import Launch, Server

RECORD = "export.json"
_DOCKERS = {
    "loopback": "Docker publishes the container's port, where compose.yaml says",
    "memory": "Docker keeps the container's processes, and not this one",
}
# What a target's server does otherwise. Ollama: openai.FromCompleteRequest and server/routes.go of ollama/ollama.
_LACKS: dict[str, dict[str, str]] = {
    "ollama": {
        "plain_prompts": "Ollama puts every prompt into the chat template",
        "context": "Ollama cuts prompts that are too long, and answers",
    },
}


def lacking(folder: Path) -> dict[str, str]:
    """The checks and abilities that the server of an export folder lacks by its nature, each with the reason.

    Raises BadInput for one that does not speak OpenAI's protocol.
    """
    target = _record(folder)["target"]
    if target["name"] == "triton" and target.get("frontend") != "openai":
        raise BadInput(
            f"{folder} speaks Triton's own protocol, and the smoke test OpenAI's: export it with "
            "--set triton.frontend=openai" + (
                "" if target.get("backend", "vllm") == "vllm" else ", which backend vllm has, or for tensorrt-llm"
            )
        )  # fmt: skip
    return _LACKS.get(target["name"], {})


def composed(folder: Path) -> Server:
    """The row of an export folder, for `serve`.

    Raises BadInput when Docker does not answer, with the command to give where it does, and for a server that does not
    speak OpenAI's protocol.
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

    return Server(
        name=target, reads="anything", needs=(), install="", command=command, health=str(record["health"]), model=None,
        lacks=lacks, version=f"{image} in Docker {version}", port=port, after=(*docker, "down", "--timeout", "10"),
    )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return document
