"""SignRound and fake quantization against their plain definitions, differentiated by autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.methods.autoround import SignRound
from quantpress.methods.fake_quant import drawn, fake_quantize
from quantpress.methods.gptq import gptq
from quantpress.methods.rtn import rtn
from quantpress.numbers.grid import Grid, QuantizedLinear
from quantpress.recipe import AutoRound, Gptq, Rtn

from .test_gptq import problem

GRIDS = [(4, True), (4, False), (3, False), (2, False), (2, True), (8, True)]


def start(bits: int, symmetric: bool, group_size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """A weight and its GPTQ codes, which are often not the nearest."""
    weight, moment = problem(24, 48, seed=bits)
    weight = weight.to(dtype)
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    return weight, gptq(weight, grid, Gptq(), moment).linear


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` going forward, the identity in x coming back."""
    return x + (rounded - x).detach()


def by_definition(latent: Tensor, v: Tensor, a: Tensor, b: Tensor, first: QuantizedLinear) -> Tensor:
    """SignRound's weight (arXiv:2309.05516, 3.2) as autograd sees it; latent, v [out, in], a and b [out, groups]."""
    levels, groups = first.grid.levels, first.column_groups()
    scale0, zero0 = first.scales.float(), first.zeros.float()
    low, high = -zero0 * scale0, (levels - zero0) * scale0
    if first.grid.symmetric:
        scale, zero = b * scale0, zero0
    else:
        scale = (b * high - a * low) / levels
        scale = through(scale, scale.to(first.scales.dtype).float())
        zero = -a * low / scale
        zero = through(zero, zero.round()).clamp(0, levels)
    if first.grid.symmetric:
        scale = through(scale, scale.to(first.scales.dtype).float())
    scale, zero = scale[:, groups], zero[:, groups]
    position = latent / scale + v
    codes = (through(position, position.round()) + zero).clamp(0, levels)
    return (codes - zero) * scale


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_at_the_start(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    weight, first = start(bits, symmetric, group_size, dtype)
    one = SignRound(AutoRound(), weight, first)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(one.result, field), getattr(first, field))
        assert getattr(one.result, field).dtype == getattr(first, field).dtype
    assert torch.equal(one.weight, first.dequantize())


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_what_is_tuned_is_what_is_stored(bits: int, symmetric: bool) -> None:
    weight, first = start(bits, symmetric, dtype=torch.bfloat16)
    one = SignRound(AutoRound(lr=0.3), weight, first)
    g = torch.Generator().manual_seed(0)
    for step in range(20):
        one.step(torch.randn(weight.shape, generator=g), step / 20)
    result = one.result
    assert not torch.equal(result.codes, first.codes)
    assert not torch.equal(result.scales, first.scales)
    assert result.scales.dtype == torch.bfloat16
    assert int(result.codes.max()) <= result.grid.levels
    assert torch.equal(result.zeros, first.zeros) or not symmetric
    assert torch.equal(one.weight, result.dequantize())


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_steps_are_those_of_adam_on_the_definition(bits: int, symmetric: bool) -> None:
    weight, first = start(bits, symmetric)
    one = SignRound(AutoRound(lr=0.3), weight, first)
    latent = drawn(weight, first, 0.8)
    v = torch.zeros_like(weight, requires_grad=True)
    a, b = (torch.ones(first.scales.shape, requires_grad=True) for _ in range(2))
    groups = [{"params": [v], "lr": 0.3}, {"params": [a, b], "lr": 0.06}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-30)
    g = torch.Generator().manual_seed(1)
    for step in range(4):  # later steps start away from v = 0, a = b = 1
        gradient = torch.randn(weight.shape, generator=g)
        plain = by_definition(latent, v, a, b, first)
        torch.testing.assert_close(one.weight, plain.detach(), rtol=1e-5, atol=1e-6)
        adam.zero_grad()
        (plain * gradient).sum().backward()
        for group, rate in zip(adam.param_groups, (0.3, 0.06), strict=True):
            group["lr"] = rate * (1 - step / 4)
        adam.step()
        with torch.no_grad():
            v.clamp_(-0.5, 0.5)
            a.clamp_(0.5, 1.5)
            b.clamp_(0.5, 1.5)
        one.step(gradient, step / 4)
    assert v.abs().max() > 0.2
    assert b.sub(1).abs().max() > 0.02


def test_gradients_of_fake_quantization_are_those_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 8, generator=g, dtype=torch.float64).requires_grad_()
    scale = torch.rand(6, 3, 1, generator=g, dtype=torch.float64).add(0.2).requires_grad_()
    zero = torch.full((6, 3, 1), 2.0, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(6, 24, generator=g, dtype=torch.float64)
    position = weight / scale
    codes = (through(position, position.round()) + zero).clamp(0, 7)
    plain = ((codes - zero) * scale).flatten(1)
    fake = fake_quantize(weight.detach(), 0.0, scale.detach(), zero.detach(), 7)
    assert 0 < int((fake.inside == 0).sum()) < fake.inside.numel()
    torch.testing.assert_close(fake.weight, plain.detach())
    by_weight, by_scale, by_zero = torch.autograd.grad((plain * gradient).sum(), (weight, scale, zero))
    by_position, *others = fake.gradients(gradient)
    torch.testing.assert_close(by_position / scale, by_weight)
    torch.testing.assert_close(others, [by_scale, by_zero])


@pytest.mark.parametrize("bits", [2, 4])
def test_the_weight_is_drawn_to_the_codes_it_starts_from(bits: int) -> None:
    weight, first = start(bits, False)
    groups = first.column_groups()
    scale, zero = first.scales.float()[:, groups], first.zeros.float()[:, groups]
    beside = drawn(weight, first, 0.8) / scale + zero - first.codes
    original = weight / scale + zero - first.codes
    inner = (first.codes > 0) & (first.codes < first.grid.levels)
    assert original[inner].abs().max() > 0.5  # GPTQ did not take the nearest
    torch.testing.assert_close(beside[inner], 0.8 * original[inner].clamp(-0.5, 0.5), rtol=0, atol=1e-5)
    out = ((first.codes == 0) & (original < -0.5)) | ((first.codes == first.grid.levels) & (original > 0.5))
    assert out.any()
    torch.testing.assert_close(beside[out], original[out], rtol=1e-5, atol=1e-5)


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, :16] = 0
    for symmetric in (True, False):
        first = rtn(weight, Grid(bits=4, group_size=16, symmetric=symmetric), Rtn()).linear
        one = SignRound(AutoRound(steps=4), weight, first)
        for step in range(4):
            one.step(torch.ones_like(weight), step / 4)
        assert not one.weight[:, :16].any()
