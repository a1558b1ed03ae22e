"""An export folder served by its compose.yaml: a Docker that is none stands in for the real one."""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quantpress.cli import main
from quantpress.core.errors import BadInput
from quantpress.exports.serving.checks import CHECKS, CheckedServer, make
from quantpress.exports.serving.client import Client
from quantpress.exports.serving.containers import composed, lacking
from quantpress.exports.serving.process import free_port
from quantpress.exports.serving.record import Serving, read
from quantpress.exports.serving.starting import Options, serve

from ...tiny import build
from .fakes import FAKE, Bytes, fake_server

DOCKER = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
  version*) echo 28.2.2 ;;
  *up*) exec {python} {fake} {port} ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    port = free_port()
    folder = tmp_path / "run/export/tgi"
    (folder / "model").mkdir(parents=True)
    record = {"target": {"name": "tgi"}, "image": "ghcr.io/tgi:3", "port": port, "health": "/health"}
    (folder / "export.json").write_text(json.dumps(record))
    return folder


def put_docker(tmp_path: Path, port: int, patch: pytest.MonkeyPatch) -> Path:
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(DOCKER.format(calls=calls, python=sys.executable, fake=FAKE, port=port))
    docker.chmod(0o755)
    patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return calls


def test_the_container_is_started_checked_and_taken_down(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = json.loads((folder / "export.json").read_text())["port"]
    calls = put_docker(tmp_path, port, monkeypatch)
    row = composed(folder)
    with serve(row, folder / "model", tmp_path / "log", Options(deadline_s=30)) as running:
        assert running.url == f"http://127.0.0.1:{port}"
        assert running.version == "ghcr.io/tgi:3 in Docker 28.2.2"
        found = make(CheckedServer(running, Client(running.url, running.model), Bytes(), 512, 2))
    assert {c.name: c.status for c in found} == {name: "skip" if name == "loopback" else "pass" for name in CHECKS}
    said = calls.read_text().splitlines()
    where = f"compose --project-name quantpress-smoke-tgi --file {folder / 'compose.yaml'}"
    assert said[1:] == [f"{where} up --no-color --abort-on-container-exit", f"{where} down --timeout 10"]


def test_a_port_that_is_taken_is_said_before_anything_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    port = json.loads((folder / "export.json").read_text())["port"]
    calls = put_docker(tmp_path, port, monkeypatch)
    row = composed(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with (
            pytest.raises(BadInput, match=f"tgi: port {port} is taken"),
            serve(row, folder / "model", tmp_path / "log", Options()),
        ):
            pass
    assert "up" not in calls.read_text()


def test_without_docker_the_command_is_shown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BadInput, match=r"no Docker answers here; .*docker compose --file .*tgi/compose.yaml up`.*--url"
    ):
        composed(folder)


def test_a_run_is_tested_in_the_container_that_was_exported_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake's words are not the model's, and the folder has no checksums."""
    build("llama", folder / "model")
    run = tmp_path / "run"
    (run / "quantized").mkdir()
    (run / "manifest.json").write_text('{"quantpress": "1", "recipe": {}}')
    put_docker(tmp_path, json.loads((folder / "export.json").read_text())["port"], monkeypatch)
    monkeypatch.setattr("sys.argv", ["quantpress", "smoke", str(run), "--server", "tgi", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    record = read(run)
    assert record is not None
    assert Serving.model_validate_json(capsys.readouterr().out) == record
    assert stopped.value.code == 1
    assert [c.name for c in record.checks if c.status == "fail"] == ["files", "agreement"]
    assert (record.server, record.version) == ("tgi", "ghcr.io/tgi:3 in Docker 28.2.2")
    assert (record.peak_rss_bytes, record.log) == (None, "eval/serving-tgi.log")


def rename(folder: Path, **target: str) -> None:
    record = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(record | {"target": target}))


def test_tritons_own_protocol_is_refused_with_the_way_out(folder: Path) -> None:
    rename(folder, name="triton", backend="vllm", frontend="kserve")
    with pytest.raises(BadInput, match=r"export it with --set triton\.frontend=openai$"):
        composed(folder)
    rename(folder, name="triton", backend="tensorrt-llm", frontend="kserve")
    with pytest.raises(BadInput, match=r"which backend vllm has, or for tensorrt-llm$"):
        lacking(folder)
    rename(folder, name="triton", backend="vllm", frontend="openai")
    assert lacking(folder) == {}


def test_a_server_at_a_url_is_judged_as_the_target_it_was_exported_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that puts its prompts into the template, and cuts long ones, as Ollama does: both are known of it."""
    build("llama", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    statuses = []
    for name in ("tgi", "ollama"):
        rename(folder, name=name)
        with fake_server(tmp_path / "log", "templated") as fake:
            monkeypatch.setattr("sys.argv", ["quantpress", "smoke", str(folder), "--url", fake.url, "--json"])
            with pytest.raises(SystemExit):
                main()
        record = Serving.model_validate_json(capsys.readouterr().out)
        statuses.append({check.name: check.status for check in record.checks})
    asked = ("completion", "unicode", "context")
    assert [statuses[0][name] for name in asked] == ["fail", "fail", "fail"]
    assert [statuses[1][name] for name in asked] == ["pass", "pass", "skip"]
