"""What a batch costs beside its arithmetic: hooks that do not add up, experts whose tokens are sorted once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantpress.calibrate.block_pass import BlockPass
from quantpress.calibrate.lanes import Lanes
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.experts import Routing
from quantpress.models.skeleton import Skeleton

from ... import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_linear_has_one_hook_whatever_the_number_of_batches(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(12 * 8).reshape(12, 8)
    hidden = skeleton.embed(tokens)
    reference, arguments = hidden + 0.1, skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks())
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    common: dict[str, Any] = {"device": CPU, "lanes": Lanes(len(hidden), 1), "reference": reference}
    for _ in BlockPass(block, hidden, arguments, linears, **common):
        hooks = [len(module._forward_pre_hooks) for module in linears.values()]
        assert hooks == [1] * len(linears)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_tokens_are_routed_in_the_order_that_looking_for_each_expert_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(40)])
    chosen[chosen == 5] = 6  # nobody is sent to expert 5
    weights = torch.rand(40, 3, generator=generator)
    routing = Routing(chosen, 7)
    for e in range(7):
        token, position = torch.where(chosen == e)
        assert torch.equal(routing.tokens(e), token)
        assert torch.equal(routing.of_choices(weights)[routing.of(e)], weights[token, position])


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_are_summed_up_together_get_the_same_sums(
    family: str, restarts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one by one, and as batches that run again; none is asked for twice."""
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(12 * 8).reshape(12, 8)
    start, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks())
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and "gate." not in name}
    found: list[dict[tuple[str, ...], Any]] = []
    for together in (False, True):
        hidden, reference = start.clone(), start + 0.1
        common: dict[str, Any] = {
            "device": CPU,
            "lanes": Lanes(len(hidden), 4),
            "reference": reference,
            "restarts": restarts and together,
        }
        passing = BlockPass(block, hidden, arguments, linears, **common)
        if together:  # as on a GPU
            monkeypatch.setattr(passing, "_memory_for_moments", lambda: 1 << 32)
        lists = list(passing.together())
        if together:
            assert sorted(map(len, lists))[-2:] == [4, 4]  # what enters all experts, and all their down projections
        found.append({shared.names: shared for inputs in lists for shared in inputs})
        found[-1][("left",)] = hidden, reference
    assert found[0].keys() == found[1].keys()
    for names, one in found[0].items():
        other = found[1][names]
        if names == ("left",):
            assert all(map(torch.equal, one, other))
            continue
        assert torch.equal(one.moment, other.moment)
        assert torch.equal(one.drift, other.drift)
        assert one.tokens == other.tokens
