"""Block-AP against its plain definition, differentiated by autograd."""

import pytest
import torch
from torch import Tensor

from quantpress.methods.fake_quant import drawn
from quantpress.methods.qat import BlockAp
from quantpress.methods.rtn import rtn
from quantpress.numbers.grid import Grid, QuantizedLinear
from quantpress.recipe import Qat, Rtn

from .test_autoround import GRIDS, start, through


def by_definition(weight: Tensor, scale: Tensor, zero: Tensor, first: QuantizedLinear) -> Tensor:
    """The rounded weight (arXiv:2407.11062, eq. 1 and 2) as autograd sees it; scale and zero [out, groups]."""
    groups, levels = first.column_groups(), first.grid.levels
    scale = through(scale, scale.to(first.scales.dtype).float())[:, groups]
    zero = through(zero, zero.round())[:, groups]
    position = weight / scale
    codes = (through(position, position.round()) + zero).clamp(0, levels)
    return (codes - zero) * scale


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_at_the_start(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    weight, first = start(bits, symmetric, group_size, dtype)
    one = BlockAp(Qat(), weight, first)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(one.result, field), getattr(first, field))
        assert getattr(one.result, field).dtype == getattr(first, field).dtype
    assert torch.equal(one.weight, first.dequantize())


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_what_is_trained_is_what_is_stored(bits: int, symmetric: bool) -> None:
    weight, first = start(bits, symmetric, dtype=torch.bfloat16)
    one = BlockAp(Qat(weight_lr=0.2, quant_lr=0.1), weight, first)
    g = torch.Generator().manual_seed(0)
    for step in range(20):
        one.step(torch.randn(weight.shape, generator=g), step / 20)
    result = one.result
    assert not torch.equal(result.codes, first.codes)
    assert not torch.equal(result.scales, first.scales)
    assert torch.equal(result.zeros, first.zeros) == symmetric
    assert result.scales.dtype == torch.bfloat16
    assert int(result.codes.max()) <= result.grid.levels
    assert int(result.zeros.max()) <= result.grid.levels
    assert torch.equal(one.weight, result.dequantize())


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_steps_are_those_of_adam_on_the_definition(bits: int, symmetric: bool) -> None:
    weight, first = start(bits, symmetric)
    one = BlockAp(Qat(weight_lr=0.3, quant_lr=0.15), weight, first)
    unit, groups = first.scales.float(), first.column_groups()
    # In steps of the grid, the rates are the same for all of a tensor.
    latent = (drawn(weight, first, 0.8) / unit[:, groups]).requires_grad_()
    scale = torch.ones_like(unit, requires_grad=True)
    zero = first.zeros.float().requires_grad_(not symmetric)
    rates = [(latent, 0.3), (scale, 0.15)] + ([] if symmetric else [(zero, 0.15)])
    adam = torch.optim.Adam([{"params": [x]} for x, _ in rates], betas=(0.9, 0.95), eps=1e-30)
    g = torch.Generator().manual_seed(1)
    for step in range(4):
        gradient = torch.randn(weight.shape, generator=g)
        plain = by_definition(latent * unit[:, groups], scale * unit, zero, first)
        torch.testing.assert_close(one.weight, plain.detach(), rtol=1e-5, atol=1e-5)
        adam.zero_grad()
        (plain * gradient).sum().backward()
        for group, (_, rate) in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 4)
        adam.step()
        with torch.no_grad():
            zero.clamp_(0, first.grid.levels)
        one.step(gradient, step / 4)
    assert not torch.equal(one.result.codes, first.codes)
    assert scale.detach().sub(1).abs().max() > 0.2


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, :16] = 0
    for symmetric in (True, False):
        first = rtn(weight, Grid(bits=4, group_size=16, symmetric=symmetric), Rtn()).linear
        one = BlockAp(Qat(steps=4), weight, first)
        for step in range(4):
            one.step(torch.ones_like(weight), step / 4)
        assert not one.weight[:, :16].any()
