"""Runs a server so that nothing of it outlives us: `python guard.py GRACE COMMAND…`, a process of its own.

Its stdin is a pipe that the parent holds open. When the parent closes the pipe or is gone, however it went, the guard
ends the server and every process the server started. A signal that only the parent's death sends would reach the
server alone and leave its engine running; and it exists on Linux only.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from types import FrameType

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_NOT_STARTED = 127


def main(grace_s: float, command: list[str]) -> int:
    """Run `command` until it ends or the pipe does; returns its status, as a shell gives it.

    grace_s: between asking the server to end and making it.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, stop)
    if sys.platform == "linux":  # what the server's dead children leave behind becomes ours, and is found
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        return _NOT_STARTED
    while server.poll() is None and not stopped:
        closed, _, _ = select.select([0], [], [], 0.1)
        stopped = stopped or (bool(closed) and not os.read(0, 1))
    status = server.poll()
    end_descendants(grace_s)
    return 128 - status if status is not None and status < 0 else status or 0


def end_descendants(grace_s: float) -> None:
    """End every process below this one: asked first, then made to."""
    asked = psutil.Process().children(recursive=True)
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(asked, timeout=grace_s)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
