"""Transforms in whole blocks: every family computes what it did before, and the artifact holds what was changed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from quantpress.artifact.artifact import open_artifact
from quantpress.calibrate.lanes import Lanes
from quantpress.core.errors import BadInput
from quantpress.engine import blocks
from quantpress.engine.pipeline import prepare
from quantpress.engine.sources import resolve
from quantpress.engine.transforms import BlockTransforms, Link, fold, unfit
from quantpress.models import families
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.family import Feed
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.recipe import Recipe
from quantpress.recipe.loading import parse

from ...tiny import FAMILIES, SCALED, build, text
from .test_pipeline import files, make

CPU = torch.device("cpu")
BOTH = [{"name": "smoothquant"}, {"name": "awq", "points": 4}]
# What every transform must have reached, by family.
LLAMA = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
EXPERTS = [*LLAMA[:3], *(f"mlp.experts.{e}.up_proj" for e in range(4))]
FEEDS = {
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "gpt_neox": ["input_layernorm", "post_attention_layernorm"],
    "olmo2": [LLAMA[1], LLAMA[3]],
    "olmo3": [LLAMA[1], LLAMA[3]],
    "glm": [*LLAMA[:3], "mlp.gate_up_proj"],
    "glm4": [*LLAMA[:3], "mlp.gate_up_proj"],
    "gpt2": ["ln_1", "attn.c_attn", "ln_2"],
    "qwen2_moe": [*EXPERTS, "mlp.shared_expert.up_proj"],
    "qwen3_moe": EXPERTS,
    "mixtral": [*LLAMA[:3], *(f"block_sparse_moe.experts.{e}.w3" for e in range(4))],
}


def recipe(**document: Any) -> Recipe:
    return parse({"transforms": BOTH, "weights": {"bits": 4, "group_size": 32, "symmetric": False}} | document)


class Opened:
    """A tiny model's blocks with the hidden states that enter each."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        build(family, folder, dtype)
        self.skeleton = Skeleton(Checkpoint(folder), device=CPU)
        self.skeleton.open_shell()
        tokens = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))
        self.hidden, self.arguments = self.skeleton.embed(tokens), self.skeleton.block_arguments(tokens)
        self.lanes = Lanes(len(tokens), 4)

    def blocks(self) -> Iterator[tuple[int, nn.Module, Tensor]]:
        for k, block in self.skeleton.blocks():
            after = self.run(k, block)
            yield k, block, after
            self.hidden = after

    def run(self, k: int, block: nn.Module) -> Tensor:
        hidden = self.hidden.clone()
        run_block(block, hidden, self.arguments[k], device=CPU, batch=4)
        return hidden

    def modules(self, k: int) -> list[str]:
        return [x.module for x in self.skeleton.linears() if x.block == k]


@pytest.mark.parametrize("activations", [None, {"type": "int8"}])
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_a_transformed_block_computes_what_it_did(
    family: str, activations: dict[str, str] | None, tmp_path: Path
) -> None:
    model = Opened(family, tmp_path)
    settings = recipe(weights={"bits": 8, "group_size": -1}, activations=activations) if activations else recipe()
    transforms = BlockTransforms(settings, model.skeleton)
    for k, block, before in model.blocks():
        originals, hidden = dict(block.named_parameters()), model.hidden.clone()
        copies = {name: p.clone() for name, p in originals.items()}
        grids = dict.fromkeys(model.modules(k), settings.weights)
        changes = transforms.apply(k, block, grids, model.hidden, model.arguments[k], model.lanes)
        assert torch.equal(model.hidden, hidden)
        after = model.run(k, block)
        assert_close(after, before, rtol=0, atol=3e-6 * float(before.abs().max()))
        changed = {name for name, p in block.named_parameters() if not torch.equal(p, copies[name])}
        assert changed == changes.parameters
        assert all(torch.equal(originals[name], copies[name]) for name in originals)  # may be the checkpoint's memory
        assert len(changed) >= (4 if family.startswith("olmo") else 5)


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_every_feed_of_a_family_is_found(family: str, tmp_path: Path) -> None:
    model = Opened(family, tmp_path)
    k, block, _ = next(model.blocks())
    grids = dict.fromkeys(model.modules(k), recipe().weights)
    changes = BlockTransforms(recipe(), model.skeleton).apply(
        k, block, grids, model.hidden, model.arguments[k], model.lanes
    )
    assert [record.note for record in changes.records] == [None] * len(changes.records)
    feeds = {record.feed.split(".0.", 1)[1] for record in changes.records}
    assert feeds == set(FEEDS.get(family, LLAMA))
    for name in ("smoothquant", "awq"):
        assert {r.feed.split(".0.", 1)[1] for r in changes.records if r.transform == name} == feeds
    for record in changes.records:
        assert record.transform == "smoothquant" or record.error_after <= record.error_before


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_the_router_is_scaled_with_the_experts(family: str, tmp_path: Path) -> None:
    model = Opened(family, tmp_path)
    k, block, _ = next(model.blocks())
    names = [n for n, _ in block.named_modules() if n == "mlp.gate" or n.endswith(("shared_expert_gate", "experts.3"))]
    before = {n: p.clone() for n, p in block.named_parameters()}
    grids = dict.fromkeys(model.modules(k), recipe().weights)
    BlockTransforms(recipe(), model.skeleton).apply(k, block, grids, model.hidden, model.arguments[k], model.lanes)
    norm = before["post_attention_layernorm.weight"] / block.get_parameter("post_attention_layernorm.weight")
    assert float(norm.max() / norm.min()) > 1.1
    for name in names:
        inside = {"mixtral": "w1"}.get(family, "gate_proj")
        weight = f"{name}.{inside}.weight" if "experts" in name else f"{name}.weight"
        assert_close(block.get_parameter(weight), before[weight] * norm, rtol=1e-5, atol=1e-7)


