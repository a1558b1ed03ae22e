"""One run in several processes: started here for `--gpus`, or found in the environment that torchrun sets."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import IO, Annotated

import typer

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..core.ranks import Ranks
from .printing import say

GpusOpt = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="quantize on so many GPUs of this machine; on several machines use torchrun"),
]
LAUNCHED = "QUANTPRESS_LAUNCHED"  # set where `launch` tells the user why a process has ended
LOST = 75  # exit code of one that ends because another has
_GRACE = 20.0  # seconds in which the others may end by themselves
_POLL = 0.05


def joined(options: Options, gpus: int | None) -> Options:
    """`options` with the processes that torchrun has started; for --gpus, they are started here, and typer.Exit raised.

    A process of several takes one GPU for itself, where there are any. Raises BadInput for more processes than GPUs.
    """
    environment = os.environ
    size = int(environment.get("WORLD_SIZE", "1"))
    if gpus is not None:
        if "WORLD_SIZE" in environment:
            raise BadInput("--gpus starts processes of its own: leave it out under torchrun")
        _check_gpus(gpus, "--gpus")
        if gpus > 1:
            raise typer.Exit(launch(_command(sys.argv[1:]), gpus))
    if size == 1:
        return options
    here = int(environment.get("LOCAL_WORLD_SIZE", size))
    if _gpus():
        _check_gpus(here, "--nproc-per-node")
        _take_gpu(int(environment["LOCAL_RANK"]))
    return replace(options, ranks=Ranks(int(environment["RANK"]), size, here))


def planned(options: Options, gpus: int | None) -> Options:
    """`options` of a plan for `run --gpus`, which is refused where that is."""
    if gpus is None:
        return options
    _check_gpus(gpus, "--gpus")
    return replace(options, ranks=Ranks(0, gpus, gpus))


def launch(command: Sequence[str], size: int) -> int:
    """Run a command in `size` processes as torchrun does; returns an exit code. Why it fails is said in one line.

    The first has our stdout and stderr; what the others say is shown only if it is why the run ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // size))
    common = {"OMP_NUM_THREADS": threads} | os.environ | {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        LAUNCHED: "1",
    }  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(size)]
        try:
            for rank, log in enumerate(logs):
                own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                out, errors = (None, None) if rank == 0 else (subprocess.DEVNULL, log)
                started.append(subprocess.Popen(command, env=own, stdout=out, stderr=errors))
            return _ended(started, logs)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _ended(started: list["subprocess.Popen[bytes]"], logs: Sequence[IO[bytes]]) -> int:
    """Wait for processes that belong together; returns the exit code of them all, and says why one was lost."""
    failed: int | None = None  # the first that did
    deadline = 0.0
    try:
        while any(process.poll() is None for process in started):
            if failed is None:
                failed = next((i for i, p in enumerate(started) if p.returncode not in (None, 0, LOST)), None)
                deadline = time.monotonic() + _GRACE
            elif time.monotonic() > deadline:
                break
            time.sleep(_POLL)
    except KeyboardInterrupt:  # they have been told, too
        for process in started:
            process.wait()
        return started[0].returncode or 130
    leader = started[0].poll()
    if leader is not None and leader >= 0 and leader != LOST:
        return leader
    failed = failed or next((i for i, p in enumerate(started) if p.returncode not in (None, 0, LOST)), 0)
    code = started[failed].returncode
    if code is None or code < 0:
        why = f"signal {-code}" if code else "an error"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        say(f"quantpress: process {failed} of the run was ended by {why}{hint}; the same command continues from what "
            "is finished")  # fmt: skip
        return 1
    logs[failed].seek(0)
    lines = logs[failed].read().decode(errors="replace").strip().splitlines()
    say(lines[-1] if lines else f"quantpress: process {failed} of the run ended with exit code {code}")
    return int(code)


def _command(arguments: Sequence[str]) -> list[str]:
    """This command without --gpus."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not (skip or argument == "--gpus" or argument.startswith("--gpus=")):
            kept.append(argument)
        skip = argument == "--gpus"
    return [sys.executable, "-m", "quantpress", *kept]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _check_gpus(wanted: int, option: str) -> None:
    there = _gpus()
    if wanted > there:
        raise BadInput(f"{option} {wanted}: this machine has {there} GPU{'' if there == 1 else 's'}")


def _take_gpu(local_rank: int) -> None:
    """Let this process see one GPU only, so that it is the first, and every thread's default."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(_gpus())]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank]
