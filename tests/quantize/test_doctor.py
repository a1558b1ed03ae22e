"""What the machine has, and how to get what it lacks."""

import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from quantpress.quantize.cli import doctor
from quantpress.quantize.cli.app import app


def test_it_names_versions_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "no_such_module", ("a thing", "pip install thing"))
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert facts["torch"] == version("torch")
    assert facts["a thing"] == {"missing": "pip install thing"}
    assert {"server vllm", "server llama.cpp", "server transformers"} <= set(facts)
    lines = CliRunner().invoke(app, ["doctor"]).output
    assert "not here: pip install thing" in lines