def test_a_norm_in_bfloat16_cancels_against_the_columns(tmp_path: Path) -> None:
    for plus_one in (False, True):
        block = nn.ModuleDict({"norm": nn.RMSNorm(64), "linear": nn.Linear(64, 8, bias=False)})
        block.requires_grad_(False)
        g = torch.Generator().manual_seed(0)
        block["norm"].weight = nn.Parameter(torch.randn(64, generator=g).bfloat16(), requires_grad=False)
        norm, columns = block["norm"].weight.float() + plus_one, block["linear"].weight.clone()
        link = Link("norm", ("linear",), Feed("norm", ("linear",), plus_one=plus_one))
        changed = fold(block, link, torch.rand(64, generator=g) + 0.5, torch.arange(64))
        assert changed == {"norm.weight", "linear.weight"}
        product = (block["norm"].weight.float() + plus_one) * block["linear"].weight
        assert_close(product, norm * columns, rtol=1e-6, atol=0)


def test_a_norm_weight_of_zero_stays_zero_and_its_columns_finite() -> None:
    block = nn.ModuleDict({"norm": nn.LayerNorm(64), "linear": nn.Linear(64, 8)}).requires_grad_(False)
    block["norm"].weight[3] = 0
    block["norm"].bias[3] = 2
    x = torch.randn(5, 64)
    before = block["linear"](block["norm"](x))
    fold(block, Link("norm", ("linear",), Feed("norm", ("linear",))), torch.rand(64) + 0.5, torch.arange(64))
    assert block["norm"].weight[3] == 0
    assert_close(block["linear"](block["norm"](x)), before)


def test_what_shapes_do_not_allow_is_named(tmp_path: Path) -> None:
    model = Opened("llama", tmp_path)
    _, block, _ = next(model.blocks())
    values = Feed("self_attn.v_proj", ("self_attn.o_proj",), heads=True)
    link, config = Link(values.source, values.into, values), model.skeleton.config
    assert unfit(block, link, config) is None
    block.self_attn.v_proj = nn.Linear(64, 48)
    assert unfit(block, link, config) == "self_attn.v_proj puts out 48 channels and self_attn.o_proj takes in 32"
    config.num_attention_heads = 5
    assert unfit(block, link, config) == "the inputs of self_attn.o_proj do not divide into 5 heads"


