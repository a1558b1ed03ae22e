"""Which way answers whether a target loads an artifact, with stand-ins for the servers' interpreters."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from quantpress.core.errors import BadInput
from quantpress.exports import load_check
from quantpress.exports.load_check import will_load
from quantpress.exports.servers.llama_cpp import LlamaCpp
from quantpress.exports.servers.tensorrt_llm import TensorRtLlm
from quantpress.exports.servers.tgi import Tgi
from quantpress.exports.servers.triton import Triton
from quantpress.exports.servers.vllm import Vllm
from quantpress.exports.serving.starting import Options
from quantpress.numbers.types import Activations, Grid

from ..quantize.formats.artifacts import make, uniform
from .test_servers import write_gguf

HERE = sys.executable  # it has no vLLM
HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "artifact"
    make(folder, "compressed-tensors", uniform(Grid(group_size=32)))
    return folder


def interpreter(folder: Path, *, parser: object = None, server: str = "sys.exit(3)") -> str:
    """A Python that says it has vLLM: its parser answers `parser`, its server is `server`."""
    file = folder / "python"
    said = "echo broken >&2; exit 1" if parser is None else f"echo '{json.dumps(parser)}'"
    file.write_text(
        "#!/bin/sh\n"
        f'case "$1" in\n-c) echo \'[["vllm", "0.0.1"]]\' ;;\n-I) {said} ;;\n'
        f'-m) exec {HERE} {folder}/server.py "$@" ;;\nesac\n'
    )
    (folder / "server.py").write_text(f"import sys\n{server}\n")
    file.chmod(0o755)
    return str(file)


def test_without_a_server_or_a_parser_the_contract_answers(artifact: Path) -> None:
    answer = will_load(artifact, Vllm(), python=HERE)
    assert (answer.loads, answer.way, answer.reason) == (True, "contract", "")
    assert [line.partition(":")[0] for line in answer.passed_over] == ["server", "parser"]
    refused = will_load(artifact, TensorRtLlm(), python=HERE)
    assert (refused.loads, refused.way) == (False, "contract")
    assert "does not take compressed-tensors files of int4 g32 sym weights" in refused.reason


def test_todays_vllm_is_not_asked_for_tritons_older_one(artifact: Path, tmp_path: Path) -> None:
    python = interpreter(tmp_path, parser={"version": "0.0.1", "engine": False, "parsed": "Config"})
    assert will_load(artifact, Triton(), python=python).way == "contract"


def test_vllms_parser_answers_where_there_is_one(artifact: Path, tmp_path: Path) -> None:
    target = Vllm()
    python = interpreter(tmp_path, parser={"version": "0.0.1", "engine": False, "parsed": "Config"})
    answer = will_load(artifact, target, python=python)
    assert (answer.loads, answer.way, answer.by) == (True, "parser", "vLLM 0.0.1's own quantization config class")
    python = interpreter(tmp_path, parser={"version": "0.0.1", "engine": True, "refused": "no such thing"})
    answer = will_load(artifact, target, python=python)
    assert (answer.loads, answer.way, answer.reason) == (False, "parser", "no such thing")


def test_what_the_contract_refuses_a_parser_does_not_save(artifact: Path, tmp_path: Path) -> None:
    python = interpreter(tmp_path, parser={"version": "0.0.1", "engine": False, "parsed": "Config"})
    answer = will_load(artifact, Vllm(tensor_parallel=2), python=python)
    assert (answer.loads, answer.way) == (False, "contract")
    assert "would cut a scale group" in answer.reason
    assert answer.passed_over[-1] == "vLLM 0.0.1's own quantization config class has no objection"


def test_a_parser_that_breaks_is_passed_over(artifact: Path, tmp_path: Path) -> None:
    answer = will_load(artifact, Vllm(), python=interpreter(tmp_path, parser=None))
    assert answer.way == "contract"
    assert answer.passed_over[-1].endswith("could not be asked: broken")
    with pytest.raises(BadInput, match="--way parser"):
        will_load(artifact, Vllm(), python=HERE, way="parser")


def test_the_real_server_has_the_last_word(artifact: Path, tmp_path: Path) -> None:
    python = interpreter(tmp_path, server=HEALTHY)
    answer = will_load(artifact, Vllm(device="cpu"), python=python, way="server")
    assert (answer.loads, answer.way) == (True, "server")
    assert answer.by.startswith("the real server (vllm 0.0.1), healthy after")
    python = interpreter(tmp_path, server="print('the weights are bad'); sys.exit(3)")
    answer = will_load(artifact, Vllm(device="cpu"), python=python)
    assert (answer.loads, answer.way) == (False, "server")
    assert "the weights are bad" in answer.reason


def test_a_server_that_is_too_slow_is_no_answer(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_check, "Options", partial(Options, deadline_s=1.0))
    parser = {"version": "0.0.1", "engine": True, "parsed": "Config"}
    python = interpreter(tmp_path, parser=parser, server="import time; time.sleep(60)")
    answer = will_load(artifact, Vllm(device="cpu"), python=python)
    assert (answer.loads, answer.way) == (True, "parser")
    assert "not healthy within 1 s, which is no answer" in answer.passed_over[0]


def test_a_server_for_other_hardware_is_not_started(artifact: Path, tmp_path: Path) -> None:
    python = interpreter(tmp_path, parser={"version": "0.0.1", "engine": False, "parsed": "Config"}, server=HEALTHY)
    answer = will_load(artifact, Vllm(device="cuda"), python=python)
    assert answer.way == "parser"
    assert "the target is on cuda, and this machine has cpu" in answer.passed_over[0]
    answer = will_load(artifact, Vllm(device="cpu", tensor_parallel=2), python=python)
    assert "several devices" in answer.passed_over[0]


def test_other_parsers(tmp_path: Path) -> None:
    make(tmp_path / "eight", "compressed-tensors", uniform(Grid(bits=8, group_size=-1)), spec=Activations(type="int8"))
    answer = will_load(tmp_path / "eight", Tgi(), python=HERE)
    assert (answer.loads, answer.way) == (True, "parser")
    assert "compressed-tensors" in answer.by
    write_gguf(tmp_path / "quantized" / "model.gguf")
    answer = will_load(tmp_path, LlamaCpp(), python=HERE, way="parser")
    assert (answer.loads, answer.way) == (True, "parser")
    assert "llama.cpp's own reader" in answer.by


def test_tgis_library_refuses_what_it_does_not_know(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "spiral"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="spiral"):
        will_load(folder, Tgi(), python=HERE)
