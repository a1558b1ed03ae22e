"""Runs that several processes share, as torchrun starts them, out of one start of Python."""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .forked import Done, run_python

_FORK = """
import json, os, signal, sys, time, torch
torch.set_num_threads(1)
def run(place, size, port, arguments, own, codes):
    running = {}
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{place}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = ["quantpress", *arguments, *own.get(str(rank), ())]
            exec(codes.get(str(rank), "") + "\\nfrom quantpress.cli import main; main()", {"__name__": "__main__"})
            sys.exit()
        running[pid] = rank
    ended, deadline = {}, None
    while running:  # as torchrun does: where one fails, the others are ended too
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            deadline = deadline or (code and time.monotonic() + 8)
            continue
        if deadline and time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGTERM)
        time.sleep(0.02)
    return [ended[rank] for rank in range(size)]
print(json.dumps([run(*step) for step in json.loads(sys.argv[1])]))
"""


@dataclass(frozen=True)
class Step:
    """`quantpress ARGUMENTS` in `size` processes. own: further arguments of a rank; codes: what it does before."""

    size: int
    arguments: Sequence[str]
    own: Mapping[int, Sequence[str]] = field(default_factory=dict)
    codes: Mapping[int, str] = field(default_factory=dict)


def runs(folder: Path, steps: Mapping[str, Step]) -> dict[str, list[Done]]:
    """Take the steps one after another; returns how each process of each ended. folder: for what they print."""
    given = [
        (str(folder / name), one.size, str(_free_port()), list(one.arguments), dict(one.own), dict(one.codes))
        for name, one in steps.items()
    ]
    done = run_python(folder, _FORK, [json.dumps(given)])
    assert done.returncode == 0, done.stderr
    ended = dict(zip(steps, json.loads(done.stdout), strict=True))
    return {
        name: [Done(code, *((folder / f"{name}.{r}.{to}").read_text() for to in ("out", "err"))) for r, code in
               enumerate(codes)]
        for name, codes in ended.items()
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
