"""The real tritonserver, of PyPI's nvidia-pytriton, takes an exported repository and answers its probe, on the CPU.

    make setup-loaders && .venv/bin/pytest tests/slow/test_tritonserver.py

Its Python backend is the real one; in place of the vLLM backend, which is of the container's own vLLM, stands one with
its inputs and outputs.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from quantpress.exports.package import export
from quantpress.exports.servers.triton import Triton
from quantpress.exports.serving.process import free_port, running, wait_until_healthy
from quantpress.numbers.types import Grid

from ..quantize.formats.artifacts import make, uniform
from .loaders import HERE, libraries

pytestmark = pytest.mark.slow


def test_it_loads_the_repository_and_answers_the_probe(tmp_path: Path) -> None:
    there = libraries("pytriton")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = there / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"nvidia-pytriton has no backend for Python {version}")
    make(tmp_path / "run" / "quantized", "compressed-tensors", uniform(Grid(group_size=32)))
    port = free_port()
    folder = export(tmp_path / "run", Triton(max_model_len=64, port=port), tmp_path / "it").folder
    shutil.copytree(triton / "backends", tmp_path / "backends")
    shutil.copy(stub, tmp_path / "backends" / "python")
    os.chmod(tmp_path / "backends" / "python" / stub.name, 0o755)
    (tmp_path / "backends" / "vllm").mkdir()
    shutil.copy(HERE / "triton_backend.py", tmp_path / "backends" / "vllm" / "model.py")
    # The stub takes its libraries from the first python3 of PATH, and needs an older numpy than ours.
    venv.create(tmp_path / "python", with_pip=False)
    site = tmp_path / "python" / "lib" / f"python{version}" / "site-packages"
    (site / "numpy.pth").write_text(str(libraries("pytriton-numpy")))
    environment = {
        "PATH": f"{tmp_path / 'python' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{there / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    }
    started = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["server"]["command"]
    of_container = {"--model-repository=/models": f"--model-repository={folder / 'repository'}"}
    arguments = [of_container.get(one, one.replace("0.0.0.0", "127.0.0.1")) for one in started]
    command = [str(triton / "bin" / "tritonserver"), f"--backend-directory={tmp_path / 'backends'}", *arguments]
    with running(command, environment, tmp_path / "log") as child:
        wait_until_healthy("Triton", child, f"http://127.0.0.1:{port}/v2/health/ready", 120)
        probe = next(line for line in (folder / "README.md").read_text().splitlines() if "/generate" in line)
        done = subprocess.run(shlex.split(probe.strip()), capture_output=True, text=True)
    said = json.loads(json.loads(done.stdout)["text_output"])
    assert said["text"] == "The sea is"
    assert said["parameters"] == {"max_tokens": 16}
    assert said["stream"] is False
    assert said["engine"]["model"] == "/model"
    assert said["engine"]["max_model_len"] == 64
