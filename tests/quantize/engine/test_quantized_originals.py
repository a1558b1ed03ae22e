"""A quantized original is quantized again as the unquantized model it stands for would be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.artifact.gguf_floats import write_floats
from quantpress.artifact.manifest import read_manifest
from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import prepare
from quantpress.engine.sources import resolve
from quantpress.eval.measure.evaluate import evaluate
from quantpress.eval.measure.evaluate import prepare as prepare_evaluation
from quantpress.recipe import Evaluation, Gates
from quantpress.recipe.loading import parse

from ... import tiny
from ..gguf import models
from ..published import repack, write
from .test_pipeline import BASE, make


def pair(folder: Path, kind: str, build: Any = tiny.build, family: str = "llama") -> None:
    """The same model twice: `quantized`, and `plain` with the weights that its codes stand for."""
    for name in ("quantized", "plain"):
        build(family, folder / name, dtype=torch.bfloat16)
    wanted = repack(folder / "quantized", kind)
    save_file(wanted, folder / "plain" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("fp8 block", {"method": {"name": "gptq"}}),
        ("fp8 block, qwen3_moe", {"method": {"name": "rtn"}, "targets": ["vllm"]}),
        ("fp8 beside", {"method": {"name": "rtn"}, "formats": ["compressed-tensors", "gptq"]}),
        ("nvfp4", {"method": {"name": "rtn"}, "formats": ["modelopt"], "weights": {"type": "fp8", "group_size": -1},
                   "activations": {"type": "fp8"}}),
        ("gptq old", {"method": {"name": "rtn"}, "transforms": [{"name": "hadamard"}], "formats": ["gptq"]}),
        ("ct int4", {"method": {"name": "gptq"}, "transforms": [{"name": "awq"}]}),
    ],
)  # fmt: skip
def test_a_run_equals_that_of_the_model_it_stands_for(kind: str, document: dict[str, Any], tmp_path: Path) -> None:
    kind, _, family = kind.partition(", ")
    pair(tmp_path, kind, family=family or "llama")
    manifest = make(tmp_path / "a", tmp_path / "quantized", document)
    make(tmp_path / "b", tmp_path / "plain", document)
    artifacts = [{file.name: file.read_bytes() for file in (tmp_path / run / "quantized").iterdir()} for run in "ab"]
    for files in artifacts:
        del files["manifest.json"]
    assert artifacts[0] == artifacts[1]
    assert {layer.name for layer in manifest.layers} == {layer.name for layer in read_manifest(tmp_path / "b").layers}
    assert manifest.artifact.original_bytes < read_manifest(tmp_path / "b").artifact.original_bytes
    assert any("the original is itself quantized" in note for note in manifest.fallbacks)
    assert "itself quantized" in str(manifest.model.caveat)


def test_the_plan_says_what_the_original_is(tmp_path: Path) -> None:
    pair(tmp_path, "fp8 block")
    plans = []
    for name in ("quantized", "plain"):
        recipe = parse(BASE | {"model": str(tmp_path / name), "method": {"name": "rtn"}})
        plans.append(prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache")).plan)
    quantized, plain = plans
    assert "(fp8, a scale for each 64 x 64 block)" in quantized.notes[0]
    assert quantized.artifact_bytes == plain.artifact_bytes
    assert not any("no smaller" in note for note in quantized.notes)
    wide = parse(BASE | {"model": str(tmp_path / "quantized"), "method": {"name": "rtn"}, "ignore": ["*.mlp.*"]})
    wider = prepare(wide, resolve(wide.model, cache=tmp_path / "cache")).plan
    assert any("the artifact is no smaller than the original" in note for note in wider.notes)
    assert quantized.memory_bytes == plain.memory_bytes
    on_disk = load_file(tmp_path / "quantized" / "model.safetensors").values()
    assert quantized.original_bytes == sum(t.nbytes for t in on_disk) < plain.original_bytes


@pytest.mark.parametrize("name", ["rtn", "llama.cpp"])
def test_gguf(name: str, tmp_path: Path) -> None:
    pair(tmp_path, "fp8 stripped", models.build)
    made = []
    for model in ("quantized", "plain"):
        method = {"name": "rtn"} if name == "rtn" else {"name": "llama.cpp"}
        kind = "Q8_0" if name == "rtn" else "BF16"
        document = {"method": method, "formats": ["gguf"], "gguf": {"type": kind}, "weights": {}}
        manifest = make(tmp_path / model / "run", tmp_path / model, document)
        made.append(manifest)
        assert "quantization_config" not in json.loads((tmp_path / model / "run/quantized/config.json").read_text())
    assert made[0].layers == made[1].layers
    assert any("itself quantized" in note for note in made[0].fallbacks)


def test_a_gguf_of_floats(tmp_path: Path) -> None:
    pair(tmp_path, "fp8 block", models.build)
    for name in ("quantized", "plain"):
        (tmp_path / name).rename(tmp_path / "model")  # the file names the folder
        write_floats(tmp_path / "model", tmp_path / f"{name}.gguf", "F32")
        (tmp_path / "model").rename(tmp_path / name)
    assert (tmp_path / "quantized.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def measured(folder: Path, original: str, artifact: str) -> Any:
    (folder / "text.txt").write_text(tiny.text())
    wanted = Evaluation(source=str(folder / "text.txt"), windows=2, window=48, new_tokens=4)
    inputs = prepare_evaluation(folder / original, wanted, folder / "cache")
    return evaluate(folder / original, folder / artifact, inputs, Gates())


@pytest.mark.parametrize("kind", ["fp8 beside", "fp8 stripped"])
def test_an_evaluation_reads_the_weights_and_not_their_codes(kind: str, tmp_path: Path) -> None:
    pair(tmp_path, kind)
    results = measured(tmp_path, "quantized", "plain")
    assert results.divergence.kl_mean < 1e-6
    assert any("itself quantized" in note for note in results.notes)
    assert results.efficiency.original_bytes < results.efficiency.bytes
    if kind == "fp8 stripped":
        assert measured(tmp_path, "plain", "quantized").divergence.kl_mean < 1e-6


def test_text_cannot_be_generated_by_a_quantized_model(tmp_path: Path) -> None:
    write(tmp_path / "model", "fp8 block")
    recipe = parse(BASE | {"model": str(tmp_path / "model"), "calibration": {"source": "self"}})
    with pytest.raises(BadInput, match=r"calibration.source self: .* give a text as calibration.source"):
        prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache"))


def test_scales_of_the_originals_cache_and_inputs_stay_behind(tmp_path: Path) -> None:
    write(tmp_path / "model", "fp8 tensor")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{name}": torch.tensor(0.5) for name in ("k_scale", "v_proj.v_scale")}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}})
    names = load_file(tmp_path / "run" / "quantized" / "model.safetensors")
    assert not [name for name in names if name.endswith(("k_scale", "v_scale", "input_scale", "scale_inv"))]
    beside = {file.name for file in (tmp_path / "run" / "quantized").iterdir()}
    assert not beside & {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
