"""Real servers on good artifacts and on spoilt ones: `smoke` and `check` pass the first and fail the second.

    make setup-vllm && .venv/bin/pytest tests/slow/test_rubbish.py

Checksums would tell of most of it; here they are not looked at. QUANTPRESS_VLLM_PYTHON names another Python that has
vLLM, QUANTPRESS_VLLM_MODEL another model than the embedded default. Each artifact has one start of its server.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from quantpress import api
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.cli.options import make_options
from quantpress.exports.servers import launchers
from quantpress.exports.serving.agreement import rounds_inputs
from quantpress.exports.serving.reference import read_reference
from quantpress.exports.serving.served_check import check_served
from quantpress.exports.serving.smoke_test import smoke
from quantpress.exports.serving.starting import Options, installed, serve
from quantpress.gguf.chat import template_arguments

from .. import rubbish, rubbish_gguf, trained

MODEL = os.environ.get("QUANTPRESS_VLLM_MODEL", "smollm2-135m")
PYTHON = os.environ.get("QUANTPRESS_VLLM_PYTHON")
_GPTQ, _PLAIN = {"name": "gptq"}, {"name": "rtn"}
_INT4, _INT8 = {"bits": 4, "group_size": 64}, {"bits": 8, "group_size": -1}
SPOILT: dict[str, dict[str, Any]] = {  # those that rubbish is made of
    "vllm": {"method": _PLAIN, "weights": _INT4 | {"symmetric": False}},
    "vllm, static inputs": {"method": _PLAIN, "weights": _INT8, "activations": {"type": "int8", "dynamic": False}},
    "llama.cpp": {"method": _PLAIN, "formats": ["gguf"], "gguf": {"type": "Q4_K_M"}},
}
MIXTURES: dict[str, dict[str, Any]] = {  # of a tiny one; vLLM has no 4-bit experts on a CPU
    "vllm, mixture": SPOILT["vllm"] | {"ignore": ["*.experts.*"], "targets": [{"name": "vllm", "device": "cpu"}]},
    "llama.cpp, mixture": SPOILT["llama.cpp"],
}
GOOD: dict[str, dict[str, Any]] = {
    **SPOILT,
    **MIXTURES,
    "vllm, gptq": {"method": _GPTQ, "weights": _INT4, "formats": ["gptq"]},
    "vllm, awq": {"method": _PLAIN, "weights": _INT4 | {"symmetric": False}, "formats": ["awq"]},
    "vllm, w8a8": {"method": _PLAIN, "weights": _INT8, "activations": {"type": "int8"}},
    "vllm, w4a8": {"method": _PLAIN, "weights": _INT4, "activations": {"type": "int8"}},
    "llama.cpp, Q8_0": {"method": _PLAIN, "formats": ["gguf"], "gguf": {"type": "Q8_0"}},
    "llama.cpp, gptq": {"method": _GPTQ, "formats": ["gguf"], "gguf": {"type": "Q4_K_M"}},
}
COMMON = {
    "name": "served", "calibration": {"samples": 32, "seq_len": 256},
    "evaluation": {"windows": 2, "window": 256, "prompts": []},
}  # fmt: skip
KINDS = [
    *(("vllm, static inputs", kind) for kind in rubbish.STATIC),
    *((name, kind) for name in ("vllm", "vllm, mixture") for kind in rubbish.FOLDERS),
    *((name, kind) for name in ("llama.cpp", "llama.cpp, mixture") for kind in rubbish_gguf.GGUFS),
]
CAUSES = {  # what the failed checks have to name
    "scales doubled": "a layer's", "scales scrambled": "a layer's", "zeros off by one": "a layer's",
    "columns permuted": "a layer's", "a block zeroed": "a layer's", "rope_theta": "rope",
    "tokenizer permuted": "tokenizer", "another tokenizer": "tokenizer", "template removed": "template",
    "template edited": "template", "BOS twice": "BOS", "BOS": "BOS", "static scales wrong": "static input scales",
    "scales of another block": "a layer's", "a norm scaled": "a layer's", "keys and values exchanged": "a layer's",
    "tokens exchanged": "a layer's", "a token zeroed": "a layer's", "norm epsilon": "a layer's",
    "another end token": "end token",
}  # fmt: skip
COMMANDS = {"check", "smoke"}
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Made:
    """A run's folder, and the server that its artifact is for."""

    folder: Path
    server: str

    @property
    def python(self) -> str | None:
        return PYTHON if self.server == "vllm" else None

    @property
    def artifact(self) -> Path:
        return self.folder / "quantized" / ("model.gguf" if self.server == "llama.cpp" else "")

    def judged(self, artifact: Path, out: Path) -> list[tuple[str, str, str]]:
        """(command, status, line) of each check that `check` and `smoke` make of it on one start of the server."""
        reference, found = read_reference(self.folder), []
        options = Options(python=self.python, max_model_len=768)
        said = template_arguments(open_tokenizer(self.folder / "quantized")) if self.server == "llama.cpp" else {}
        row = launchers()[self.server]
        if self.server == "vllm":  # compiling takes a minute, and changes nothing here
            row = replace(row, command=lambda launch: [*launchers()["vllm"].command(launch), "--enforce-eager"])
        with serve(row, artifact, out / "log", options, template=said) as running:
            rounds = rounds_inputs(may=row.may_round_inputs)
            for one in check_served(running.url, reference, rounds_inputs=rounds).checks:
                found.append(("check", one.status, f"{one.name}: {one.reason}"))
            there = replace(options, url=running.url, lacks=running.lacks)
            record = smoke(artifact, "url", out / "smoke", there, make_options().cache, reference=reference)
        found += [("smoke", one.status, f"{one.name}: {one.reason}") for one in record.checks]
        print("\n".join(" ".join(one) for one in found if one[1] != "pass"))  # noqa: T201
        return found


