"""Head and embeddings: what is quantized by default, what is written, and what transformers makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantpress import api
from quantpress.artifact.artifact import open_artifact, open_original
from quantpress.core.errors import BadInput
from quantpress.engine.huggingface_folder import HuggingFaceFolder
from quantpress.engine.job import prepare
from quantpress.engine.outer import Outer
from quantpress.engine.sources import resolve
from quantpress.eval.measure.divergence import last_hidden
from quantpress.exports.contracts import check_job
from quantpress.formats import FORMATS
from quantpress.numbers.types import Grid
from quantpress.recipe.loading import parse

from ...tiny import build
from .test_pipeline import make

CPU = torch.device("cpu")
EIGHT = {"bits": 8, "group_size": -1}
WEIGHTS = {"weights": {"bits": 4, "group_size": 16}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3, its head not tied."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    build("qwen3", folder)
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    _, skeleton = open_artifact(folder, CPU, torch.float32)
    return skeleton.logits(last_hidden(skeleton, ids, lambda: None)[0])


@pytest.mark.parametrize("head", [EIGHT, {"bits": 4, "group_size": 16}])
def test_transformers_reads_the_head_and_plan_knows_the_bytes(
    model: Path, tmp_path: Path, head: dict[str, int]
) -> None:
    recipe = WEIGHTS | {"head": head}
    manifest, made = make(tmp_path / "run", model, recipe), tmp_path / "run" / "quantized"
    planned = api.plan(recipe | {"calibration": {"samples": 6, "seq_len": 32}}, str(model)).plan
    assert planned.artifact_bytes == manifest.artifact.bytes
    assert manifest.outside.keys() == {"lm_head"}
    ids = torch.arange(24)[None]
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits[0].detach(), logits(made, ids), rtol=1e-5, atol=1e-6)
    assert api.verify(made).sound


def test_a_head_below_8_bits_is_rounded_by_its_inputs(model: Path) -> None:
    """With GPTQ its output is nearer than with round to nearest, on the states it was given."""
    _, original = open_original(model, CPU, torch.float32)
    grid, weight = Grid(bits=3, group_size=16), original.reader.read("lm_head.weight")
    outer = Outer({"head": "lm_head"}, {"lm_head": grid})
    recipes = [parse(WEIGHTS | {"method": name}) for name in ("gptq", "rtn")]
    solve = outer.solved_head(recipes[0], original)
    assert solve is not None
    assert outer.tensors(recipes[0], original.reader.read) == {}
    assert outer.solved_head(recipes[1], original) is None
    hidden = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64)
    packed = solve(hidden), outer.tensors(recipes[1], original.reader.read)
    original.open_shell()
    x = torch.cat([original.final_norm(states) for states in hidden])
    unpack = FORMATS["compressed-tensors"].unpack
    off = [unpack("lm_head", tensors.__getitem__, grid, (256, 64)).dequantize() - weight for tensors in packed]
    errors = [float((x @ error.T).square().sum()) for error in off]
    assert errors[0] < 0.8 * errors[1]


def decided(model: Path, **keys: Any) -> Outer:
    made = prepare(parse(WEIGHTS | {"model": str(model)} | keys), resolve(str(model), cache=model))
    assert isinstance(made.backend, HuggingFaceFolder)
    check_job(made)
    return made.backend.outer


@pytest.mark.parametrize(
    ("keys", "quantized"),
    [
        ({}, False),  # no server is named that would load it
        ({"targets": ["vllm"]}, True),
        ({"targets": ["vllm"], "head": None}, False),
        ({"targets": [{"name": "vllm", "device": "cpu"}]}, False),
        ({"targets": ["vllm"], "weights": {"group_size": 32, "symmetric": False}}, False),
        ({"targets": ["vllm"], "weights": {"type": "nvfp4"}}, False),
        ({"targets": ["vllm"], "weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8"}}, False),
    ],
)
def test_the_default_quantizes_the_head_where_all_readers_take_it(
    model: Path, keys: dict[str, Any], quantized: bool
) -> None:
    outer = decided(model, **keys | {"weights": keys.get("weights", {"group_size": 32})})
    assert dict(outer.grids) == ({"lm_head": Grid(**EIGHT)} if quantized else {})
    if quantized:
        assert outer.notes == ("lm_head in int8 channel sym: 16.9 kB in place of 65.5 kB",)
        assert outer.left == ("model.embed_tokens stays in 16 bit (65.5 kB): transformers does not load it quantized",)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head": EIGHT, "formats": ["gptq"]}, "only in artifacts of compressed-tensors alone: set head: null"),
        ({"head": EIGHT | {"symmetric": False}}, "symmetric integers only, not int8 channel asym"),
        ({"embeddings": {"bits": 3, "group_size": 16}}, "embeddings of 2, 4 and 8 bits, not 3"),
        ({"embeddings": EIGHT}, "transformers could not load the artifact: it does not know quantized embeddings"),
        ({"head": EIGHT, "targets": ["tgi"], "weights": {"group_size": 32}}, "TGI is not known to load lm_head"),
    ],
)
def test_what_readers_do_not_take_is_refused(model: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        decided(model, **keys)


def test_a_head_that_is_the_embedding_stays(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    assert not decided(tmp_path / "model", targets=["vllm"], weights={"group_size": 32}).grids
    with pytest.raises(BadInput, match="head and embeddings are one tensor"):
        decided(tmp_path / "model", head=EIGHT)
