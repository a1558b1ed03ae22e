"""What transformers cannot load is refused at plan, unless the recipe names a server, and said even then."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from quantpress.artifact.artifact import open_artifact
from quantpress.core.errors import BadInput
from quantpress.engine.job import Job, prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.models.loading import keeps_modules
from quantpress.recipe import Recipe

from ... import families, multimodal

CPU = torch.device("cpu")
INT4 = {"bits": 4, "group_size": 32, "symmetric": True}
PACKED = "is initialised through weights that a packed linear does not have"
FUSED = "takes one tensor for all experts, and each is written by itself, as servers read them"


def prepared(folder: Path, **recipe: Any) -> Job:
    document = {"name": "readers", "weights": INT4, "method": {"name": "rtn"}, **recipe}
    return prepare(Recipe.model_validate(document), resolve(str(folder), cache=folder), CPU)


@pytest.mark.parametrize("family", ["falcon", "rwkv"])
def test_classes_that_reach_for_weights_are_loaded_by_newer_transformers(family: str, tmp_path: Path) -> None:
    model = families.build(family, tmp_path / "model")
    if not keeps_modules():
        update = r"--set targets=\[vllm\], or install transformers 5.24 or newer"
        with pytest.raises(BadInput, match=f"transformers could not load the artifact: .*{PACKED}.* {update}"):
            prepared(tmp_path / "model")
    job = prepared(tmp_path / "model", targets=["vllm"])
    assert any(PACKED in note for note in job.plan.notes)
    quantize(job, Settings(tmp_path / "run", tmp_path / "run", ignore_limits=True))
    folder = tmp_path / "run" / "quantized"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["dequantize"] is True
    if keeps_modules():
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
        assert max(float((after[n] - before[n]).abs().max() / before[n].abs().max()) for n in before) < 0.3


def test_few_linears_whose_weights_a_class_reaches_for_stay_and_the_rest_is_loaded(tmp_path: Path) -> None:
    families.build("nanochat", tmp_path / "model")
    if keeps_modules():
        assert prepared(tmp_path / "model").plan.quantized_share == 1
        return
    job = prepared(tmp_path / "model")
    kept = {name for name, grid in job.schemes.items() if grid is None}
    assert kept == {f"model.layers.{k}.self_attn.o_proj" for k in range(4)}
    (note,) = [note for note in job.plan.notes if "o_proj" in note]
    assert note.startswith(
        "model.layers.*.self_attn.o_proj stays in 16 bit (4 tensors), so that transformers loads the rest, 83% of the "
        "blocks' weights: before 5.24 it initialises its NanoChatAttention through this weight"
    )
    quantize(job, Settings(tmp_path / "run", tmp_path / "run", ignore_limits=True))
    folder = tmp_path / "run" / "quantized"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert note in json.loads((folder / "manifest.json").read_text())["fallbacks"]
    loaded(torch.tensor([[2]]))  # which unpacks
    _, ours = open_artifact(folder, CPU, dtype=torch.float32)
    for k, block in ours.blocks():
        for name, mine in block.named_parameters():
            theirs = loaded.get_submodule(f"model.layers.{k}").get_parameter(name)
            torch.testing.assert_close(theirs, mine, rtol=2**-7, atol=0)  # a product in bfloat16


def test_nothing_is_left_where_a_server_or_an_override_wants_it(tmp_path: Path) -> None:
    families.build("nanochat", tmp_path)
    assert prepared(tmp_path, targets=["vllm"]).plan.quantized_share == 1
    if not keeps_modules():
        with pytest.raises(BadInput, match=f"could not load the artifact: .*{PACKED}"):
            prepared(tmp_path, overrides=[{"match": "*.o_proj", "bits": 8}])


@pytest.mark.parametrize(("family", "why"), [("gpt_oss", FUSED), ("granitemoe", FUSED)])
def test_an_artifact_that_transformers_cannot_load_needs_a_server(family: str, why: str, tmp_path: Path) -> None:
    families.build(family, tmp_path)
    with pytest.raises(BadInput, match=f"transformers could not load the artifact: .*{why}.* --set targets") as error:
        prepared(tmp_path)
    assert "\n" not in str(error.value)
    notes = prepared(tmp_path, targets=["vllm"]).plan.notes
    assert [note for note in notes if note.startswith("transformers does not load this artifact: ") and why in note]


def test_weights_that_are_not_packed_are_loaded(tmp_path: Path) -> None:
    families.build("falcon", tmp_path)
    assert prepared(tmp_path, weights={"type": "fp8"}).plan.notes == ()


def test_a_part_that_is_called_by_itself_is_dequantized_as_it_is_loaded(tmp_path: Path) -> None:
    """The library decompresses weights as the whole model is called, and Qwen-Omni's never is."""
    multimodal.build_omni(tmp_path / "model")
    with pytest.raises(BadInput, match=r"talker.* is not quantized, and what it joins to one tensor"):
        prepared(tmp_path / "model")  # in FP8 it takes some experts in 16 bit
    with pytest.raises(BadInput, match="has to have one number format"):
        prepared(tmp_path / "model", weights={"type": "fp8"}, overrides=[{"match": "*.self_attn.*", "type": "mxfp8"}])
    quantize(
        prepared(tmp_path / "model", weights={"type": "fp8"}),
        Settings(tmp_path / "run", tmp_path / "run", ignore_limits=True),
    )
    folder = tmp_path / "run" / "quantized"
    thinker = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).thinker
    _, ours = open_artifact(folder, CPU, dtype=torch.float32)
    layers = thinker.get_decoder().layers
    for k, block in ours.blocks():
        for name in ("self_attn.o_proj", "mlp.gate"):
            theirs, mine = layers[k].get_submodule(name).weight, block.get_submodule(name).weight
            torch.testing.assert_close(theirs, mine, rtol=2**-7, atol=0)  # theirs is a product in bfloat16


