"""The linears of one input rounded: what the record of each says of what was and was not done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantpress.artifact.manifest import LayerRecord
from quantpress.calibrate.block_pass import SharedInput
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.rounding import BlockRounding
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.placed_model import LinearLayer
from quantpress.numbers.grid import Grid
from quantpress.recipe import Gptq, Recipe, Rtn
from quantpress.recipe.methods import MethodSettings

from ... import families
from ...tiny import build
from .test_pipeline import make

LINEARS = [LinearLayer("a", "0", 0, 16, 32, False), LinearLayer("b", "1", 0, 8, 32, False)]
GRID = Grid(bits=3, group_size=16)


def on_record(shared: SharedInput, method: Gptq) -> dict[str, LayerRecord]:
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Linear(x.in_features, x.out_features) for x in LINEARS)).requires_grad_(False)
    rounding = BlockRounding(method, {x.name: GRID for x in LINEARS}, block)
    rounding.round([shared], {x.name: x for x in LINEARS})
    return rounding.finish()


def test_error_correction_that_could_not_be_done_is_noted() -> None:
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    shared = SharedInput(("a", "b"), x.T @ x, 100, unmatched=True)
    for record in on_record(shared, Gptq()).values():
        assert record.note == (
            "no error correction: its inputs cannot be matched with the original model's token by token"
        )
        assert record.error_measure == "output_local"
    assert all(record.note is None for record in on_record(shared, Gptq(error_correction=0)).values())


def test_each_of_stacked_linears_has_its_own_error() -> None:
    """Its own rows of the error and its own power of the drift."""
    make = torch.Generator().manual_seed(1)
    x, x0 = torch.randn(2, 100, 32, generator=make).cumsum(0)
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Linear(x.in_features, x.out_features) for x in LINEARS)).requires_grad_(False)
    weights = {"a": block[0].weight.clone(), "b": block[1].weight.clone()}
    power = {name: ((x0 - x) @ w.T).square().sum(0) for name, w in weights.items()}
    shared = SharedInput(("a", "b"), x.T @ x, 100, (x0 - x).T @ x, power)
    rounding = BlockRounding(Gptq(), {x.name: GRID for x in LINEARS}, block)
    rounding.round([shared], {x.name: x for x in LINEARS})
    rounded, records = rounding.rounded, rounding.finish()
    for name, w in weights.items():
        wanted = x0 @ w.T
        error = (x @ rounded[name].dequantize().T - wanted).square().sum() / wanted.square().sum()
        assert records[name].error_measure == "output_accumulated"
        torch.testing.assert_close(torch.tensor(records[name].relative_error), error, rtol=1e-3, atol=0)


def test_an_expert_without_tokens_is_rounded_to_nearest_and_says_so() -> None:
    for record in on_record(SharedInput(("a", "b")), Gptq()).values():
        assert record.note == "no calibration token reached it: rounded to nearest"
        assert (record.error_measure, record.loss, record.tokens) == ("weight", None, 0)


@pytest.mark.parametrize("method", [Gptq(), Gptq(error_correction=0), Rtn()])
def test_weights_that_all_round_to_nothing_are_told(method: MethodSettings) -> None:
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    shared = SharedInput(("a", "b")) if isinstance(method, Rtn) else SharedInput(("a", "b"), x.T @ x, 100)
    block = nn.Sequential(*(nn.Linear(x.in_features, x.out_features) for x in LINEARS)).requires_grad_(False)
    block[0].weight.mul_(1e-7)
    block[1].weight.zero_()
    rounding = BlockRounding(method, {x.name: GRID for x in LINEARS}, block)
    rounding.round([shared], {x.name: x for x in LINEARS})
    records = rounding.finish()
    assert "its weights are too small for the scales: all round to 0" in str(records["a"].note)
    assert "too small" not in str(records["b"].note)
    assert not rounding.rounded["b"].dequantize().any()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("weights", "suffix"),
    [({"type": "nvfp4"}, "weight_global_scale"), ({"type": "fp8", "group_size": 0}, "weight_scale")],
)
def test_linears_that_servers_fuse_share_a_scale(
    weights: dict[str, Any], suffix: str, method: str, tmp_path: Path
) -> None:
    """One of them far larger than the others: its scale is everyone's, and no other linear's."""
    model = build("llama", tmp_path / "model", torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.mul_(8)
        layer.mlp.up_proj.weight.data.mul_(8)
    model.save_pretrained(tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", {"weights": weights, "method": {"name": method}})
    artifact = Checkpoint(tmp_path / "run" / "quantized")
    for block in (0, 1):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            scales = {float(artifact.read(f"model.layers.{block}.{name}.{suffix}")) for name in fused}
            assert len(scales) == 1, (block, fused)
            assert scales != {float(artifact.read(f"model.layers.{block}.self_attn.o_proj.{suffix}"))}


def test_scales_are_in_the_type_that_servers_run_where_the_class_needs_float32(tmp_path: Path) -> None:
    """Their float16, that of float32 models, would be rounded once more as a server loads it."""
    families.build("deepseek_v4", tmp_path / "model")
    recipe = Recipe.model_validate({"name": "s", "weights": {"bits": 4, "group_size": 8}, "method": {"name": "rtn"}})
    job = prepare(recipe, resolve(str(tmp_path / "model"), cache=tmp_path), torch.device("cpu"))
    assert (job.skeleton.dtype, job.skeleton.served_dtype) == (torch.float32, torch.bfloat16)
    quantize(job, Settings(tmp_path / "out", tmp_path / "out", ignore_limits=True))
    artifact = Checkpoint(tmp_path / "out" / "quantized")
    assert {artifact.dtype(n) for n in artifact.names() if n.endswith(".weight_scale")} == {torch.bfloat16}
