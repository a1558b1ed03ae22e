"""Commands in processes of their own that share one start: torch and transformers are imported once, then forked.

The process that forks has imported libraries and computed nothing, so no thread is lost in a child. There is one for
all tests of this process, which takes seconds to start.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).parents[1]
_FORK = """
import atexit, json, os, sys, traceback
import compressed_tensors.quantization, quantpress.api, quantpress.cli, transformers.models.llama.modeling_llama
from quantpress.core.machine import collecting_only_what_is_new
def child(code, arguments, place, environment, folder):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["quantpress", *arguments]
    try:
        exec(code + "\\nfrom quantpress.cli import main; main()", {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking the interpreter apart takes seconds
sys.path.insert(0, sys.argv[1])  # of the tests
collecting_only_what_is_new().__enter__()
for line in sys.stdin:
    step = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(*step)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)  # as above
"""
_ENVIRONMENT = dict(os.environ)  # as no test has changed it


@dataclass(frozen=True)
class Done:
    """How a command ended, as of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A Python that has imported everything; `folder`, an existing one, is for what the commands print."""

    def __init__(
        self, folder: Path, process: "subprocess.Popen[str]", environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder, self._process, self._count = folder, process, 0
        self._environment = environment or {}

    def run(self, arguments: Sequence[str], code: str = "") -> Done:
        """`quantpress ARGUMENTS`; code: what is done before it, in Python. Negative return codes are signals."""
        place = self._folder / str(self._count)
        self._count += 1
        step = [code, list(arguments), str(place.absolute()), os.environ | self._environment, os.getcwd()]
        _pipe(self._process.stdin).write(json.dumps(step) + "\n")
        _pipe(self._process.stdin).flush()
        answer = _pipe(self._process.stdout).readline()
        assert answer, "the process that forks has ended"
        out, err = (place.with_name(f"{place.name}.{name}") for name in ("out", "err"))
        return Done(int(answer), out.read_text(errors="replace"), err.read_text(errors="replace"))


@contextmanager
def started(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Started]:
    """One of its own, for commands that find other settings than ours when they import libraries.

    environment: what they have besides this process's own.
    """
    process = _start(os.environ | (environment or {}))
    try:
        yield Started(folder, process, environment)
    finally:
        _end(process)


def commands(folder: Path, steps: Sequence[tuple[str, Sequence[str]]]) -> list[Done]:
    """Run `quantpress ARGUMENTS` for each (code, arguments), one after another; code: what is done before, in Python.

    folder: an existing one, for what they print.
    """
    python = Started(folder, _for_all())
    return [python.run(arguments, code) for code, arguments in steps]


def run_python(folder: Path, code: str, arguments: Sequence[str] = ()) -> Done:
    """Run code alone, which finds the arguments in sys.argv[1:]; folder: an existing one, for what it prints."""
    return Started(folder, _for_all()).run(arguments, f"{code}\nraise SystemExit")


@cache
def _for_all() -> "subprocess.Popen[str]":
    process = _start(_ENVIRONMENT)
    atexit.register(_end, process)
    return process


def _start(environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _FORK, str(_ROOT)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _end(process: "subprocess.Popen[str]") -> None:
    _pipe(process.stdin).close()
    process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
