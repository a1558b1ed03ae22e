"""The error on record of each layer, beside one computed from the model and the artifact by their own forwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpress.artifact.artifact import open_artifact
from quantpress.methods.layer_error import layer_error, layer_error_of_rows
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ...tiny import build
from .test_pipeline import CPU, make

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "rtn": ({"method": {"name": "rtn"}}, "weight"),
    "rtn, calibrated": ({"method": {"name": "rtn"}, "weights": {"scale_search": "activation"}}, "output_local"),
    "gptq": ({"method": {"name": "gptq", "error_correction": 0}}, "output_local"),
    "gptq, qep": ({"method": {"name": "gptq", "error_correction": 0.5}}, "output_accumulated"),
    "autoround": ({"method": {"name": "autoround", "steps": 4}}, "output_accumulated"),
    "qat, end to end": ({"method": {"name": "qat", "steps": 2, "end_to_end": {"steps": 2}}}, "output_accumulated"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("case", CASES)
def test_the_error_on_record_is_that_of_the_outputs(
    case: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, measure = CASES[case]
    weights = {"bits": 3, "group_size": 32, "symmetric": family == "gpt2"} | document.get("weights", {})
    conv1d = {"formats": ["gptq"]}
    document = document | {"weights": weights} | (conv1d if family == "gpt2" else {"targets": ["vllm"]})
    build(family, tmp_path / "model", torch.float32)
    met: list[Tensor] = []
    embed = Skeleton.embed
    monkeypatch.setattr(Skeleton, "embed", lambda s, ids, *to: met.append(ids) or embed(s, ids, *to))
    manifest = make(tmp_path / "run", tmp_path / "model", document)
    met = [ids for ids in met if ids.shape == (6, 32)]  # not those of the guard, which come first
    tokens = met[0] if met else torch.zeros(1, 4, dtype=torch.int64)
    artifact, _ = open_artifact(tmp_path / "run" / "quantized", CPU)
    original, before = _inputs(tmp_path / "model", tokens)
    rounded, now = _inputs(tmp_path / "model", tokens, {n: artifact.linear(n).dequantize() for n in artifact.linears})
    for layer in manifest.layers:
        name = layer.name
        w, q = before[name], now[name]
        assert layer.error_measure == measure, name
        if ".experts." in name and measure == "output_accumulated":
            continue  # other tokens reach it in the original: see tests/quantize/calibrate/test_block_pass.py
        x = rounded[name]
        x0 = original[name] if measure == "output_accumulated" else x
        wanted = x0 @ w.T if measure != "weight" else w
        error = ((x @ q.T if measure != "weight" else q) - wanted).square().sum()
        share = float(error / wanted.square().sum())
        assert layer.relative_error == pytest.approx(share, rel=2e-3), name
        if measure != "weight":
            assert layer.tokens == len(x)
            assert layer.loss == pytest.approx(float(error) / len(x), rel=2e-3), name
    assert manifest.error_measure == measure


def _inputs(
    folder: Path, tokens: Tensor, weights: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each linear of the model receives [tokens, in] and its weight [out, in], with other `weights` in place."""
    skeleton = Skeleton(Checkpoint(folder), device=CPU)
    model, seen, own = skeleton.whole(), {}, {}
    for linear in skeleton.linears():
        module: Any = skeleton.block(linear.block).get_submodule(linear.module)
        if weights is not None:
            new = weights[linear.name]
            module.weight = nn.Parameter(new.T if linear.transposed else new, requires_grad=False)
        own[linear.name] = module.weight.T if linear.transposed else module.weight
        module.register_forward_pre_hook(
            lambda _, args, name=linear.name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen, own


def test_sums_and_rows_give_one_error() -> None:
    make = torch.Generator().manual_seed(0)
    x, off = torch.randn(500, 48, generator=make), torch.randn(500, 48, generator=make)
    w, e = torch.randn(24, 48, generator=make), torch.randn(24, 48, generator=make)
    for drift, size in ((0.3, 0.1), (1e-3, 0.1), (0.3, 1e-4), (0.0, 0.1)):
        x0, q = x + drift * off, w + size * e
        sums = x.T @ x, (x0 - x).T @ x, ((x0 - x) @ w.T).square().sum(0)
        wanted, moved = x0 @ w.T, x @ q.T
        for found in (layer_error(w, q, *sums), layer_error_of_rows(w, q, x, x0)):
            assert found.measure == "output_accumulated"
            torch.testing.assert_close(found.error, (moved - wanted).square().sum(0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found.power, wanted.square().sum(0), rtol=1e-4, atol=1e-6)
        for found in (layer_error(w, q, sums[0]), layer_error_of_rows(w, q, x, None)):
            assert found.measure == "output_local"
            torch.testing.assert_close(found.error, (x @ (q - w).T).square().sum(0), rtol=1e-3, atol=1e-6)


def test_without_sums_over_tokens_it_is_the_weights_error_and_says_so() -> None:
    make = torch.Generator().manual_seed(0)
    w, q = torch.randn(2, 24, 48, generator=make)
    importance = torch.rand(48, generator=make)
    alone, weighed = layer_error(w, q, None), layer_error(w, q, importance)
    assert (alone.measure, weighed.measure) == ("weight", "weight_by_importance")
    torch.testing.assert_close(alone.error, (q - w).square().sum(1))
    torch.testing.assert_close(weighed.error, ((q - w).square() * importance).sum(1))
    torch.testing.assert_close(weighed.power, (w.square() * importance).sum(1))
    assert alone.record(0) == {
        "loss": None, "relative_error": float(alone.error.sum()) / float(alone.power.sum()), "error_measure": "weight",
    }  # fmt: skip
