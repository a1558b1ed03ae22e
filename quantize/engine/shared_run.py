"""One run shared by several processes, each with a GPU or a part of the CPU: what they tell each other beside blocks.

All of them check the recipe and run the blocks on their part of the calibration set. The leader alone reads the text,
writes the artifact and has the journal, so that a run may be resumed with another number of processes.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calibrate.lanes import LANES, Lanes
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.errors import BadInput
from ..core.ranks import Ranks
from ..models.vetting import vetting
from ..recipe import Tuned
from .huggingface_folder import HuggingFaceFolder
from .job import Job
from .room import IN_HOST_MEMORY, Room

Identity = tuple[Any, ...]


@dataclass(frozen=True)
class _Report:
    """What a process says of itself. problem: why it cannot take part. files: which on which machine they are."""

    problem: str | None
    files: Identity = ()
    room: Room = IN_HOST_MEMORY
    versions: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Start:
    """What the leader tells the others once all is read: the text, and what the journal holds."""

    tokens: Tokens
    done: int
    batch_tokens: int | None


def check(job: Job, ranks: Ranks) -> None:
    """Raise BadInput for a recipe whose work is not shared between processes, or not between so many."""
    recipe = job.recipe
    if ranks.size == 1:
        return
    alone = "run it with one process: without --gpus, without torchrun"
    if not recipe.calibrated:
        raise BadInput(f"method {recipe.method.name} without calibration is not shared between processes; {alone}")
    if not isinstance(job.backend, HuggingFaceFolder):
        raise BadInput(f"a GGUF file is not made by several processes; {alone}")
    if isinstance(recipe.method, Tuned):
        raise BadInput(f"method {recipe.method.name} trains in one process; {alone}")


def meet(make: Callable[[], Job], ranks: Ranks) -> tuple[Job, list[bool]]:
    """Find the other processes; returns the job, with the least of everyone's room, and which of the processes read
    files that no earlier one reads.

    make: the job, checked. Raises BadInput where a process cannot take part; LostRank where another tells why.
    """
    job, report = None, _Report("")
    try:
        job = make()
        check(job, ranks)
        versions = machine.libraries() | {"device": machine.describe(job.skeleton.device)["device"]}
        report = _Report(None, _identity(job), job.plan.room, versions)
    except BadInput as error:
        if ranks.leads:
            raise
        report = _Report(f"process {ranks.rank} of the run: {error}")
    ranks.open(torch.cuda.is_available())
    reports: list[_Report] = ranks.gather(report)
    ranks.agree(next((r.problem for r in reports if r.problem is not None), None))
    assert job is not None
    other = next((i for i, r in enumerate(reports) if r.versions != reports[0].versions), None)
    if other is not None:
        ranks.agree(f"process {other} of the run has {reports[other].versions}, the first {reports[0].versions}")
    room = _least([r.room for r in reports])
    first = [all(r.files != before.files for before in reports[:i]) for i, r in enumerate(reports)]
    return replace(job, plan=replace(job.plan, room=room)), first


def check_count(job: Job, ranks: Ranks) -> None:
    """Raise BadInput where the calibration set has fewer lanes than there are processes."""
    if ranks.size == 1:
        return
    wanted = job.recipe.calibration
    lanes = Lanes.of(wanted.samples, wanted.seq_len, job.plan.room.batch_tokens)
    if ranks.size > lanes.count:
        raise BadInput(
            f"{ranks.size} processes for {wanted.samples} samples of {wanted.seq_len} tokens, which are summed up in "
            f"{lanes.count} parts (at most {LANES}): use at most {lanes.count}"
        )


def compare_files(files: Mapping[str, str] | None, ranks: Ranks) -> None:
    """Raise BadInput unless all processes see the same files. files: SHA-256 by name; None: another one's."""
    seen: list[Mapping[str, str] | None] = ranks.gather(files)
    for rank, theirs in enumerate(seen):
        if theirs is None or theirs == seen[0]:
            continue
        leader = seen[0] or {}
        name = min(n for n in {*leader, *theirs} if leader.get(n) != theirs.get(n))
        ranks.agree(f"process {rank} of the run sees another {name} than the first; give all of them the same model")
        raise AssertionError


def follow(make: Callable[[], Job], ranks: Ranks) -> tuple[Job, Start] | None:
    """What another process than the leader does before the blocks; None where the run was finished before."""
    job, first = meet(make, ranks)
    if ranks.tell():
        return None
    files = None
    if first[ranks.rank]:
        with vetting(job.checkpoint, job.backend.limits) as vetted:
            files = vetted.hashes()
    compare_files(files, ranks)
    start: Start = ranks.tell()
    return job, start


def _identity(job: Job) -> Identity:
    """The model's files as this machine knows them: equal on two processes only where both read the same files."""
    stats = [(path.name, path.stat()) for path in sorted(job.checkpoint.layout())]
    return socket.gethostname(), os.getuid(), *((n, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in stats)


def _least(rooms: list[Room]) -> Room:
    return Room(
        min(room.batch_tokens for room in rooms),
        all(room.on_device for room in rooms),
        all(room.spare for room in rooms),
        any(room.restarts for room in rooms),
        any(room.on_disk for room in rooms) and not all(room.on_device for room in rooms),
    )
