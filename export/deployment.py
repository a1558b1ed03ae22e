"""One server as its files describe it: a launch script, a compose file and a Kubernetes manifest from one record."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .resources import Resources, quantity

# In commands: filled in for the place where they run. ORIGINAL is the model that the artifact drafts for.
MODEL, ORIGINAL, HOST, PORT, PYTHON = "{model}", "{original}", "{host}", "{port}", "{python}"
_ANYWHERE = "0.0.0.0"
_HOST_BYTES = 8 * 2**30  # of host memory beside a GPU's, for the server's processes; assumed, not measured
_REST = '"$@"'  # further arguments of a script
_DRAFT = (
    "The artifact is the draft of the model it was made from: the figures are the draft's, the other's weights and "
    "cache come on top. In a Kubernetes volume a local original is expected beside model/, as original/."
)
_START_SECONDS = 900  # until a server that has not answered counts as failed: large models load for minutes


@dataclass(frozen=True)
class Deployment:
    """What a target has to know of the model: what it is called, what it takes, the type its cache has scales for, and
    the file of one that is a single file. template: what llama.cpp has to tell its chat template; positions: that its
    config names, whatever rotary scaling makes of them."""

    name: str
    resources: Resources
    kv_cache: str | None = None
    file: str = ""
    template: Mapping[str, bool] = field(default_factory=dict)
    positions: int | None = None


@dataclass(frozen=True)
class Mount:
    """A folder, beside the files or absolute; where the container sees it; and the blank it fills in."""

    folder: str
    path: str
    blank: str = MODEL

    @property
    def inside(self) -> str:
        """Its name in a volume that holds everything."""
        return self.path.lstrip("/") if self.folder.startswith("/") else self.folder

    def on_host(self, here: str) -> str:
        return self.folder if self.folder.startswith("/") else f"{here}/{self.folder}"


@dataclass(frozen=True)
class Server:
    """How a server is started.

    command: argv, with MODEL, HOST and PORT; needs: what has to be installed for it; health: the path that answers 200
    once requests can come; check: argv in the container that does the same; probe: a request to try. setup: shell lines
    that run before the command; contained: whether the script starts the container, for servers that are had as one.
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
        return [_filled(part, self._inside) for part in (*self.entrypoint, *self.arguments)]

    def container_env(self) -> dict[str, str]:
        return {key: _filled(value, self._inside) for key, value in self.env.items()}


def drafted(draft_for: str | None) -> tuple[str, list[Mount], list[str]]:
    """What is served, mounted and noted: the artifact, or a folder or hub id `draft_for` with the artifact as draft."""
    mounts = [Mount("model", "/model")]
    if draft_for is None:
        return MODEL, mounts, []
    if not draft_for.startswith("/"):
        return draft_for, mounts, [_DRAFT]
    return ORIGINAL, [*mounts, Mount(draft_for, "/original", ORIGINAL)], [_DRAFT]


def _filled(part: str, blanks: dict[str, str]) -> str:
    for blank, value in blanks.items():
        part = part.replace(blank, value)
    return part


def curl_free_check(port: int, path: str) -> tuple[str, ...]:
    """A health check for images that have Python and may have no curl."""
    return ("python3", "-c", f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}{path}', timeout=5)")


def serve_sh(server: Server, host: str) -> str:
    """The launch script: PORT, HOST and further flags can be given from outside."""
    lines = [
        "#!/bin/sh",
        f"# {server.title}. Needs {server.needs}.",
        f"# Listens on {host}; HOST and PORT change that, further arguments go to the server.",
        "set -eu",
        'here=$(CDPATH=\'\' cd -- "$(dirname -- "$0")" && pwd)',
    ]
    if server.contained:
        return "\n".join([*lines, *_docker_run(server, host)]) + "\n"
    blanks = {HOST: f"${{HOST:-{host}}}", PORT: f"${{PORT:-{server.port}}}", PYTHON: "${PYTHON:-python3}"}
    blanks |= {mount.blank: mount.on_host("$here") for mount in server.mounts}
    inside_url = blanks | {HOST: f"${{HOST:-{_bracketed(host)}}}"}  # in the environment it stands before a port
    lines += [f'export {key}="${{{key}:-{_filled(value, inside_url)}}}"' for key, value in server.env.items()]
    words = [_shell_word(part, blanks) for part in (*server.local, *server.arguments)]
    lines += ["exec " + _wrapped([*words, _REST])]
    return "\n".join(lines) + "\n"


