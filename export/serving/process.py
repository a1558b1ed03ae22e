"""A server as a child process: started, watched, and ended together with every process it has started."""

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

_GUARD = Path(__file__).with_name("guard.py")
_GRACE_S = 10.0  # between SIGTERM and SIGKILL
_QUOTED_LINES = 12
_POLL_S = 0.2
_TELL_AFTER_S, _TELL_AT_LEAST_EVERY_S = 5.0, 40.0
# What a server may need of our environment: where things are, languages, and settings of libraries and devices.
_INHERITED = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "TMPDIR", "TEMP", "TMP", "PWD",
    "HOSTNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "SSL_CERT_FILE", "SSL_CERT_DIR",
}  # fmt: skip
_FAMILIES = (
    "LC_", "XDG_", "PYTHON", "CUDA_", "NVIDIA_", "NCCL_", "ROCR_", "HIP_", "HSA_", "OMP_", "KMP_", "GOMP_", "MKL_",
    "OPENBLAS_", "TORCH", "PYTORCH_", "TRITON_", "VLLM_", "SGLANG_", "GGML_", "LLAMA_", "OLLAMA_", "TRANSFORMERS_",
    "TOKENIZERS_", "DOCKER_",
)  # fmt: skip
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "AUTH")  # in a name, whatever family it is of


class ServerFailed(Exception):
    """The server did not start or has died; the message ends with the last lines of its log."""


class ServerTooSlow(ServerFailed):
    """The server runs but was not healthy in time, which says nothing about the artifact."""


class Child:
    """A running server under its guard process, with its log."""

    def __init__(self, guard: subprocess.Popen[bytes], log: Path, grace_s: float) -> None:
        self._guard, self.log, self._grace_s = guard, log, grace_s
        self.peak_rss_bytes = 0

    @property
    def status(self) -> int | None:
        """Exit status of the server; None while it runs."""
        return self._guard.poll()

    def ended(self) -> int | None:
        """Exit status of a server that has ended by itself; None while it runs."""
        if not self.processes():
            with contextlib.suppress(subprocess.TimeoutExpired):  # the guard is about to exit with it
                self._guard.wait(2 * self._grace_s)
        return self.status

    def last_lines(self, count: int = _QUOTED_LINES) -> str:
        """The end of the server's log, for a message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip()][-count:]
        return "\n".join(f"  | {line[:300]}" for line in said) or "  | (it wrote nothing)"

    def processes(self) -> list[psutil.Process]:
        """The server and all the processes it has started that still run."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._guard.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and TCP ports that the server's processes accept connections on."""
        found: set[tuple[str, int]] = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((connection.laddr.ip, connection.laddr.port))
        return found

    def exposed(self) -> list[str]:
        """Listening addresses that other machines can reach."""
        return sorted(f"{ip}:{port}" for ip, port in self.listening() if not ipaddress.ip_address(ip).is_loopback)

    def watch_memory(self, until: threading.Event) -> None:
        """Track the peak resident memory of all its processes together; shared pages count once for each."""
        while not until.wait(_POLL_S):
            total = 0
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak_rss_bytes = max(self.peak_rss_bytes, total)

    def end(self) -> None:
        """End the server and every process it has started; returns when they are gone."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            self._guard.wait(2 * self._grace_s + _POLL_S)
        except subprocess.TimeoutExpired:  # the guard itself hangs
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a server is started with: by an allow-list, since it loads files of others."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _INHERITED or name.startswith(_FAMILIES)) and not any(word in name.upper() for word in _SECRET)
    }


def guarded(command: Sequence[str], grace_s: float = _GRACE_S) -> list[str]:
    """`command` under guard.py, which ends it and all it has started once the guard's stdin closes."""
    return [sys.executable, "-P", str(_GUARD), str(grace_s), *command]


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, grace_s: float = _GRACE_S
) -> Iterator[Child]:
    """Run `command` with additions to the environment, its output in `log`; it ends with the block, however that ends.

    The child has a session of its own: Ctrl-C reaches us, and we end it. Of our environment it has `inherited` alone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        guard = subprocess.Popen(
            guarded(command, grace_s), stdin=subprocess.PIPE, stdout=out, stderr=out,
            env=inherited(os.environ) | dict(environment), cwd=log.parent, start_new_session=True,
        )  # fmt: skip
    child, over = Child(guard, log, grace_s), threading.Event()
    watcher = threading.Thread(target=child.watch_memory, args=(over,), daemon=True)
    try:
        watcher.start()
        yield child
    finally:
        over.set()
        child.end()


def wait_until_healthy(
    name: str, child: Child, url: str, deadline_s: float, tell: Callable[[str], None] = lambda line: None
) -> None:
    """Return when `url` answers with 200. Raises ServerFailed when the server ends or the deadline passes."""
    started, told, pause = time.monotonic(), time.monotonic(), _TELL_AFTER_S
    while (waited := time.monotonic() - started) < deadline_s:
        if child.status is not None:
            raise ServerFailed(
                f"{name} ended with status {child.status} after {waited:.0f} s, before it was healthy; the end of "
                f"{child.log}:\n{child.last_lines()}"
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        if time.monotonic() - told > pause:
            told, pause = time.monotonic(), min(2 * pause, _TELL_AT_LEAST_EVERY_S)
            last = child.last_lines(1).strip().removeprefix("| ")[:120]
            tell(f"{name}: starting, {waited:.0f} of at most {deadline_s:.0f} s: {last}")
        time.sleep(_POLL_S)
    raise ServerTooSlow(
        f"{name} was not healthy within {deadline_s:.0f} s (--deadline); the end of {child.log}:\n{child.last_lines()}"
    )


def free_port() -> int:
    """A TCP port of the loopback address that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
