"""Progress where there is no terminal: seldom, but never silent for long, with the time and the memory."""

import re
import subprocess
import sys

import pytest

from quantpress.cli.printing import progress_bar
from quantpress.core import machine


def test_a_line_every_fifth_and_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress_bar("quantizing", 100) as advance:
        for done in range(40, 101):  # a run that goes on after block 40
            clock[0] += 25.0 if done <= 46 else 1.0
            advance(done, "error 1.00%")
    lines = capsys.readouterr().err.splitlines()
    told = [int(re.match(r"quantizing block (\d+)/100 error 1.00% memory [\d.]+ [MG]B", line)[1]) for line in lines]  # type: ignore[index]
    assert told == [42, 45, 60, 80, 100]
    assert lines[0].endswith(" 1450 s left")  # 2 blocks in 50 s, 58 to come
    assert lines[-1].endswith("B")


def test_peak_memory_is_this_programs_own() -> None:
    """Not what the process held that started it, which the kernel's other count begins with."""
    held = bytearray(1 << 30)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    code = "from quantpress.core import machine; print(machine.peak_rss_bytes())"
    alone = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 1 << 26 < alone < 1 << 30
    assert machine.peak_rss_bytes() >= 1 << 30
    del held
