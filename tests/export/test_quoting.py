"""Hostile values in launch files: the scripts are run, and nothing in a value is."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.eval.report.page import _fenced
from quantpress.exports.launch_files import compose, kubernetes, serve_sh
from quantpress.exports.package import _address
from quantpress.exports.quoting import comment, variable
from quantpress.exports.servers.deployment import HOST, MODEL, ORIGINAL, PORT, Deployment, ModelFolder, Mount
from quantpress.exports.servers.ollama import Ollama, deploy
from quantpress.exports.servers.resources import Resources

HOSTILE = [
    "$(touch PWNED)", "`touch PWNED`", '"; touch PWNED; "', "'; touch PWNED; '", "}; touch PWNED; ${x:-",
    "a\ntouch PWNED", "\\$(touch PWNED)", "${IFS}", "!!", "a b  c", "*", "~root", "$$",
    "${HOME}$(HOME)", "--flag", "\\", 'end\\"', "{host",
]  # fmt: skip


def deployment(value: str, contained: bool = False) -> Deployment:
    """A server whose every free value is `value`."""
    return Deployment(
        name="it", title=f"A server {value}", image=f"image:{value}" if contained else "image",
        local=("fake", "serve"), entrypoint=("fake", "serve"),
        arguments=(MODEL, ORIGINAL, "--host", HOST, f"--at={HOST}:{PORT}/{value}", "--name", value),
        needs=f"things {value}", port=8000, health="/health", check=("true", value), probe="curl",
        resources=Resources(1, 1, 1, 1, 1), env={"VALUE": value, "WHERE": f"{HOST}:{PORT}{value}"},
        mounts=(Mount("model", "/model"), Mount(f"/srv/{value}", "/original", ORIGINAL)), contained=contained,
    )  # fmt: skip


def run(script: str, folder: Path, shell: str, **environment: str) -> list[str]:
    """What `fake` or `docker` was started with: its words, then the two variables."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("fake", "docker"):
        fake = folder / "bin" / name
        fake.write_text('#!/bin/sh\nprintf "%s\\0" "$@" "${VALUE-}" "${WHERE-}"\n')
        fake.chmod(0o755)
    (folder / "serve.sh").write_text(script)
    done = subprocess.run(
        [shell, str(folder / "serve.sh")], cwd=folder, capture_output=True, text=True, check=True,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip
    assert not list(folder.rglob("PWNED"))
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_script_hands_on_every_value_as_it_is(value: str, shell: str, tmp_path: Path) -> None:
    words = run(serve_sh(deployment(value), "127.0.0.1"), tmp_path, shell)
    assert words == [
        "serve", f"{tmp_path}/model", f"/srv/{value}", "--host", "127.0.0.1", f"--at=127.0.0.1:8000/{value}", "--name",
        value, value, f"127.0.0.1:8000{value}",
    ]  # fmt: skip
    words = run(serve_sh(deployment(value), "::1"), tmp_path, shell, HOST="$(touch PWNED)", VALUE="own")
    assert words[3:5] == ["--host", "$(touch PWNED)"]
    assert words[-2] == "own"


@pytest.mark.parametrize("value", HOSTILE)
def test_one_that_starts_a_container_does_too(value: str, tmp_path: Path) -> None:
    words = run(serve_sh(deployment(value, contained=True), "::1"), tmp_path, "sh")
    assert f"/srv/{value}:/original:ro" in words
    assert f"image:{value}" in words
    assert f"VALUE={value}" in words
    assert words[words.index("--publish") + 1] == "[::1]:8000:8000"
    assert words[-3] == value


@pytest.mark.parametrize("value", HOSTILE)
def test_compose_and_kubernetes_substitute_nothing(value: str) -> None:
    """compose writes a dollar sign as two; Kubernetes one before a parenthesis."""
    service = yaml.safe_load(compose(deployment(value), "127.0.0.1"))["services"]["server"]
    assert service["command"][-1].replace("$$", "$") == value
    assert service["volumes"][1]["source"].replace("$$", "$") == f"/srv/{value}"
    assert service["healthcheck"]["test"][-1].replace("$$", "$") == value
    assert all(text.count("$") % 2 == 0 for text in (service["command"][-1], service["volumes"][1]["source"]))
    _, workload, _ = yaml.safe_load_all(kubernetes(deployment(value)))
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert container["args"][-1].replace("$$(", "$(") == value
    assert {one["name"]: one["value"] for one in container["env"]}["VALUE"].replace("$$(", "$(") == value


@pytest.mark.parametrize("host", ["fe80::1%$(id>PWN)", "fe80::1%a;b", 'fe80::1%"', "127.0.0.1\n", "$(id)", ""])
def test_a_host_is_an_address_and_its_zone_an_interface(host: str) -> None:
    with pytest.raises(BadInput, match="is not an address"):
        _address(host)
    assert _address("fe80::1%eth0.1") == "fe80::1%eth0.1"


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("value", HOSTILE)
def test_so_is_the_default_of_a_variable(value: str, shell: str, tmp_path: Path) -> None:
    assert run(f'exec fake "{variable("NOTHING", value)}"', tmp_path, shell)[0] == value


def test_a_template_keeps_its_lines_in_ollamas_modelfile() -> None:
    """Also one that reads like an instruction; only the file's own FROM is another."""
    template = 'TEMPLATE """From now on\nFROM x\n{{ .Content }}"""'
    folder = ModelFolder(
        "it", Resources(1, 1, 1, 1, 1), gguf_file="model.gguf", modelfile=f"FROM ./old.gguf\n{template}\n"
    )
    text = deploy(Ollama(), folder).files["model/Modelfile"]
    assert text.startswith(f"FROM ./model.gguf\n{template}\n")


@pytest.mark.parametrize("text", ["plain", "```\n# Owned\n```", "````", "`a` ``b``", "```yaml"])
def test_no_text_closes_a_block_of_the_card(text: str) -> None:
    first, *inside, last = _fenced(text, "yaml").split("\n")
    assert "\n".join(inside) == text
    assert first == f"{last}yaml"
    assert last.strip("`") == ""
    assert last not in text


def test_a_comment_is_one_line() -> None:
    assert comment("a\nb\r\ntouch PWNED\x0bc") == "a b touch PWNED c"
