"""AWQ's scales and its error measure against their plain definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from quantpress.methods import channel_scales
from quantpress.methods.awq import awq, magnitudes, salience
from quantpress.methods.channel_scales import Observed, output_errors
from quantpress.methods.rtn import rtn
from quantpress.numbers.types import Grid
from quantpress.recipe import Awq, Rtn, SmoothQuant

from .inputs import observed, outliers

GRID = Grid(bits=3, group_size=32, symmetric=False, scale_search="minmax")


def of(x: Tensor, strength: float, weights: Any = None, tie: Tensor | None = None) -> Tensor:
    """The scale [64] of one strength."""
    x, w = magnitudes(linears() if weights is None else weights, observed(x, tie))
    return salience(x, w, torch.tensor([[strength]]))[0]


def linears(seed: int = 0) -> list[tuple[Tensor, Grid]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(48, 64, generator=g) * 0.1, GRID),
        (torch.randn(300, 64, generator=g) * 0.2, GRID.model_copy(update={"bits": 4})),
    ]


def forward_error(weights: list[tuple[Tensor, Grid]], x: Tensor, scale: Tensor) -> float:
    """|| Q(W s) (x / s) - W x ||^2 by running the linears on every input."""
    total = 0.0
    for weight, grid in weights:
        rounded = rtn(weight * scale, grid, Rtn()).linear.dequantize()
        total += float(((x / scale) @ rounded.T - x @ weight.T).double().square().sum())
    return total


@pytest.mark.parametrize("together", [1, 2])
def test_the_error_from_the_moment_is_that_of_running_the_linears(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, scales = outliers(), linears(), [torch.ones(64), torch.linspace(0.3, 4, 64), torch.linspace(2, 1, 64)]
    monkeypatch.setattr(channel_scales, "_step", lambda weight, grid: together)
    found = output_errors(weights, observed(x), scales)
    assert found.tolist() == pytest.approx([forward_error(weights, x, scale) for scale in scales], rel=1e-3)


def test_scales_follow_the_definition_column_by_column() -> None:
    x, weights, strength = outliers(), linears(), 0.6
    got = of(x, strength, weights)
    wanted = []
    for j in range(64):
        inputs = float(x[:, j].double().square().sum().sqrt())
        columns = float(sum(w[:, j].double().square().mean() for w, _ in weights) / 2) ** 0.5
        wanted.append(inputs**strength / columns ** (1 - strength))
    middle = (min(wanted) * max(wanted)) ** 0.5
    assert_close(got, torch.tensor([s / middle for s in wanted]), rtol=1e-4, atol=0)


def test_the_strength_is_the_one_of_least_error_and_never_worse_than_none() -> None:
    x = outliers()
    weights = [(w[:200], grid) for w, grid in linears()]  # few enough rows that all are compared
    found = awq(weights, observed(x), Awq(points=8))
    scales = {None: torch.ones(64)} | {i / 8: of(x, i / 8, weights) for i in range(1, 8)}
    errors = {strength: forward_error(weights, x, scale) for strength, scale in scales.items()}
    assert found.strength == min(errors, key=errors.__getitem__)
    assert_close(found.scale, scales[found.strength])
    power = sum(float((x @ w.T).square().sum()) for w, _ in weights)
    assert found.before == pytest.approx(errors[None] / power, rel=1e-3)
    assert found.after == pytest.approx(errors[found.strength] / power, rel=1e-3)
    assert found.after < 0.8 * found.before  # inputs with outliers are what AWQ is for


def test_scaling_that_does_not_help_is_left_out() -> None:
    # On 8 levels all these weights lie exactly: no scale makes fewer errors than none.
    weight = torch.arange(8.0).repeat(16, 8) - 4
    found = awq([(weight, GRID.model_copy(update={"group_size": 64}))], observed(outliers()), Awq(points=4))
    assert found.strength is None
    assert torch.equal(found.scale, torch.ones(64))


def test_silent_channels_and_silent_inputs_are_not_scaled() -> None:
    x = outliers()
    x[:, 7] = 0
    scale = of(x, 0.5)
    assert scale[7] == 1
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(of(x * 0, 0.5), torch.ones(64))


def test_inputs_of_one_channel_get_one_scale() -> None:
    x, tie = outliers(), torch.arange(64) % 16
    scale = of(x, 0.5, tie=tie)
    assert torch.equal(scale, scale[:16].repeat(4))
    assert scale.unique().numel() == 16


def test_dividing_the_inputs_divides_all_that_was_seen_of_them() -> None:
    x, scale = outliers(), torch.linspace(0.5, 2, 64)
    once, again = observed(x).divided(scale), observed(x / scale)
    for name in ("moment", "peak", "rows"):
        assert_close(getattr(once, name), getattr(again, name), rtol=1e-4, atol=1e-4)


def test_nothing_given_is_changed() -> None:
    weights, inputs = linears(), observed(outliers())
    before = [w.clone() for w, _ in weights], inputs.moment.clone()
    awq(weights, inputs, Awq(points=3))
    assert all(torch.equal(a, w) for a, (w, _) in zip(before[0], weights, strict=True))
    assert torch.equal(before[1], inputs.moment)


def test_settings_of_another_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="settings of smoothquant"):
        awq(linears(), observed(outliers()), SmoothQuant())


def test_activation_search_takes_the_scale_of_least_output_error() -> None:
    x, (weight, _) = outliers(mixed=True), linears()[0]
    moment = x.T @ x
    errors = {}
    for search in ("minmax", "mse", "activation"):
        grid = GRID.model_copy(update={"scale_search": search})
        rounded = rtn(weight, grid, Rtn(), moment)
        errors[search] = float((x @ (rounded.linear.dequantize() - weight).T).square().sum())
    assert errors["activation"] < 0.9 * min(errors["minmax"], errors["mse"])


def test_wide_groups_are_searched_by_the_diagonal() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 512, generator=g), torch.randn(600, 512, generator=g)
    x[:, ::3] *= 4
    grid = Grid(bits=3, group_size=-1, symmetric=True, scale_search="activation")
    moment = x.T @ x
    apart = rtn(weight, grid, Rtn(), moment).linear
    assert torch.equal(apart.codes, rtn(weight, grid, Rtn(), moment.diagonal().diag()).linear.codes)


def test_observed_holds_what_its_name_says() -> None:
    x = outliers()
    assert isinstance(observed(x), Observed)
    assert_close(observed(x).tied_max(torch.arange(64.0)), torch.arange(64.0))
    halves = observed(x, torch.arange(64) // 2)
    assert_close(halves.tied_mean(torch.arange(64.0)), (torch.arange(64) // 2 * 2 + 0.5).float())
    assert_close(halves.tied_max(torch.arange(64.0)), (torch.arange(64) // 2 * 2 + 1).float())


class _Operations(TorchDispatchMode):
    """The names of the operations that tensors go through."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def test_inputs_of_one_channel_are_added_in_one_order() -> None:
    """On a GPU operations that add what falls on one index do so in any order: bytes would differ from run to run."""
    tie = torch.arange(64) % 16
    values = torch.zeros(64)
    values[3::16] = torch.tensor([1e8, 1.0, -1e8, 3.0])
    assert observed(outliers(), tie).tied_mean(values)[3] == 0.75  # ((1e8 + 1) - 1e8 + 3) / 4, 1 being lost at 1e8
    with _Operations() as done:
        awq(linears(), observed(outliers(), tie), Awq(points=3))
    assert "mm" in done.names
    in_any_order = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "index_put", "put", "bincount"}
    assert not done.names & in_any_order
