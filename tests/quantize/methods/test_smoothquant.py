"""SmoothQuant's scales and their search against plain definitions."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from quantpress.methods.rtn import rtn
from quantpress.methods.smoothquant import smoothing, smoothquant
from quantpress.numbers.types import Grid
from quantpress.recipe import Awq, Rtn, SmoothQuant

from .inputs import observed, outliers

GRID = Grid(bits=8, group_size=-1, symmetric=True, scale_search="minmax")


def linears() -> list[tuple[Tensor, Grid]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(48, 64, generator=g) * 0.1, GRID), (torch.randn(80, 64, generator=g) * 0.2, GRID)]


def int8(x: Tensor) -> Tensor:
    """x [tokens, in] on a symmetric int8 grid of its own for each token."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def forward_error(x: Tensor, scale: Tensor) -> float:
    total = 0.0
    for weight, grid in linears():
        rounded = rtn(weight * scale, grid, Rtn()).linear.dequantize()
        total += float((int8(x / scale) @ rounded.T - x @ weight.T).double().square().sum())
    return total


def test_scales_follow_the_definition_column_by_column() -> None:
    x, weights, alpha = outliers(), linears(), 0.7
    wanted = []
    for j in range(64):
        widest = max(float(w[:, j].abs().max()) for w, _ in weights)
        wanted.append(float(x[:, j].abs().max()) ** alpha / widest ** (1 - alpha))
    assert_close(smoothing(weights, observed(x), alpha), torch.tensor(wanted), rtol=1e-5, atol=0)
    found = smoothquant(weights, observed(x), SmoothQuant(alpha=alpha), int8)
    assert found.strength == alpha
    assert_close(found.scale, torch.tensor(wanted), rtol=1e-5, atol=0)


def test_half_and_half_gives_inputs_and_weights_one_range() -> None:
    x, weights = outliers(), linears()
    scale = smoothing(weights, observed(x), 0.5)
    ranges = torch.stack([w.abs().amax(0) for w, _ in weights]).amax(0) * scale
    assert_close((x / scale).abs().amax(0), ranges)


def test_inputs_of_one_channel_get_one_scale_by_their_largest() -> None:
    x, weights, tie = outliers(), linears(), torch.arange(64) % 16
    scale = smoothing(weights, observed(x, tie), 0.5)
    widest = torch.stack([w.abs().amax(0) for w, _ in weights]).amax(0).reshape(4, 16).amax(0)
    peak = x.abs().amax(0).reshape(4, 16).amax(0)
    assert_close(scale, (peak / widest).sqrt().repeat(4))


def test_channels_without_a_range_are_left_alone() -> None:
    x, weights = outliers(), linears()
    x[:, 3] = 0
    for weight, _ in weights:
        weight[:, 5] = 0
    for alpha in (0.0, 0.5, 1.0):
        scale = smoothing(weights, observed(x), alpha)
        assert scale[3] == 1
        assert scale[5] == 1
        assert torch.isfinite(scale).all()


def test_the_search_takes_the_alpha_of_least_error_with_the_inputs_rounded_too() -> None:
    x = outliers()
    found = smoothquant(linears(), observed(x), SmoothQuant(alpha="search"), int8)
    scales = {None: torch.ones(64)} | {i / 10: smoothing(linears(), observed(x), i / 10) for i in range(11)}
    errors = {alpha: forward_error(x, scale) for alpha, scale in scales.items()}
    assert found.strength == min(errors, key=errors.__getitem__)
    assert found.after / found.before == pytest.approx(errors[found.strength] / errors[None], rel=1e-3)
    assert found.after < 0.5 * found.before  # channels 12 times larger than the rest are what it is for


def test_where_inputs_stay_in_16_bit_their_outliers_stay_too() -> None:
    x = outliers()
    kept = smoothquant(linears(), observed(x), SmoothQuant(alpha="search"))
    assert kept.after <= kept.before
    moved = smoothquant(linears(), observed(x), SmoothQuant(alpha="search"), int8)
    assert moved.before > kept.before


def test_settings_of_another_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="settings of awq"):
        smoothquant(linears(), observed(outliers()), Awq())
