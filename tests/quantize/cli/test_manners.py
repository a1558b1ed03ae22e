"""What a person at a terminal expects: -h, completion, the nearest name for a mistyped one, JSON from every command."""

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from quantpress.cli.app import app, main
from quantpress.cli.options import complete_recipe
from quantpress.exports.serving.starting import _version
from quantpress.recipe.loading import shipped, text_of


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["quantpress", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capfd.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out + captured.err


def test_help_has_a_short_name_and_recipes_complete() -> None:
    assert CliRunner().invoke(app, ["run", "-h"]).output == CliRunner().invoke(app, ["run", "--help"]).output
    assert complete_recipe("w4a16-g") == [name for name in shipped() if name.startswith("w4a16-g")] != []


@pytest.mark.parametrize(("typed", "meant"), [("rnu", "run"), ("quantise", "quantize"), ("recomend", "recommend")])
def test_the_nearest_command_is_named_once(
    typed: str, meant: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, line = said([typed], monkeypatch, capfd)
    assert code == 2
    assert line.startswith(f"quantpress: No such command {typed!r}.")
    assert line.count(f"id you mean {meant!r}?") == 1


def test_recipes_are_shown_copied_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(["recipes", "w4a16-gptq", "--show"], monkeypatch, capfd) == (0, text_of("w4a16-gptq"))
    assert said(["recipes", "--copy", "w4a16-gptq"], monkeypatch, capfd)[0] == 0
    assert Path("w4a16-gptq.yaml").read_text() == text_of("w4a16-gptq")
    code, line = said(["recipes", "--copy", "w4a16-gptq"], monkeypatch, capfd)
    assert (code, line.count("\n")) == (2, 1)
    Path("wrong.yaml").write_text("methud: rtn")
    assert said(["recipes", "--check", "w4a16-gptq.yaml"], monkeypatch, capfd) == (0, "1 recipe is valid\n")
    code, lines = said(["recipes", "--check", "wrong.yaml", "no.yaml", "w4a16-gptq.yaml"], monkeypatch, capfd)
    assert code == 2
    assert [line.split(":")[1].split()[1].strip("'") for line in lines.splitlines()] == ["wrong.yaml", "no.yaml"]
    for wrong in (["--show"], ["--copy"], ["--show", "--copy", "w4a16-gptq"]):
        assert said(["recipes", *wrong], monkeypatch, capfd)[0] == 2
    code, line = said(["recipes", "--show", "w4a16-gtpq"], monkeypatch, capfd)
    assert (code, "did you mean w4a16-gptq" in line) == (2, True)


def test_every_command_has_json() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    without = {
        name for name, command in commands.items() if "--json" not in {o for p in command.params for o in p.opts}
    }
    assert without == {"schema"}  # which prints nothing else
    listed = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).output)
    assert {one["name"] for one in listed} == set(shipped())
    assert all(one["group"] and one["description"] for one in listed)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["export", "none/run", "--target", "vllm"], "the folder none does not exist either"),
        (["export", "run", "--target", "vlm"], "did you mean 'vllm'?"),
        (["convert", "run", "new", "--to", "gtpq"], "did you mean 'gptq'?"),
        (["verify", "run", "--target", "vllm", "--way", "contrct"], "did you mean 'contract'?"),
        (["gguf", "run", "x.gguf", "--type", "f16"], "did you mean 'F16'?"),
        (["recommend", "run", "--fits", "1GB", "--prefer", "qualty"], "did you mean 'quality'?"),
        (["run", "--set", "formats=[compresed-tensors]"], "did you mean 'compressed-tensors'?"),
        (["run", "--set", "method.order=naturel"], "did you mean 'natural'?"),
        (["run", "--set", "smoke.server=vlm"], "did you mean 'vllm'?"),
        (["eval", "rnu"], "did you mean run?"),
        (["publish", "rnu", "--to", "a/b"], "did you mean run?"),
    ],
)
def test_the_nearest_name_is_said(
    arguments: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run", "quantized").mkdir(parents=True)
    Path("run", "quantized", "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    code, line = said(arguments, monkeypatch, capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert hint in line


def test_a_manifest_that_is_a_pipe_and_a_python_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert said(["reproduce", "pipe"], monkeypatch, capfd) == (2, "quantpress: pipe: not a file\n")
    Path("deep.json").write_text("[" * 100_000)
    code, line = said(["reproduce", "deep.json"], monkeypatch, capfd)
    assert (code, line.count("\n")) == (2, 1)
    assert _version("/bin/echo", ("vllm",)) is None