LOST = r"model.layers.\d+.mlp.experts.\d+.\w+_proj.weight is not quantized, and what it joins to one tensor"
UNREAD = "it has no way to read experts of "


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"ignore": ["*.1.mlp.experts.*"]}, LOST),
        ({"weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8"}}, f"{UNREAD}int8 .* int8 inputs"),
        ({"weights": {"type": "nvfp4"}}, f"{UNREAD}nvfp4"),
        ({"weights": {"type": "mxfp8"}}, f"{UNREAD}mxfp8"),
        ({"weights": INT4 | {"symmetric": False}}, f"{UNREAD}int4 g32 asym, with zero points; set `symmetric: true`"),
        ({"weights": INT4 | {"symmetric": False}, "overrides": [{"match": "*.experts.*", "symmetric": True}]}, None),
        ({"ignore": ["*.self_attn.*"]}, None),
        ({"weights": {"type": "fp8"}, "ignore": ["*.experts.*"]}, None),
        ({"weights": {"type": "mxfp4"}}, None),
    ],
)
def test_experts_that_transformers_joins_as_it_loads_them(
    recipe: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    """It takes all for the one kind: 5.17 fills the missing ones with noise, 5.24 reads NVFP4 without its scale."""
    families.build("qwen3_moe", tmp_path)
    if why is None:
        assert not [note for note in prepared(tmp_path, **recipe).plan.notes if "does not load" in note]
        return
    with pytest.raises(BadInput, match=f"transformers could not load the artifact: in its qwen3_moe {why}.* --set"):
        prepared(tmp_path, **recipe)
    assert [note for note in prepared(tmp_path, targets=["vllm"], **recipe).plan.notes if "does not load" in note]


def test_what_newer_transformers_joins_besides_experts(tmp_path: Path) -> None:
    """The convolutions of kimi_linear; 5.17 joins them as they are."""
    families.build("kimi_linear", tmp_path)
    notes = prepared(tmp_path, targets=["vllm"]).plan.notes
    lost = r"does not load this artifact: in its kimi_linear .*conv1d.weight is not quantized"
    assert bool([note for note in notes if re.search(lost, note)]) is keeps_modules()


def test_experts_that_transformers_takes_apart_are_loaded(tmp_path: Path) -> None:
    families.build("llama4_text", tmp_path)
    assert not [note for note in prepared(tmp_path).plan.notes if "does not load" in note]


@pytest.mark.parametrize(
    ("family", "kind", "share"),
    [
        ("dbrx", "DbrxExpertGLU", "33%"),
        ("aria_text", "Aria[A-Za-z]+", "29%"),
        ("jetmoe", "JetMoeParallelExperts", "14%"),
    ],
)
def test_experts_that_nothing_loads_are_refused_whatever_the_target(
    family: str, kind: str, share: str, tmp_path: Path
) -> None:
    families.build(family, tmp_path)
    with pytest.raises(BadInput, match=f"nothing loads the experts of {kind} quantized") as error:
        prepared(tmp_path, targets=["vllm"])
    _, advice = str(error.value).split(
        f"or leave them in 16 bit, and quantize {share} of the blocks' weights: `ignore: "
    )
    plan = prepared(tmp_path, ignore=json.loads(advice.rstrip("`"))).plan
    assert f"{plan.quantized_share:.0%}" == share


def test_few_linears_that_the_groups_do_not_fill_stay_and_are_named(tmp_path: Path) -> None:
    families.build("gemma4_text", tmp_path)  # 16 columns in the projection of each block's own embedding
    plan = prepared(tmp_path).plan
    assert plan.layers["model.layers.0.per_layer_projection"] == "16 bit"
    assert [
        n for n in plan.notes if n.startswith("model.layers.*.per_layer_projection stays in 16 bit (6 tensors): its")
    ]
    narrow = {"match": "*.per_layer_projection", "group_size": 16}
    plan = prepared(tmp_path, overrides=[narrow]).plan
    assert plan.layers["model.layers.0.per_layer_projection"] == "int4 g16 sym"
    with pytest.raises(BadInput, match="in_features 64 is not a multiple of group_size 48"):
        prepared(tmp_path, weights=INT4 | {"group_size": 48})
