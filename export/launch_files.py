"""The launch files of a deployment: a script, a compose file and a Kubernetes manifest, all from one record."""

from typing import Any

import yaml

from .quoting import comment, for_compose, for_kubernetes, in_double_quotes, shell_word, variable
from .servers.deployment import HOST, PORT, PYTHON, USER_ID, Deployment, Mount
from .servers.resources import SHARED_BYTES, quantity

_REST = '"$@"'  # the script's own arguments, passed on
_START_SECONDS = 900  # before a server without an answer counts as failed: large models take minutes to load


def serve_sh(deployment: Deployment, host: str) -> str:
    """The launch script. The environment may set HOST and PORT; arguments are passed to the server."""
    lines = [
        "#!/bin/sh",
        f"# {comment(deployment.title)}. Needs {comment(deployment.needs)}.",
        f"# Listens on {comment(host)}; HOST and PORT change that, further arguments go to the server.",
        "set -eu",
        'here=$(CDPATH=\'\' cd -- "$(dirname -- "$0")" && pwd)',
    ]
    if deployment.contained:
        return "\n".join([*lines, *_docker_run(deployment, host)]) + "\n"
    blanks = {HOST: variable("HOST", host), PORT: variable("PORT", str(deployment.port))}
    blanks |= {PYTHON: "${PYTHON:-python3}"} | {mount.blank: _on_host(mount) for mount in deployment.mounts}
    inside_url = blanks | {HOST: variable("HOST", _bracketed(host))}  # there it is followed by a port
    for key, value in deployment.env.items():
        lines += [f'[ -n "${{{key}:-}}" ] || {key}={shell_word(value, inside_url)}', f"export {key}"]
    words = [shell_word(part, blanks) for part in (*deployment.local, *deployment.arguments)]
    lines += ["exec " + _wrapped([*words, _REST])]
    return "\n".join(lines) + "\n"


def _bracketed(host: str) -> str:
    """An address as it is written in front of a port."""
    return f"[{host}]" if ":" in host else host


def _on_host(mount: Mount) -> str:
    """The folder of a mount, between double quotes."""
    return in_double_quotes(mount.folder) if mount.folder.startswith("/") else f"$here/{in_double_quotes(mount.folder)}"


def _wrapped(words: list[str]) -> str:
    """The words on several lines, a new one for each flag and for the script's arguments."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("--") and word != _REST:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n  ".join(lines)


def _docker_run(deployment: Deployment, host: str) -> list[str]:
    words = ["docker", "run", "--rm", "--init"]
    words += ["--gpus", "all"] if deployment.cuda else []
    words += ["--shm-size", f"{SHARED_BYTES >> 30}g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    words += ["--security-opt", "no-new-privileges"]
    words += ["--user", f"{USER_ID}:{USER_ID}", "--read-only", "--tmpfs", "/tmp:exec"] if deployment.confined else []
    host, port = variable("HOST", _bracketed(host)), variable("PORT", str(deployment.port))
    shell = [*words, "--publish", f'"{host}:{port}:{deployment.port}"']
    for mount in deployment.mounts:
        shell += ["--volume", f'"{_on_host(mount)}:{in_double_quotes(mount.path)}:ro"']
    for key, value in deployment.container_env().items():
        shell += ["--env", shell_word(f"{key}={value}", {})]
    entrypoint, *inside = (shell_word(word, {}) for word in deployment.in_container())
    image = shell_word(deployment.image, {})
    return ["exec " + _wrapped([*shell, "--entrypoint", entrypoint, image, *inside, _REST])]


def compose(deployment: Deployment, host: str) -> str:
    """compose.yaml; the port is published on `host` alone."""
    service: dict[str, Any] = {
        "image": deployment.image,
        "entrypoint": deployment.in_container()[:1],
        "command": deployment.in_container()[1:],
        "ports": [f"{_bracketed(host)}:{deployment.port}:{deployment.port}"],
        "volumes": [
            {"type": "bind", "source": m.on_host("."), "target": m.path, "read_only": True} for m in deployment.mounts
        ],
        "environment": deployment.container_env(),
        "security_opt": ["no-new-privileges:true"],
        "shm_size": f"{SHARED_BYTES >> 30}gb",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", *deployment.check],
            "interval": "30s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{_START_SECONDS}s",
        },
    }
    if deployment.confined:
        service |= {"user": f"{USER_ID}:{USER_ID}", "read_only": True, "tmpfs": ["/tmp:exec"]}
    resources: dict[str, Any] = {"limits": {"memory": str(deployment.resources.host_bytes(cuda=deployment.cuda)[1])}}
    if deployment.cuda:
        gpus = {"driver": "nvidia", "count": deployment.resources.gpus, "capabilities": ["gpu"]}
        resources["reservations"] = {"devices": [gpus]}
    service["deploy"] = {"resources": resources}
    return _document(
        f"{deployment.title}: docker compose up",
        {"name": deployment.name, "services": {"server": for_compose(service)}},
    )


def kubernetes(deployment: Deployment) -> str:
    """A claim for the exported folder's contents, a Deployment that reads it and a Service inside the cluster."""
    labels = {"app.kubernetes.io/name": deployment.name, "app.kubernetes.io/part-of": "quantpress"}
    meta = {"name": deployment.name, "labels": labels}
    asked, most = deployment.resources.host_bytes(cuda=deployment.cuda)
    needs: dict[str, Any] = {
        "requests": {"cpu": "4", "memory": quantity(asked)},
        "limits": {"memory": quantity(most)},
    }
    if deployment.cuda:
        needs["limits"]["nvidia.com/gpu"] = deployment.resources.gpus
    probe = {"httpGet": {"path": deployment.health, "port": "http"}, "timeoutSeconds": 10}
    argv = deployment.in_container()
    container: dict[str, Any] = {
        "name": "server",
        "image": deployment.image,
        "command": for_kubernetes(argv[:1]),
        "args": for_kubernetes(argv[1:]),
        "ports": [{"name": "http", "containerPort": deployment.port}],
        "env": [{"name": key, "value": for_kubernetes(value)} for key, value in deployment.container_env().items()],
        "resources": needs,
        "startupProbe": probe | {"periodSeconds": 10, "failureThreshold": _START_SECONDS // 10},
        "readinessProbe": probe | {"periodSeconds": 10},
        "livenessProbe": probe | {"periodSeconds": 30, "failureThreshold": 3},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            *({"name": "files", "mountPath": m.path, "subPath": m.inside, "readOnly": True} for m in deployment.mounts),
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "files", "persistentVolumeClaim": {"claimName": deployment.name, "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(SHARED_BYTES)}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    selector = {"app.kubernetes.io/name": deployment.name}
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a rolling update would need twice the GPUs
            "selector": {"matchLabels": selector},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    ports = [{"name": "http", "port": deployment.port, "targetPort": "http"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"type": "ClusterIP", "selector": selector, "ports": ports},
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": meta,
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": quantity(deployment.resources.weights_bytes * 5 // 4 + 2**30)}},
        },
    }
    heading = f"{deployment.title}: kubectl apply -f; then copy this folder's contents into the claim {deployment.name}"
    return _document(heading, claim, workload, service)


class _Plain(yaml.SafeDumper):
    """YAML without anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _document(heading: str, *contents: dict[str, Any]) -> str:
    written = yaml.dump_all(contents, Dumper=_Plain, sort_keys=False, width=118)
    return f"# {comment(heading)}\n{written}"
