"""Sensitivities: what they foresee against the divergence, and the pass block by block against one through it all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantpress.calibrate.sensitivity import Sensitivity, _Sums, measure
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ... import families, tiny

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


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("llama", "layers.0.self_attn.q_proj"),
        ("mixtral", "layers.0.self_attn.q_proj"),
        ("gemma3n_text", "layers.0.self_attn.v_proj"),  # later blocks share its keys and values
        ("gemma4_text", "layers.0.self_attn.v_proj"),
        ("zaya", "layers.0.self_attn.o_proj"),  # routers hand on their states
    ],
)
def test_block_by_block_as_through_the_whole_model(family: str, linear: str, tmp_path: Path) -> None:
    """The products of each token's squared inputs and gradients, by hooks on transformers' own model, with the same
    tokens drawn."""
    tiny.build(family, tmp_path) if family in tiny.FAMILIES else families.build(family, tmp_path, torch.float32)
    found = measured(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    products: list[torch.Tensor] = []  # [out, in] of each sequence
    gradients: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        x = args[0].detach()[0].square()
        out.register_hook(lambda g: products.append(g[0].square().T @ x))  # type: ignore[no-untyped-call]
        out.register_hook(lambda g: gradients.append(g.square().sum()))  # type: ignore[no-untyped-call]

    model.get_submodule(f"model.{linear}").register_forward_hook(note)
    generator = torch.Generator().manual_seed(0)
    for row in IDS:
        logits = model(input_ids=row[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    (use,) = found[f"model.{linear}"]
    whole = torch.stack(products).sum(0)
    columns = whole.sum(0) / sum(gradients)
    torch.testing.assert_close(use.columns, columns, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(use.rows, whole.sum(1) / columns.sum() / IDS.numel() / 2, rtol=1e-3, atol=1e-9)


def test_a_token_of_huge_inputs_counts_as_much_as_its_outputs_matter() -> None:
    """As the first token of many models: its inputs are hundreds of times the others', its gradient is nothing."""
    make = torch.Generator().manual_seed(3)
    x, slope = torch.randn(2, 8, generator=make), torch.randn(2, 4, generator=make)
    x[0], slope[0] = 300 * x[0], 0.0
    layer, sums = nn.Linear(8, 4, bias=False).requires_grad_(False), _Sums()
    layer.register_forward_hook(sums.note)
    (layer(x[None].requires_grad_()) * slope).sum().backward()
    use = sums.sensitivity(2)
    expected = slope[1].square()[:, None] * x[1].detach().square() / 4
    torch.testing.assert_close(use.rows[:, None] * use.columns, expected)


def test_an_expert_is_sensitive_to_its_own_tokens(tmp_path: Path) -> None:
    tiny.build("mixtral", tmp_path)
    found = measured(tmp_path)
    experts = [uses for name, uses in found.items() if "experts" in name]
    assert len(experts) == 2 * 4 * 3
    assert all(len(uses) == 1 for uses in experts)
    assert sum(float(uses[0].rows.sum()) > 0 for uses in experts) > len(experts) // 2
