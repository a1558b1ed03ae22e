"""calibration.all_experts: every expert is summed up over all tokens, and the block computes what it did."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpress import api
from quantpress.calibrate import block_pass
from quantpress.calibrate.block_pass import BlockPass
from quantpress.calibrate.lanes import Lanes
from quantpress.core.errors import BadInput
from quantpress.engine import transforms
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.placed_model import LinearLayer
from quantpress.models.skeleton import Skeleton
from quantpress.numbers.activations import round_inputs
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations
from quantpress.recipe.loading import parse

from ... import families, tiny

CPU = torch.device("cpu")


def _first_block(family: str, folder: Path, samples: int) -> tuple[nn.Module, Tensor, Any, dict[str, LinearLayer]]:
    """Of a tiny model: its first block, what enters it, and its linears by name."""
    tiny.build(family, folder, torch.float32)
    skeleton = Skeleton(Checkpoint(folder), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(samples * 16).reshape(samples, 16) * 7 % tiny.VOCAB
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks(0))
    return block, hidden, arguments, {x.name: x for x in skeleton.linears() if x.block == 0}


def _received(block: nn.Module, experts: str, hidden: Tensor, arguments: Any) -> Tensor:
    """The states [tokens, hidden] that enter the experts in a plain pass."""
    seen: list[Tensor] = []
    hook = block.get_submodule(experts).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        arguments.call(block, hidden.clone(), slice(0, len(hidden)), keep=False)
    finally:
        hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def _entering(block: nn.Module, module: str, hidden: Tensor, arguments: Any) -> Tensor:
    """What a linear of an expert would receive if all tokens were sent to the expert."""
    experts, _, rest = module.partition(".experts.")
    rows = _received(block, f"{experts}.experts", hidden, arguments)
    expert: Any = block.get_submodule(f"{experts}.experts.{rest.split('.')[0]}")
    return expert.inner(rows) if block.get_submodule(module) is expert.last else rows


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_it_is_what_a_pass_without_routing_would_see(
    family: str, restarts: bool, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden, arguments, places = _first_block(family, tmp_path, samples=12)
    linears = {name: block.get_submodule(x.module) for name, x in places.items()}
    reference = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    original, arriving = copy.deepcopy(block), (hidden.clone(), reference.clone())
    if together:
        monkeypatch.setattr(BlockPass, "_memory_for_moments", lambda self: 1 << 20)
    passing = BlockPass(
        block,
        hidden,
        arguments,
        linears,
        device=CPU,
        lanes=Lanes(len(hidden), 5),
        reference=reference,
        restarts=restarts,
        all_experts=True,
    )
    seen: list[str] = []
    for groups in passing.together():
        for shared in groups:
            seen += shared.names
            module = places[shared.names[0]].module
            if ".experts." not in module:
                continue
            x = _entering(block, module, arriving[0], arguments)
            x0 = _entering(original, module, arriving[1], arguments)
            assert shared.tokens == 12 * 16 == len(x)
            torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(shared.drift, (x0 - x).T @ x, rtol=1e-3, atol=1e-3)
            for name in shared.names:
                weight = original.get_submodule(places[name].module).weight
                wanted = ((x0 - x) @ weight.T).square().sum(0)  # type: ignore[operator]
                torch.testing.assert_close(shared.drift_power[name], wanted, rtol=1e-3, atol=1e-3)
        for shared in groups:
            for name in shared.names:
                weight = linears[name].weight
                linears[name].weight = nn.Parameter(weight * 1.05, requires_grad=False)  # type: ignore[operator]
    assert sorted(seen) == sorted(linears)
    torch.testing.assert_close(hidden, arguments.call(block, arriving[0], slice(0, 12), keep=False))
    torch.testing.assert_close(reference, arguments.call(original, arriving[1], slice(0, 12), keep=False))


def test_inputs_are_rounded_on_the_way_to_the_down_projection(tmp_path: Path) -> None:
    block, hidden, arguments, places = _first_block("qwen3_moe", tmp_path, samples=4)
    linears = {n: block.get_submodule(x.module) for n, x in places.items() if ".experts." in n}
    entering = hidden.clone()
    spec = Activations(type="int8", dynamic=False)
    passing = BlockPass(
        block,
        hidden,
        arguments,
        linears,
        device=CPU,
        lanes=Lanes(len(hidden), 2),
        activations=dict.fromkeys(linears, (spec, 0)),
        all_experts=True,
    )
    given: list[Inputs] = []  # of the gate and up projections
    checked = 0
    for shared in passing:
        assert shared.inputs is not None
        module = places[shared.names[0]].module
        rows = _received(block, "mlp.experts", entering, arguments)
        if module.endswith("down_proj"):
            expert: Any = block.get_submodule(module.rpartition(".")[0])
            rows = expert.inner(round_inputs(rows, given[-1]))
            checked += 1
        else:
            given.append(shared.inputs)
        x = round_inputs(rows, shared.inputs)
        torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-3, atol=1e-3)
    assert checked == 4


def test_all_tokens_are_multiplied_once_for_all_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(4000))
    sums: list[int] = []
    real = block_pass.Moments
    monkeypatch.setattr(block_pass, "Moments", lambda *of, **how: sums.append(1) or real(*of, **how))
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 16, "all_experts": True}
    recipe = {"method": "gptq", "weights": {"group_size": 32}, "calibration": calibration}
    api.quantize(recipe, str(tmp_path / "model"), tmp_path / "run")
    assert len(sums) == 2 * (2 + 1 + 4)  # of a block: q, k and v; o; all experts' gate and up; each one's down


@pytest.mark.parametrize("everywhere", [False, True])
def test_scales_are_chosen_for_all_tokens_too(
    everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWQ's scale of each expert's up projection into its down projection, of what the latter receives."""
    tiny.build("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(4000))
    seen: dict[str, int] = {}
    real = transforms.BlockTransforms._chosen

    def chosen(self: Any, block: Any, link: Any, grids: Any, shared: Any, watch: Any) -> Any:
        seen[shared.names[0]] = shared.tokens
        return real(self, block, link, grids, shared, watch)

    monkeypatch.setattr(transforms.BlockTransforms, "_chosen", chosen)
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 16, "all_experts": everywhere}
    recipe = {"method": "rtn", "transforms": ["awq"], "weights": {"group_size": 32}, "calibration": calibration}
    api.quantize(recipe, str(tmp_path / "model"), tmp_path / "run")
    experts = [tokens for name, tokens in seen.items() if name.endswith("down_proj")]
    assert len(experts) == 4
    assert (min(experts) == max(experts) == 64) == everywhere


def test_an_importance_matrix_is_of_routed_tokens() -> None:
    with pytest.raises(BadInput, match=r"calibration\.all_experts: an importance matrix"):
        parse(
            {
                "method": "llama.cpp",
                "formats": ["gguf"],
                "gguf": {"imatrix": True},
                "calibration": {"all_experts": True},
            }
        )


def test_experts_that_get_weighed_tokens_are_refused(tmp_path: Path) -> None:
    families.build("llama4_text", tmp_path / "model")
    recipe = {"method": "gptq", "calibration": {"all_experts": True}, "weights": {"group_size": 32}}
    with pytest.raises(BadInput, match=r"calibration\.all_experts: llama4_text gives its experts tokens weighed"):
        api.plan(recipe, str(tmp_path / "model"))
