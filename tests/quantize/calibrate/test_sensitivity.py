"""Sensitivities: what they foresee against the divergence, and the pass block by block against one through it all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantpress.calibrate.sensitivity import Sensitivity, measure
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ... import tiny

IDS = torch.randint(2, tiny.VOCAB, (6, 48), generator=torch.Generator().manual_seed(1))


def model_of(family: str, folder: Path) -> Any:
    """A saved float64 model that predicts something: random weights hardly do."""
    model = tiny.build(family, folder)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    with torch.no_grad():
        norm.weight.mul_(4)
    model.save_pretrained(folder)
    return model.double()  # divergences this small are noise in float32


def measured(folder: Path) -> dict[str, list[Sensitivity]]:
    skeleton = Skeleton(Checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    found = measure(skeleton, IDS, folder)
    assert not list(folder.glob("states-*"))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])  # tied, biases, Conv1D, a scaled embedding
def test_the_cost_foresees_the_divergence(family: str, tmp_path: Path) -> None:
    model, found = model_of(family, tmp_path), measured(tmp_path)
    make = torch.Generator().manual_seed(2)
    ratios = []
    with torch.no_grad():
        before = predictions(model)
        for name, uses in found.items():
            module: Any = model.get_submodule(
                name if family != "gpt2" else f"transformer.{name.removeprefix('transformer.')}"
            )
            error = torch.randn(module.weight.shape, generator=make).double() * module.weight.std() * 0.02
            module.weight += error
            after = predictions(model)
            module.weight -= error
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            across = type(module).__name__ == "Conv1D"
            mine = (error.T if across else error).float()
            ratios.append(sum(use.cost(mine, torch.arange(len(use.rows))) for use in uses) / kl)
    middle = float(np.median(ratios))
    assert 0.5 < middle < 2, ratios
    assert np.mean([0.3 < r / middle < 3 for r in ratios]) > 0.85, ratios


def predictions(model: Any) -> torch.Tensor:
    return torch.cat([torch.log_softmax(model(row[None]).logits[0], -1) for row in IDS])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_block_by_block_as_through_the_whole_model(family: str, tmp_path: Path) -> None:
    """Squared inputs and gradients by hooks on transformers' own model, with the same tokens drawn."""
    tiny.build(family, tmp_path)
    found = measured(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs, gradients = torch.zeros(64), torch.zeros(0)

    def note(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        nonlocal inputs
        inputs = inputs + args[0].detach().reshape(-1, 64).square().sum(0)
        out.register_hook(gather)  # type: ignore[no-untyped-call]

    def gather(g: torch.Tensor) -> None:
        nonlocal gradients
        squares = g.reshape(-1, g.shape[-1]).square().sum(0)
        gradients = squares if not gradients.numel() else gradients + squares

    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(note)
    generator = torch.Generator().manual_seed(0)
    for row in IDS:
        logits = model(input_ids=row[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    (use,) = found["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(use.columns, inputs / IDS.numel(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(use.rows, gradients / IDS.numel() / 2, rtol=1e-3, atol=1e-9)


def test_an_expert_is_sensitive_to_its_own_tokens(tmp_path: Path) -> None:
    """Columns are the mean square of what it is given, rows the squared gradients of all tokens."""
    tiny.build("mixtral", tmp_path)
    found = measured(tmp_path)
    experts = [uses for name, uses in found.items() if "experts" in name]
    assert len(experts) == 2 * 4 * 3
    assert all(len(uses) == 1 for uses in experts)
    assert sum(float(uses[0].rows.sum()) > 0 for uses in experts) > len(experts) // 2