def test_a_feed_that_cannot_be_scaled_is_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("phi3", tmp_path / "model", torch.bfloat16)
    row = families.FAMILIES["phi3"]
    fused = Feed("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True)  # not said to be the last rows
    monkeypatch.setitem(families.FAMILIES, "phi3", replace(row, feeds=(row.feeds[0], fused)))
    manifest = make(tmp_path / "run", tmp_path / "model", {"transforms": BOTH, "method": {"name": "rtn"}})
    assert manifest.fallbacks[0] == (
        "model.layers.0.self_attn.qkv_proj: smoothquant, awq left out: self_attn.qkv_proj puts out 128 channels "
        "and self_attn.o_proj takes in 32"
    )
    assert len(manifest.fallbacks) == 2


def test_an_expert_that_no_token_reached_is_left_as_it_is(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "model", torch.bfloat16)
    few = {"method": {"name": "rtn"}, "calibration": {"samples": 1, "seq_len": 16}}
    document = {"transforms": BOTH, "targets": ["vllm"]} | few
    manifest = make(tmp_path / "run", tmp_path / "model", document, words="a" * 4000)  # one token: one pair of experts
    left = [line for line in manifest.fallbacks if "left out: no calibration token reached it" in line]
    assert len([line for line in left if line.startswith("model.layers.0.mlp.experts.")]) == 2


def test_linears_left_in_16_bit_are_left_alone(tmp_path: Path) -> None:
    build("qwen2", tmp_path / "model", torch.bfloat16)
    document = {"transforms": BOTH, "ignore": ["*.self_attn.*"], "method": {"name": "rtn"}}
    manifest = make(tmp_path / "run", tmp_path / "model", document)
    original, artifact = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "run" / "quantized")
    for name in original.names():
        if name.removesuffix(".weight").endswith(("layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "bias")):
            same = torch.equal(original.read(name), artifact.read(name))
            assert same == ("post_attention_layernorm" not in name), name
    scaled = {record.feed.rpartition(".")[2] for record in manifest.transforms}
    assert scaled == {"post_attention_layernorm", "up_proj"}
    assert manifest.fallbacks == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_holds_the_block_as_it_was_calibrated(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    in_memory: dict[str, Tensor] = {}
    tensors = blocks._block_tensors

    def spy(job: Any, k: int, block: nn.Module, *rest: Any) -> dict[str, Tensor]:
        in_memory.update({disk: block.get_parameter(n).clone() for n, disk in job.skeleton.block_names(k).items()})
        return tensors(job, k, block, *rest)

    monkeypatch.setattr(blocks, "_block_tensors", spy)
    formats = ["gptq" if family == "gpt2" else "compressed-tensors"]
    # Where it can be left out, a linear in 16 bit whose columns are scaled all the same.
    ignore = [] if "gpt" in family or family == "phi3" else ["*.0.*k_proj"]
    targets = [] if family == "gpt2" else ["vllm"]
    document = {"transforms": BOTH, "formats": formats, "ignore": ignore, "targets": targets}
    make(tmp_path / "run", tmp_path / "model", document)
    artifact, _ = open_artifact(tmp_path / "run" / "quantized", CPU)
    original = Checkpoint(tmp_path / "model")
    for name, tensor in in_memory.items():
        assert artifact.read(name).dtype == original.read(name).dtype
        assert torch.equal(artifact.read(name), tensor), name
    norms = [n for n in in_memory if n.endswith(("input_layernorm.weight", "ln_1.weight"))]
    assert norms
    assert not any(torch.equal(artifact.read(name), original.read(name)) for name in norms)


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_resume_after_a_stop_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model", torch.bfloat16)
    document = {"transforms": BOTH, "targets": ["vllm"]}
    make(tmp_path / "whole", tmp_path / "model", document)

    def stop(progress: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "cut", tmp_path / "model", document, on_block=stop)
    make(tmp_path / "cut", tmp_path / "model", document)
    assert files(tmp_path / "cut" / "quantized") == files(tmp_path / "whole" / "quantized")


def test_a_family_without_a_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    # Another table: put back by monkeypatch, a row would come last in this one, and its order counts for GGUF files.
    others = {name: row for name, row in families.FAMILIES.items() if name != "llama"}
    monkeypatch.setattr(families, "FAMILIES", others)
    with pytest.raises(BadInput, match=r"transform smoothquant .* llama block, and no row .*leave it out") as caught:
        make(tmp_path / "run", tmp_path / "model", {"transforms": BOTH})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    make(tmp_path / "run", tmp_path / "model", {})


def test_a_scaled_model_rounds_better(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    shard = tmp_path / "model" / "model.safetensors"
    tensors = load_file(shard)
    for name in tensors:  # inputs with outliers, as large models have them
        if name.endswith("layernorm.weight"):
            tensors[name][::11] *= 15
    save_file(tensors, shard, metadata={"format": "pt"})
    runs = {}
    for name, transforms in (("plain", []), ("awq", [{"name": "awq"}])):
        document = {"method": {"name": "rtn"}, "transforms": transforms, "calibration": {"samples": 8}}
        document["weights"] = {"bits": 4, "group_size": 32, "symmetric": False, "scale_search": "activation"}
        runs[name] = make(tmp_path / name, tmp_path / "model", document)
    losses = {n: sum(x.relative_error for x in m.layers if "q_proj" in x.name) for n, m in runs.items()}
    assert losses["awq"] < 0.8 * losses["plain"]
    assert runs["plain"].transforms == ()


def test_the_plan_counts_the_look_at_the_inputs(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    (tmp_path / "text.txt").write_text(text())
    plans = []
    for transforms in ([], [{"name": "awq"}]):
        document = {"model": str(tmp_path / "model"), "transforms": transforms, "weights": {"group_size": 32}}
        settings = parse(document)
        plans.append(prepare(settings, resolve(settings.model, cache=tmp_path / "cache")).plan)
    assert plans[1].passes == plans[0].passes + 1
    assert plans[1].operations > plans[0].operations
