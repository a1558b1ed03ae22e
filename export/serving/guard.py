"""Runs a server such that none of its processes outlives us: `python guard.py GRACE COMMAND…`.

Its stdin is a pipe that the parent holds open. When the parent closes the pipe or dies, in whatever way, the guard ends
the server and every process it has started. (Linux's parent-death signal would reach the server alone and leave its
engine processes running.)
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
    """Run `command` until it ends or the pipe closes; returns its exit status as a shell gives it.

    grace_s: seconds between SIGTERM and SIGKILL.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, stop)
    if sys.platform == "linux":  # orphans of the server become our children, so that we can find them
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
    """End every descendant of this process: SIGTERM first, SIGKILL after `grace_s` seconds."""
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
