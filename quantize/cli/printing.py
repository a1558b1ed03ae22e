"""What the commands print: results on stdout, everything beside them (progress, notes) on stderr.

Names, paths and messages are users' and models': nothing in them is markup, an emoji's name or a terminal's command.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantpress.eval.release.callbacks import Callbacks

from ..core.text import printable, size

if TYPE_CHECKING:
    from quantpress.eval.measure.results import Results
    from quantpress.exports.serving.record import Check, Serving

_WIDE = 120  # columns of a terminal in which all of a progress bar fits
_SILENCE_SECONDS = 60  # longest without a line where there is no bar, once a block is finished
_VERDICTS = {"ACCEPT": "ok  ", "REGRESSION": "MISS", "INCONCLUSIVE": "?   "}

_FAILED = "bold red"  # the style of what has to be seen

_out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def show(text: str, *, style: str = "") -> None:
    """A line of the result, or several, on stdout."""
    _out.print(_plain(text), style=style)


def say(line: str, *, style: str = "") -> None:
    """A line beside the result, on stderr; it is not wrapped."""
    err_console.print(_plain(line), style=style, soft_wrap=True)


def show_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, bold: Collection[str] = (), right: int = -1
) -> None:
    """A table on stdout; without heads where these are empty. bold: first cells in bold. right: a column of numbers."""
    table = Table(*heads, box=None, pad_edge=False) if heads else Table.grid(padding=(0, 2))
    if right >= 0:
        table.columns[right].justify = "right"
    for first, *others in rows:
        table.add_row(Text(_plain(first), "bold" if first in bold else ""), *map(_plain, others))
    _out.print(table)


def _plain(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def print_json(document: Any) -> None:
    """The result for a program: one line of JSON on stdout."""
    print(json.dumps(document))  # noqa: T201


def show_path(what: str, path: Path, as_json: bool) -> None:
    """What a command has written."""
    if as_json:
        print_json({what: str(path)})
    else:
        show(f"{what}: {path}")


@contextmanager
def followed(quiet: bool = False) -> Iterator[Callbacks]:
    """Callbacks that show a bar at a time and print notes; quiet: no checks of a smoke test, which go to stdout."""
    with ExitStack() as bars:
        shown: str | None = None
        advance: Callable[..., None] = print

        def step(what: str, done: int, total: int, remark: str) -> None:
            nonlocal shown, advance
            if what != shown:
                bars.close()
                shown, advance = what, bars.enter_context(progress_bar(what, total))
            if total:
                advance(done, remark, total)

        def line(text: str) -> None:
            bars.close()
            say(text)

        yield Callbacks(step, lambda text: say(f"note: {text}"), line, (lambda check: None) if quiet else print_check)


@contextmanager
def progress_bar(what: str, blocks: int) -> Iterator[Callable[..., None]]:
    """Progress with the time left and this process's memory; on a terminal a bar, elsewhere a line for every fifth of
    the way and at least every minute.
    """
    from ..core.machine import rss_bytes

    if not err_console.is_terminal:
        told, before = 0, -1  # what was last printed; what was done at the first call, which only begins
        started = said = time.monotonic()

        def plain(done: int, remark: str, total: int = blocks) -> None:
            nonlocal told, before, started, said
            now = time.monotonic()
            if before < 0:
                told, before, started = min(done, total - 1), done, now
            if done * 5 // total > told * 5 // total or done == total or now - said >= _SILENCE_SECONDS:
                left = (now - started) / max(1, done - before) * (total - done)
                memory, rest = f"memory {size(rss_bytes())}", f"{left:.0f} s left" if left else ""
                say(" ".join(part for part in (f"{what} block {done}/{total}", remark, memory, rest) if part))
                said = now
            told = done

        yield plain
        return
    left, remark = TimeRemainingColumn(), TextColumn("{task.fields[remark]}", markup=False)
    narrow, done = err_console.width < _WIDE, TextColumn("block {task.completed}/{task.total}")
    elapsed = () if narrow else (TimeElapsedColumn(), TextColumn("elapsed,"))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(10 if narrow else 40), done, *elapsed,
               left, TextColumn("left"), remark)  # fmt: skip
    with Progress(*columns, console=err_console, transient=True) as progress:
        task = progress.add_task(what, total=blocks or None, remark="")

        def advance(done: int, remark: str, total: int = blocks) -> None:
            progress.update(task, completed=done, total=total, remark=f"{remark} memory {size(rss_bytes())}")

        yield advance


def print_results(results: "Results") -> None:
    """What was measured, a line each, then the gates, then whether any of it can be believed."""
    from quantpress.eval.measure.baselines import doubt
    from quantpress.eval.measure.lines import lines

    for name, told in lines(results):
        show(f"{name:<32} {told}")
    for line in results.warnings:
        say(f"note: {line}")
    for note in results.notes:
        say(f"note: not measured: {note}")
    for check in results.gates.checks:
        show(f"gate {_VERDICTS[check.verdict]}   {check.reason}")
    if results.gates.verdict == "INCONCLUSIVE":
        code = f" (exit code {results.gates.exit_code})" if results.gates.strict else ""
        say(f"note: a gate is too close to call{code}; gates.strict: false lets it pass")
    if (wrong := doubt(results)) is not None:
        say(f"\nWARNING {wrong}\n", style=_FAILED)


def print_check(check: "Check") -> None:
    """A check of a server, as it is made."""
    failed = check.status == "fail"
    sign = "FAIL" if failed else check.status
    show(f"{sign}  {check.name:<13} {check.seconds:6.1f} s  {check.reason}", style=_FAILED if failed else "")


def print_serving(record: "Serving", file: str) -> None:
    """What a smoke test measured; file: where its record is."""
    first, between = record.ttft_ms, record.itl_ms
    rows = {
        "server": f"{record.server} {record.version or ''}",
        "loaded in": None if record.load_seconds is None else f"{record.load_seconds:.1f} s",
        "first token": None if first is None else f"{first:.0f} ms after {record.prompt_tokens} tokens",
        "next tokens": None if between is None else
        f"{between.p50:.1f} ms; p95 {between.p95:.1f}, p99 {between.p99:.1f}",
        "tokens/s": ", ".join(f"{rate:.1f} at {n}" for n, rate in record.tokens_per_second.items()) or None,
        "peak memory": None if record.peak_rss_bytes is None else size(record.peak_rss_bytes),
        "record": file,
        "verdict": record.verdict,
    }  # fmt: skip
    for name, value in rows.items():
        if value is not None:
            show(f"{name:<12} {value}")
