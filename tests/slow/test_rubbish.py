"""Real servers on good artifacts and on spoilt ones: `check` passes the first and fails the second.

    make setup-vllm && .venv/bin/pytest tests/slow/test_rubbish.py

Checksums would tell of most of it; here they are not looked at. QUANTPRESS_VLLM_PYTHON names another Python that has
vLLM, QUANTPRESS_VLLM_MODEL another model than the embedded default.
"""

import os
from pathlib import Path

import pytest

from quantpress import api
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.cli.options import make_options
from quantpress.exports.servers import launchers
from quantpress.exports.serving.reference import Reference, read_reference
from quantpress.exports.serving.served_check import Checked, check_served
from quantpress.exports.serving.starting import Options, installed, serve
from quantpress.gguf.chat import template_arguments

from .. import rubbish

MODEL = os.environ.get("QUANTPRESS_VLLM_MODEL", "smollm2-135m")
PYTHON = os.environ.get("QUANTPRESS_VLLM_PYTHON")
EVALUATION = {"windows": 2, "window": 256, "prompts": []}
RECIPES = {
    "vllm": {"method": "rtn", "weights": {"bits": 4, "group_size": 64, "symmetric": False}},
    "llama.cpp": {"method": "rtn", "formats": ["gguf"], "gguf": {"type": "Q4_K_M"}},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A server's name and the folder of a run with an artifact for it."""
    server = request.param
    if not installed(launchers()[server], PYTHON if server == "vllm" else None):
        pytest.skip(f"{server} is not installed: {launchers()[server].install}")
    out = tmp_path_factory.mktemp("run") / server
    api.run({"name": "served", "evaluation": EVALUATION, **RECIPES[server]}, MODEL, out, make_options())
    return server, out


def held(server: str, artifact: Path, reference: Reference, tokenizer: Path, log: Path) -> Checked:
    options = Options(python=PYTHON if server == "vllm" else None, max_model_len=768)
    said = template_arguments(open_tokenizer(tokenizer)) if server == "llama.cpp" else {}
    with serve(launchers()[server], artifact, log, options, template=said) as running:
        return check_served(running.url, reference)


def served_file(server: str, folder: Path) -> Path:
    return folder / "quantized" / ("model.gguf" if server == "llama.cpp" else "")


def test_a_good_artifact_passes(run: tuple[str, Path], tmp_path: Path) -> None:
    server, folder = run
    found = held(server, served_file(server, folder), read_reference(folder), folder / "quantized", tmp_path / "log")
    assert found.passed, [check for check in found.checks if check.status == "fail"]
    assert {check.status for check in found.checks} == {"pass"}


@pytest.mark.parametrize("kind", sorted({*rubbish.FOLDERS, *rubbish.GGUFS}))
def test_rubbish_fails(kind: str, run: tuple[str, Path], tmp_path: Path) -> None:
    server, folder = run
    kinds = rubbish.GGUFS if server == "llama.cpp" else rubbish.FOLDERS
    if kind not in kinds:
        pytest.skip(f"{kind} is not made in {server}'s format")
    spoilt = rubbish.spoiled(served_file(server, folder), tmp_path / "spoilt" / "model.gguf"
                             if server == "llama.cpp" else tmp_path / "spoilt", kinds[kind])  # fmt: skip
    found = held(server, spoilt, read_reference(folder), folder / "quantized", tmp_path / "log")
    assert not found.passed
    print(kind, [check.reason for check in found.checks if check.status == "fail"])  # noqa: T201
