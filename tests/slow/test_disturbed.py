"""Runs that are killed at any file operation or at any time, or find the disk full: the same command ends with the same
bytes, and nothing half written is left."""

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..forked import Done, started
from .campaign import Place, aged, content, debris, differences, fresh, told_in_one_line

pytestmark = pytest.mark.slow
EACH = int(os.environ.get("QUANTPRESS_CAMPAIGN", "24"))  # disturbances of each kind of each command
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "said").mkdir()
    with started(folder / "said") as python:
        made = Place(folder, python)
        made.prepare()
        done = made.whole(["run", str(folder / "a.yaml"), "--out", str(folder / "finished"), "--ignore-limits"])
        assert done.returncode == 0, done.stderr
        yield made


def scenario(place: Place, name: str, out: Path) -> tuple[Path | None, list[str]]:
    """Where a command in `out` begins (None: without a folder), and the command."""
    if name == "quantize":
        return None, place.quantize(out)
    if name == "run":
        return None, ["run", str(place.folder / "a.yaml"), "--out", str(out), "--ignore-limits"]
    return place.folder / "finished", {
        "overwrite": place.quantize(out, "b", "--overwrite"),
        "export": ["export", str(out), "--target", "vllm", "--overwrite"],
        "report": ["report", str(out)],
        "card": ["card", str(out)],
        "publish": ["publish", str(out), "--to", "org/name"],
    }[name]


def numbers(count: int) -> list[int]:
    """Operations to disturb, spread over all of them."""
    return sorted({1 + i * count // EACH for i in range(EACH)} | {count}) if count > EACH else list(range(1, count + 1))


@pytest.mark.parametrize("name", ["quantize", "overwrite", "run", "export", "report", "card", "publish"])
@pytest.mark.parametrize("happens", ["kill", "full"])
def test_at_any_file_operation(name: str, happens: str, place: Place, tell: Callable[[str], None]) -> None:
    out = place.folder / "out"
    source, command = scenario(place, name, out)
    fresh(source, out)
    done = place.disturbed(command, out, 1 << 30, "count")
    assert done.returncode == 0, done.stderr
    wanted = content(out)
    count = int((place.folder / "out.count").read_text())
    ends: Counter[str] = Counter()
    wrong = []
    for number in numbers(count):
        fresh(source, out)
        done = place.disturbed(command, out, number, "kill" if happens == "kill" else "full")
        ends[how(done)] += 1
        aged(out)
        if happens == "full" and done.returncode != 0 and not (done.returncode in (1, 2) and told_in_one_line(done)):
            wrong.append(f"{number}: {done.returncode} {done.stderr[-400:]}")
        done = place.whole(command)
        if done.returncode != 0:
            wrong.append(f"{number}, again: {done.returncode} {done.stderr[-400:]}")
        elif unlike := differences(content(out), wanted):
            wrong.append(f"{number}, again: {unlike}")
        if left := debris(out):
            wrong.append(f"{number}: left {left}")
    tell(f"{name}, {happens} at {sum(ends.values())} of {count} file operations: {dict(ends)}")
    assert not wrong, "\n".join(wrong)


def how(done: Done) -> str:
    return "killed" if done.returncode < 0 else f"exit {done.returncode}"


def test_at_any_time(place: Place, tell: Callable[[str], None]) -> None:
    """Signals after some milliseconds, until a run is whole; several to each."""
    out, chosen = place.folder / "out", random.Random(20)
    command = place.quantize(out)
    fresh(None, out)
    assert place.whole(command).returncode == 0
    wanted = content(out)
    ends: Counter[str] = Counter()
    for _ in range(EACH // 2):
        fresh(None, out)
        for kind in [chosen.choice(SIGNALS) for _ in range(2)]:
            later = (
                f"import os, signal, time\nif os.fork() == 0:\n    time.sleep({chosen.uniform(0, 1.5)})\n"
                f"    os.kill(os.getppid(), {int(kind)})\n    os._exit(0)\n"
            )
            done = place.python.run(command, place.before() + later)
            aged(out)
            ends[f"{kind.name}: {how(done)}"] += 1
            assert "Traceback" not in done.stderr, done.stderr
        done = place.whole(command)
        assert done.returncode == 0, done.stderr
        assert differences(content(out), wanted) == []
        assert debris(out) == []
    tell(f"signals: {dict(ends)}")


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")


@contextmanager
def mounted(disk: Path, size: int) -> Iterator[Path]:
    """A small disk in memory."""
    disk.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk: {done.stderr.decode()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@needs_mount
def test_on_disks_of_any_size(place: Place, tell: Callable[[str], None]) -> None:
    """A real one that is full at any byte, where libraries write too; then there is room, and the run goes on."""
    fresh(None, place.folder / "out")
    assert place.whole(place.quantize(place.folder / "out")).returncode == 0
    wanted = content(place.folder / "out")
    needed = sum(map(len, wanted.values()))
    ends: Counter[str] = Counter()
    for i in range(EACH // 2):
        size = 4096 * (2 + (3 * needed * i // (EACH // 2)) // 4096)
        with mounted(place.folder / "disk", size) as disk:
            done = place.whole(place.quantize(disk / "out"))
            ends[how(done)] += 1
            assert done.returncode == 0 or (done.returncode in (1, 2) and told_in_one_line(done)), (size, done)
            subprocess.run(["mount", "-o", f"remount,size={64 * needed}", str(disk)], check=True)
            done = place.whole(place.quantize(disk / "out"))
            assert done.returncode == 0, done.stderr
            assert differences(content(disk / "out"), wanted) == []
    tell(f"disks of 8 KB to {3 * needed // 1000} KB: {dict(ends)}")


@needs_mount
def test_on_a_disk_that_is_mounted_for_reading(place: Place) -> None:
    with mounted(place.folder / "still", 1 << 26) as disk:
        fresh(place.folder / "finished", disk / "out")
        before = content(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        commands = [
            place.quantize(disk / "new" / "out"),
            ["export", str(place.folder / "finished"), "--target", "vllm", "--out", str(disk / "new")],
            *(scenario(place, name, disk / "out")[1] for name in ("export", "report", "card", "publish", "overwrite")),
        ]
        for command in commands:
            done = place.whole(command)
            assert done.returncode in (1, 2), (command, done)
            assert told_in_one_line(done), (command, done)
            assert "Read-only file system" in done.stderr, (command, done)
        assert differences(content(disk), before) == []
