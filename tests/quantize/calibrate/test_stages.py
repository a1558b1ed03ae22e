"""What a stage says of the inputs of its linears, and the sums it is made of."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpress.calibrate.stages import Stages, add_second_moment, exact_products
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.numbers.activations import round_inputs
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations

from ... import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [96, 300])
def test_products_of_sixteen_bit_values_lose_nothing(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    total = torch.zeros(n, n)
    with exact_products(dtype):
        for part in x.split(700):
            add_second_moment(total, part.float())
    after = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before
    wanted = x.double().T @ x.double()
    torch.testing.assert_close(total.triu().double(), wanted.triu(), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_stage_is_what_a_plain_pass_would_see(family: str, tmp_path: Path) -> None:
    """Moment and drift of every stage, each linear changed before the next; batches of more tokens than one product."""
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=torch.device("cpu"))
    skeleton.open_shell()
    hidden = skeleton.embed(torch.arange(36 * 64).reshape(36, 64) * 7 % tiny.VOCAB)
    reference = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    arguments = skeleton.block_arguments(64)[0]
    _, block = next(skeleton.blocks(0))
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    original = copy.deepcopy(block)
    arriving, wanted = (hidden.clone(), reference.clone()), _outputs(original, reference, arguments)
    stages = Stages(
        block, hidden, arguments, linears, device=torch.device("cpu"), batch=20, keep=True, reference=reference
    )
    compared = {name for name in linears if "expert" not in name}
    seen: list[str] = []
    for stage in stages:
        name = stage.names[0]
        seen += stage.names
        x = _inputs(block, name, arriving[0], arguments)
        assert stage.moment is not None
        torch.testing.assert_close(stage.moment, x.T @ x, rtol=1e-4, atol=1e-3)
        assert stage.tokens == len(x)
        assert (stage.drift is not None) == (name in compared)
        if stage.drift is not None:
            x0 = _inputs(original, name, arriving[1], arguments)
            torch.testing.assert_close(stage.drift, (x0 - x).T @ x, rtol=1e-4, atol=1e-3)
        done = compared <= set(seen)  # the original has nothing to wait for after its last comparison
        assert torch.equal(reference, wanted if done else arriving[1])
        for one in stage.names:
            module: Any = block.get_submodule(one)
            module.weight = nn.Parameter(module.weight * 1.05, requires_grad=False)
    assert sorted(seen) == sorted(linears)
    torch.testing.assert_close(hidden, _outputs(block, arriving[0], arguments))
    assert torch.equal(reference, wanted)


def test_what_moves_a_bfloat16_model_is_summed_to_its_precision() -> None:
    """Moments are exact products; the drift's factors and partial sums are rounded to bfloat16, which has 8 bits."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, 96, generator=g).bfloat16()
    reference = (hidden + 0.05 * torch.randn(hidden.shape, generator=g)).bfloat16()
    x, x0 = hidden.double().flatten(0, 1), reference.double().flatten(0, 1)
    block = nn.Sequential(nn.Linear(96, 96, dtype=torch.bfloat16))
    stages = Stages(block, hidden, ((), {}), {"0": block[0]}, device=torch.device("cpu"), batch=20, reference=reference)
    (stage,) = stages
    assert stage.moment is not None
    assert stage.drift is not None
    torch.testing.assert_close(stage.moment.double(), x.T @ x, rtol=1e-5, atol=1e-3)
    wanted = (x0 - x).T @ x
    assert (stage.drift - wanted).norm() < 2**-8 * wanted.norm()


def test_a_pass_for_diagonals_and_one_with_rounded_inputs_see_the_same_as_a_plain_one(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=torch.device("cpu"))
    skeleton.open_shell()
    hidden = skeleton.embed(torch.arange(24 * 64).reshape(24, 64) * 7 % tiny.VOCAB)
    arguments = skeleton.block_arguments(64)[0]
    _, block = next(skeleton.blocks(0))
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    common: dict[str, Any] = {"device": torch.device("cpu"), "batch": 20}
    for stage in Stages(block, hidden.clone(), arguments, linears, keep=False, diagonal=True, **common):
        x = _inputs(block, stage.names[0], hidden, arguments)
        assert stage.moment is not None
        torch.testing.assert_close(stage.moment, x.square().sum(0), rtol=1e-4, atol=1e-4)

    spec = Activations(type="int8")
    rounded = copy.deepcopy(block)
    for name in linears:
        rounded.get_submodule(name).register_forward_pre_hook(lambda _, args: (round_inputs(args[0], Inputs(spec, 0)),))
    made = hidden.clone()
    for stage in Stages(block, made, arguments, linears, activations=(spec, 0), **common):
        x = _inputs(rounded, stage.names[0], hidden, arguments)  # this hook comes after the one that rounds
        assert stage.moment is not None
        torch.testing.assert_close(stage.moment, x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(made, _outputs(rounded, hidden, arguments))


def _outputs(block: nn.Module, hidden: Tensor, arguments: Any) -> Tensor:
    """What the block makes of hidden [samples, seq_len, hidden], in the batches of the test."""
    args, kwargs = arguments
    with torch.no_grad():
        made = [block(part, *args, **kwargs) for part in hidden.split(20)]
    return torch.cat([x[0] if isinstance(x, tuple) else x for x in made])


def _inputs(block: nn.Module, name: str, hidden: Tensor, arguments: Any) -> Tensor:
    """All that linear `name` receives [tokens, in]."""
    seen: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _outputs(block, hidden, arguments)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
