"""Experts computed together, as a GPU has them: what the loop over them computes, to the last sums' order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.models import experts as module
from quantpress.models.experts import Expert, ExpertShape, Routing, SplitExperts
from quantpress.models.grouped_experts import can_group

TOKENS, HIDDEN, EXPERTS, CHOSEN = 40, 16, 5, 3


def mixture(bias: bool = False) -> SplitExperts:
    shape = ExpertShape(("gate", "up", "down"), HIDDEN, 24, bias)
    silu = torch.nn.functional.silu
    made = SplitExperts(Expert(shape, lambda gate, up: silu(gate) * up) for _ in range(EXPERTS))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and choices of which none is expert 3."""
    generator = torch.Generator().manual_seed(1)
    others = torch.tensor([0, 1, 2, 4])
    index = torch.stack([others[torch.randperm(4, generator=generator)[:CHOSEN]] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, generator=generator), index, torch.rand(TOKENS, CHOSEN, generator=generator)


def passed(experts: SplitExperts, together: bool) -> tuple[Tensor, list[list[Tensor]]]:
    """The result, and what the experts' linears are shown to receive before either half."""
    seen: list[list[Tensor]] = []

    def reached(last: bool, rows: Tensor, routing: Routing, inputs: Callable[[int], Tensor]) -> bool:
        seen.append([inputs(e).clone() for e in range(EXPERTS)])
        return together

    experts.reached = reached
    with torch.no_grad():
        return experts(*routing()), seen


def test_together_they_compute_what_the_loop_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = mixture()
    calls: list[int] = []
    real = module.grouped
    monkeypatch.setattr(module, "can_group", lambda linears, rows: True)
    monkeypatch.setattr(module, "grouped", lambda *args: calls.append(1) or real(*args))
    wanted, shown = passed(experts, together=False)
    assert not calls
    found, seen = passed(experts, together=True)
    assert len(calls) == 3
    torch.testing.assert_close(found, wanted)
    assert len(shown[0][3]) == 0
    torch.testing.assert_close(seen, shown)


def test_only_plain_experts_of_sixteen_bits_on_a_gpu_are_grouped() -> None:
    def there(experts: SplitExperts, dtype: torch.dtype, device: str, width: int = HIDDEN) -> bool:
        rows: Any = torch.empty(2, width, dtype=dtype, device="meta")
        stand_in: Any = type("Rows", (), {"device": torch.device(device), "dtype": rows.dtype})()
        return can_group([expert.linears for expert in experts], stand_in)  # type: ignore[misc]

    assert there(mixture(), torch.bfloat16, "cuda")
    assert not there(mixture(), torch.bfloat16, "cpu")
    assert not there(mixture(), torch.float32, "cuda")
    assert not there(mixture(bias=True), torch.bfloat16, "cuda")
    odd = mixture()
    odd[2].linears[0].weight.data = torch.zeros(16, HIDDEN)  # type: ignore[operator, index, union-attr]
    assert not there(odd, torch.bfloat16, "cuda")