def model_of(name: str, folder: Path) -> str:
    """The model that a run is of; a mixture is trained in `folder`."""
    if name not in MIXTURES:
        return MODEL
    trained.build_mixture(folder / "mixture")
    return str(folder / "mixture")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by name, each made once."""
    kept: dict[str, Made] = {}

    def make(name: str) -> Made:
        server = name.partition(",")[0]
        if not installed(launchers()[server], PYTHON if server == "vllm" else None):
            pytest.skip(f"{server} is not installed: {launchers()[server].install}")
        if name not in kept:
            out = tmp_path_factory.mktemp("run") / "it"
            api.run({**COMMON, **GOOD[name]}, model_of(name, out.parent), out, make_options())
            kept[name] = Made(out, server)
        return kept[name]

    return make


@pytest.mark.parametrize("name", GOOD)
def test_a_good_artifact_passes(name: str, made: Any, tmp_path: Path) -> None:
    one = made(name)
    found = one.judged(one.artifact, tmp_path)
    assert [line for line in found if line[1] == "fail"] == []
    assert {status for command, status, _ in found if command == "check"} == {"pass"}


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_the_command_starts_the_server_itself(name: str, made: Any) -> None:
    one = made(name)
    command = [sys.executable, "-m", "quantpress", "smoke", str(one.folder), "--server", one.server]
    command += ["--server-python", one.python] if one.python else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_rubbish_fails(name: str, kind: str, made: Any, tmp_path: Path) -> None:
    one = made(name)
    kinds = rubbish_gguf.GGUFS if one.server == "llama.cpp" else rubbish.FOLDERS | rubbish.STATIC
    out = tmp_path / "spoilt" / ("model.gguf" if one.server == "llama.cpp" else "")
    found = one.judged(rubbish.spoiled(one.artifact, out, kinds[kind]), tmp_path)
    for command in COMMANDS:
        failed = " ".join(line for by, status, line in found if by == command and status == "fail")
        assert CAUSES[kind] in failed, command
