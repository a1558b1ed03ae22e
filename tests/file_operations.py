"""Something happens at the n-th file operation of a process in a folder: it is killed, or the disk is full from there.

Operations are seen by Python's audit events before they are done, and fsync by itself; what libraries in other
languages write is seen by what follows it.
"""

import atexit
import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

Happens = Literal["count", "kill", "full"]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TAKE_ROOM = ("open", "os.mkdir", "os.link", "fsync")


def code(folder: str, number: int, happens: Happens) -> str:
    """What a forked command does first (tests/forked.py)."""
    return f"from tests.file_operations import watch; watch({folder!r}, {number}, {happens!r})"


def watch(folder: str, number: int, happens: Happens) -> None:
    """From operation `number` on, which begin with 1. count: at the end their number goes into FOLDER.count."""
    seen, removing = [0], [False]

    def act(event: str, path: str) -> None:
        seen[0] += 1
        if seen[0] < number:
            return
        if happens == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if happens == "full" and event in _TAKE_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "shutil.rmtree":
            removing[0] = inside(arguments[0])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.truncate") or event == "os.link":
            path = arguments[1] if event == "os.link" else arguments[0]
            within = inside(path) if os.path.isabs(path) else removing[0]  # rmtree names what it removes by its folder
            if within:
                act(event, os.fsdecode(path))
        elif (
            event == "open" and isinstance(arguments[0], str | bytes) and _writes(arguments[2]) and inside(arguments[0])
        ):
            act(event, os.fsdecode(arguments[0]))

    def inside(path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(folder)

    sync = os.fsync

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if inside(path):
            act("fsync", path)
        sync(handle)

    os.fsync = fsync
    if happens == "count":
        atexit.register(lambda: Path(f"{folder}.count").write_text(str(seen[0])))
    sys.addaudithook(hook)


def _writes(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & _WRITES)
