"""Command lines of rubbish: every command, every option. One line and a documented exit code, never a traceback."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quantpress.cli.app import app

from ..forked import started
from .campaign import Place, content, told_in_one_line
from .test_disturbed import EACH

pytestmark = pytest.mark.slow
JUNK = (
    "", " ", "-", "--", "0", "-1", "1e400", "nan", "9" * 400, "x" * 5000, "[v1]", "[/b]out", "~nosuchuser", "a\nb",
    "ä\x1b[31m", "\udcff", "/dev/null", "/proc/self/mem", "/", ".", "../..", "$(id)", "'; id; '", "org/name",
    "org/name@", "null", "http://[", "a=b", "method.damp=", "method.damp=[", "weights.bits=1e9", "a.b.c.d=1", "=", "{}",
    "*", "none.yaml",
)  # fmt: skip
_CODES = {0, 1, 2, 3, 4}
_LIMIT = """
import signal
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(300)
"""
_LEFT_OUT = {"doctor"}  # it looks at the whole machine, and takes no arguments


def lines(place: Place, count: int) -> Iterator[list[str]]:
    """Commands with one or two options of rubbish; arguments are right half of the time."""
    group: Any = typer.main.get_command(app)
    chosen = random.Random(20)
    right = [str(place.folder / "copy"), str(place.folder / "a.yaml"), str(place.folder / "model")]
    for _ in range(count):
        for name, command in group.commands.items():
            if name in _LEFT_OUT:
                continue
            line = [name]
            for one in command.params:
                if one.param_type_name == "argument":
                    line.append(chosen.choice(right if chosen.random() < 0.7 else JUNK))
            options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
            for one in chosen.sample(options, min(len(options), chosen.choice((1, 1, 2)))):
                line.append(one.opts[0])
                if not one.is_flag:
                    line.append(chosen.choice(JUNK))
            if name in ("run", "quantize", "sweep", "plan") and "--model" not in line:
                line += ["--model", chosen.choice([*right[2:], "", "org/name", "[v1]"])]
            if name == "smoke" and "--server" not in line:  # which would start one
                line += ["--server", chosen.choice(JUNK)]
            yield line


def test_rubbish_on_the_command_line(tmp_path: Path, tell: Callable[[str], None]) -> None:
    (tmp_path / "said").mkdir()
    (tmp_path / "work").mkdir()
    ends: Counter[str] = Counter()
    wrong = []
    with started(tmp_path / "said") as python:
        place = Place(tmp_path, python)
        place.prepare()
        assert place.whole(place.quantize(tmp_path / "copy")).returncode == 0
        before = content(tmp_path / "copy" / "quantized")
        here = place.before() + f"os.chdir({str(tmp_path / 'work')!r})\n" + _LIMIT
        for line in lines(place, max(1, EACH // 2)):
            done = python.run(line, here)
            ends[f"exit {done.returncode}"] += 1
            good = done.returncode in _CODES and "Traceback" not in done.stderr and len(done.stderr) < 20_000
            if not good or (done.returncode == 2 and not told_in_one_line(done)):
                wrong.append(f"{line!r}: {done.returncode} {done.stderr[-600:]}")
        after = content(tmp_path / "copy" / "quantized")
    tell(f"command lines: {dict(ends)}")
    assert not wrong, "\n".join(wrong)
    assert before.items() <= after.items()  # a card may have come
