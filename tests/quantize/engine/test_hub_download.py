"""Models and texts fetched from a hub over HTTP, by the command line in processes that know the hub by its address."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ...forked import Done, Started, started
from ...tiny import build, text
from .hub_server import COMMIT, serve

# What the environment variable sets.
_OFFLINE = "import huggingface_hub\nhuggingface_hub.constants.HF_HUB_OFFLINE = True"

# In one process: what is asked is known to fail before anything is written.
_REFUSALS = """
import sys
from pathlib import Path
import huggingface_hub
from quantpress.cli.options import quiet_libraries
from quantpress.core.errors import BadInput
from quantpress.recipe import Calibration
from quantpress.engine.sources import resolve
from quantpress.calibrate.texts import load_documents

quiet_libraries()
cache = Path(sys.argv[1])
for name in ("org/none", "org/gated", "org/cut", "org/name@v9"):
    try:
        resolve(name, cache=cache)
    except BadInput as error:
        print(error)
for name in ("org/none", "org/gated", "org/cut"):
    try:
        load_documents(Calibration(source=name), cache=cache, role="calibration")
    except BadInput as error:
        print(error)
huggingface_hub.constants.HF_HUB_OFFLINE = True  # what the environment variable sets
try:
    resolve("org/name@v1", cache=cache)
except BadInput as error:
    print(error)
sys.exit()
"""


def repositories(root: Path) -> Path:
    """A model, its copy whose downloads break, and a dataset."""
    build("llama", root / "org" / "name", torch.bfloat16)
    shutil.copytree(root / "org" / "name", root / "org" / "cut")
    (root / "org" / "name" / "pytorch_model.bin").write_bytes(b"a pickle nobody asked for")
    (root / "org" / "name" / "original").mkdir()
    (root / "org" / "name" / "original" / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (root / "org" / "words").mkdir()
    lines = [json.dumps({"text": text(50)}) for _ in range(20)]
    (root / "org" / "words" / "train.jsonl").write_text("\n".join(lines))
    return root


def environment(folder: Path, address: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "QUANTPRESS_CACHE": str(folder / "cache")}
    return {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | own


@dataclass(frozen=True)
class Hub:
    """A hub of the repositories in `root`: what it was asked for, and a Python whose commands ask it."""

    root: Path
    asked: list[str]
    python: Started


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """For tests that keep nothing of what they fetch."""
    place = tmp_path_factory.mktemp("hub")
    root = repositories(place / "hub")
    with serve(root) as (address, asked), started(place, environment(place, address)) as python:
        yield Hub(root, asked, python)


def test_a_model_and_a_dataset_at_their_commits(tmp_path: Path) -> None:
    def quantize(recipe: str, out: str, model: str, *sets: str, code: str = "") -> Done:
        arguments = ["quantize", recipe, "--model", model, "--out", str(tmp_path / out)]
        return python.run([*arguments, *(f"--set={one}" for one in ("weights.group_size=32", *sets))], code)

    root = repositories(tmp_path / "hub")
    with ExitStack() as stack:
        with serve(root) as (address, asked):
            python = stack.enter_context(started(tmp_path, environment(tmp_path, address)))
            calibration = "calibration={source: org/words, samples: 4, seq_len: 32}"
            done = quantize("w4a16-gptq", "run", "org/name@v1", calibration)
            assert done.returncode == 0, done.stderr
            fetched = {line.rpartition("/")[2] for line in asked if line.startswith("GET /org/name/resolve/")}
            assert fetched == {
                "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            }  # fmt: skip
            manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
            assert manifest["model"]["kind"] == "hub"
            assert (manifest["model"]["id"], manifest["model"]["revision"]) == ("org/name", COMMIT)
            assert manifest["calibration"]["source"] == f"org/words train@{COMMIT}"
            asked.clear()
            # Without a network a commit that was fetched before is all there is to know.
            done = quantize("w4a16-rtn", "offline", f"org/name@{COMMIT}", code=_OFFLINE)
            assert done.returncode == 0, done.stderr
            assert json.loads((tmp_path / "offline" / "manifest.json").read_text())["model"]["revision"] == COMMIT
            # So is a tag or a branch, at the commit that it had then.
            done = quantize("w4a16-rtn", "tagged", "org/name@v1", code=_OFFLINE)
            assert done.returncode == 0, done.stderr
            assert json.loads((tmp_path / "tagged" / "manifest.json").read_text())["model"]["revision"] == COMMIT
            assert asked == []
        # The hub has gone: the cache's word is taken, and said to be that.
        done = quantize("w4a16-rtn", "away", "org/name@v1")
        assert done.returncode == 0, done.stderr
        origin = json.loads((tmp_path / "away" / "manifest.json").read_text())["model"]
        assert origin["revision"] == COMMIT
        assert origin["caveat"] == f"the hub could not be reached: v1 is taken to be at {COMMIT[:12]}, as in the cache"


def test_a_plan_reads_the_headers_of_the_shards_and_no_weights(hub: Hub) -> None:
    def plan(model: str) -> dict[str, Any]:
        done = hub.python.run(["plan", "w4a16-rtn", "--model", model, "--json", "--set", "weights.group_size=32"])
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    sharded = hub.root / "org" / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(hub.root / "org" / "name")
    model.save_pretrained(sharded, max_shard_size="100KB")
    for file in (hub.root / "org" / "name").glob("tokenizer*"):
        shutil.copy(file, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for name in ("name", "sharded"):
        hub.asked.clear()
        said = plan(f"org/{name}")
        weights = [line for line in hub.asked if line.startswith("GET") and ".safetensors" in line.split("?")[0]
                   and not line.endswith(".json")]  # fmt: skip
        assert weights
        assert all(" bytes=0-" in line for line in weights)
        local = plan(str(hub.root / "org" / name))
        assert {key: said[key] for key in ("layers", "artifact_bytes", "original_bytes")} == {
            key: local[key] for key in ("layers", "artifact_bytes", "original_bytes")
        }
        assert any("headers of the shards on the hub" in note for note in said["notes"])


def test_what_a_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = hub.python.run([str(tmp_path / "cache")], _REFUSALS)
    assert done.returncode == 0, done.stderr
    none, gated, cut, revision, *texts, offline = done.stdout.splitlines()
    assert none == "model org/none: no such file, and not on the hub (or private: `hf auth login`)"
    assert gated.startswith("model org/gated: gated on the hub; accept its terms")
    assert cut.startswith("model org/cut: the hub cannot be reached (peer closed connection")
    assert revision == "model org/name@v9: the hub has no such revision"
    assert [line.split(":")[0] for line in texts] == ["dataset org/none", "dataset org/gated", "dataset org/cut"]
    assert "cannot be reached (peer closed connection" in texts[2]
    assert offline.startswith("model org/name@v1: offline mode is set; name a full commit")
    assert done.stderr == ""  # no library says more
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
