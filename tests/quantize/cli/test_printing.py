"""What users and models name is printed as it is: no markup, no emoji, nothing that a terminal acts on."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantpress.cli import printing

_ODD = ("runs/[v1]/x", "[/b]out", "[bold red]x", ":warning:/x", "a\\[b]", "[link=file:/etc/passwd]x[/link]")
ROOT = Path(printing.__file__).resolve().parent


@pytest.mark.parametrize("name", _ODD)
def test_nothing_of_the_users_is_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    printing.show(f"artifact: {name}")
    printing.show_path("artifact", Path(name), as_json=False)
    printing.say(f"note: {name}")
    printing.say(name, style="bold red")
    printing.show_table(("file", "bytes"), [(name, name), ("[b]", "1")], bold=[name], right=1)
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == [f"artifact: {name}"] * 2
    assert said.out.count(name) == 4
    assert said.err.splitlines() == [f"note: {name}", name]


def test_on_a_terminal_neither(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(printing, "err_console", Console(stderr=True, force_terminal=True, width=200, _environ={}))
    with printing.progress_bar("evaluating [v1]", 3) as advance:
        advance(1, "[/b]")
    said = capsys.readouterr().err
    assert "evaluating [v1]" in said
    assert "[/b]" in said


@pytest.mark.parametrize("width", [80, 120])
def test_all_of_a_bar_fits_on_a_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(printing, "err_console", Console(stderr=True, force_terminal=True, width=width, _environ={}))
    with printing.progress_bar("quantizing", 80) as advance:
        advance(79, "error 0.58%")
    assert re.search(r"block 79/80 .* left error 0\.58% memory \d+ [MG]B", capsys.readouterr().err)


def test_terminals_are_sent_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    printing.show("a\x1b[2J\x07b\u202ec\ud800d\ne")
    printing.say("a\x9bm\rb")
    said = capsys.readouterr()
    assert said.out == "a\\x1b[2J\\x07b\\u202ec\\ud800d\ne\n"
    assert said.err == "a\\x9bm\\rb\n"


def test_one_file_alone_prints_by_rich() -> None:
    def of_rich(node: Any) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return any(name.split(".")[0] == "rich" for name in names)

    found = {
        file.name
        for file in ROOT.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and of_rich(node)
    }
    assert found == {"printing.py"}
