"""How the process of a command ends: at once, but not before all that others count on."""

import os
import subprocess
import sys

import pytest

_COMMAND = """
import atexit, ctypes, sys, threading, time
from quantpress.cli import process

class Left:
    def __del__(self):
        print("taken apart")

class Raised(Exception):
    pass

def main():
    global left
    left = Left()
    left.itself = left
    atexit.register(print, "called at exit")
    atexit.register(ctypes.CDLL(None).printf, b"in C, ")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's end"))).start()
    END

process.main = main
process.command()
"""


def end(how: str) -> subprocess.CompletedProcess[str]:
    code = _COMMAND.replace("END", how)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered)


@pytest.mark.parametrize("code", [0, 3])
def test_it_ends_with_the_status_once_all_is_said_and_takes_nothing_apart(code: int) -> None:
    done = end(f"sys.exit({code})")
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == "a thread's end\ncalled at exit\nin C, "


def test_a_mistake_of_ours_ends_as_any_python_does() -> None:
    done = end("raise Raised('why')")
    assert done.returncode == 1
    assert done.stderr.endswith("Raised: why\n")
    assert "called at exit\ntaken apart" in done.stdout


def test_no_output_is_no_problem() -> None:
    code = _COMMAND.replace("END", "sys.exit(0)")
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