def _bracketed(host: str) -> str:
    """An address as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def _shell_word(part: str, blanks: dict[str, str]) -> str:
    """One word of the command, quoted; what fills its blanks is left to the shell."""
    if part in blanks:
        return f'"{blanks[part]}"'
    word = shlex.quote(part)
    for blank, variable in blanks.items():
        word = word.replace(blank, f"'\"{variable}\"'")
    return word


def _wrapped(words: list[str]) -> str:
    """Words over several lines: a flag begins one, and so does the end of what is given here."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("--") and word != _REST:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n  ".join(lines)


def _docker_run(server: Server, host: str) -> list[str]:
    words = ["docker", "run", "--rm", "--init"]
    words += ["--gpus", "all"] if server.cuda else []
    words += ["--shm-size", "2g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    words += ["--security-opt", "no-new-privileges"]
    shell = [shlex.quote(word) for word in words]
    shell += ["--publish", f'"${{HOST:-{_bracketed(host)}}}:${{PORT:-{server.port}}}:{server.port}"']
    for mount in server.mounts:
        shell += ["--volume", f'"{mount.on_host("$here")}:{mount.path}:ro"']
    for key, value in server.container_env().items():
        shell += ["--env", shlex.quote(f"{key}={value}")]
    entrypoint, *inside = (shlex.quote(word) for word in server.in_container())
    return ["exec " + _wrapped([*shell, "--entrypoint", entrypoint, server.image, *inside, _REST])]


def compose(server: Server, host: str) -> str:
    """compose.yaml: published on `host` alone."""
    service: dict[str, Any] = {
        "image": server.image,
        "entrypoint": server.in_container()[:1],
        "command": [_undollared(word) for word in server.in_container()[1:]],
        "ports": [f"{_bracketed(host)}:{server.port}:{server.port}"],
        "volumes": [
            {"type": "bind", "source": m.on_host("."), "target": m.path, "read_only": True} for m in server.mounts
        ],
        "environment": {key: _undollared(value) for key, value in server.container_env().items()},
        "security_opt": ["no-new-privileges:true"],
        "shm_size": "2gb",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", *server.check],
            "interval": "30s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{_START_SECONDS}s",
        },
    }
    if server.cuda:
        gpus = {"driver": "nvidia", "count": server.resources.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    return _document(f"{server.title}: docker compose up", {"name": server.name, "services": {"server": service}})


def _undollared(word: str) -> str:
    return word.replace("$", "$$")  # compose fills in variables


def kubernetes(server: Server) -> str:
    """A deployment and a service that only the cluster reaches. The folder is expected in a volume of that name."""
    labels = {"app.kubernetes.io/name": server.name, "app.kubernetes.io/part-of": "quantpress"}
    meta = {"name": server.name, "labels": labels}
    # A request and no limit: how much of the host a server takes while it loads has to be seen first.
    host_bytes = server.resources.weights_bytes + _HOST_BYTES if server.cuda else server.resources.memory_bytes
    needs: dict[str, Any] = {"requests": {"cpu": "4", "memory": quantity(host_bytes)}}
    if server.cuda:
        needs["limits"] = {"nvidia.com/gpu": server.resources.gpus}
    probe = {"httpGet": {"path": server.health, "port": "http"}, "timeoutSeconds": 10}
    argv = server.in_container()
    container: dict[str, Any] = {
        "name": "server",
        "image": server.image,
        "command": argv[:1],
        "args": [word.replace("$(", "$$(") for word in argv[1:]],
        "ports": [{"name": "http", "containerPort": server.port}],
        "env": [{"name": key, "value": value} for key, value in server.container_env().items()],
        "resources": needs,
        "startupProbe": probe | {"periodSeconds": 10, "failureThreshold": _START_SECONDS // 10},
        "readinessProbe": probe | {"periodSeconds": 10},
        "livenessProbe": probe | {"periodSeconds": 30, "failureThreshold": 3},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            *({"name": "files", "mountPath": m.path, "subPath": m.inside, "readOnly": True} for m in server.mounts),
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [
            {"name": "files", "persistentVolumeClaim": {"claimName": server.name, "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }
    selector = {"app.kubernetes.io/name": server.name}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a second copy would need as many GPUs again
            "selector": {"matchLabels": selector},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    ports = [{"name": "http", "port": server.port, "targetPort": "http"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"type": "ClusterIP", "selector": selector, "ports": ports},
    }
    heading = f"{server.title}: kubectl apply -f. The claim {server.name} holds this folder's contents"
    return _document(heading, deployment, service)


class _Plain(yaml.SafeDumper):
    """YAML without anchors: what is said twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _document(heading: str, *contents: dict[str, Any]) -> str:
    written = yaml.dump_all(contents, Dumper=_Plain, sort_keys=False, width=118)
    return f"# {heading}\n{written}"
