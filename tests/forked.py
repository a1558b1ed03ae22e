"""Commands in processes of their own that share one start: torch and transformers are imported once, then forked.

The process that forks has imported libraries and computed nothing, so no thread is lost in a child.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FORK = """
import atexit, json, os, sys, traceback
import compressed_tensors.quantization, quantpress.api, quantpress.cli, transformers.models.llama.modeling_llama
def child(code, arguments, place):
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
place, steps = sys.argv[1], json.load(sys.stdin)
for number, (code, arguments) in enumerate(steps):
    pid = os.fork()
    if pid == 0:
        child(code, arguments, f"{place}/{number}")
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, as of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def commands(folder: Path, steps: Sequence[tuple[str, Sequence[str]]]) -> list[Done]:
    """Run `quantpress ARGUMENTS` for each (code, arguments), one after another; code: what is done before, in Python.

    folder: an existing one, for what they print.
    """
    run = [sys.executable, "-c", _FORK, str(folder)]
    done = subprocess.run(run, input=json.dumps(steps), capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.splitlines()]
    assert len(codes) == len(steps), done.stderr
    prints = [[(folder / f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(steps))]
    return [Done(code, *printed) for code, printed in zip(codes, prints, strict=True)]
