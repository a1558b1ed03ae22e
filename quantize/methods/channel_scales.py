"""Shared by the transforms: what calibration saw of the inputs, and the choice of scales by output error.

A transform picks scales s [in] for linears with a common input: the op before them puts out x / s, W becomes W * s, and
W x is unchanged until W is rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numbers.types import Grid
from ..recipe.methods import Rtn
from .layer_error import output_power
from .rtn import rtn

Rounding = Callable[[Tensor], Tensor]  # inputs [tokens, in] to inputs as the artifact rounds them at run time
Weights = Sequence[tuple[Tensor, Grid]]  # linears with a common input: weight [out, in] and its grid

_MOST = 1e4  # larger scales would leave the range of float16
_ROWS = 256  # rows of each weight that scales are compared on; measured to rank scales as all rows do
_TOGETHER = 1 << 26  # weights that a GPU rounds at once


@dataclass(frozen=True)
class Observed:
    """Inputs X [tokens, in] of linears that share them: moment = X^T X or its diagonal, peak = max |X| [in], rows of X.

    tie: int64 [in], the source channel of each input, of so many `channels`; inputs from one channel get one scale.
    """

    moment: Tensor
    peak: Tensor
    rows: Tensor
    tie: Tensor
    channels: int

    def divided(self, scale: Tensor) -> "Observed":
        """The inputs X / scale."""
        moment = self.moment / (scale.square() if self.moment.dim() == 1 else scale[:, None] * scale)
        return Observed(moment, self.peak / scale, self.rows / scale, self.tie, self.channels)

    def tied_mean(self, values: Tensor) -> Tensor:
        """`values` [in], each replaced by the mean over the inputs that share its channel."""
        columns = self._by_channel(values)
        total = columns[0]
        for more in columns[1:]:  # in a fixed order, unlike index_add on a GPU
            total = total + more
        return (total / len(columns))[self.tie]

    def tied_max(self, values: Tensor) -> Tensor:
        """`values` [in], each replaced by the largest over the inputs that share its channel."""
        return self._by_channel(values).amax(0)[self.tie]

    def _by_channel(self, values: Tensor) -> Tensor:
        """`values` [in] as [inputs a channel, channels]; every channel feeds equally many inputs."""
        return values[self.tie.argsort(stable=True)].reshape(self.channels, -1).T


@dataclass(frozen=True)
class Scaling:
    """The scale [in] a transform chose; strength: its exponent, None for no scaling at all.

    before, after: squared error of the rounded linears' outputs over their squared outputs, without the scale and with.
    """

    scale: Tensor
    strength: float | None
    before: float
    after: float


def sane(scale: Tensor) -> Tensor:
    """`scale` clamped to what 16-bit weights can take; 1 where it is 0 or not finite."""
    scale = scale.to(torch.float32)
    return torch.where(torch.isfinite(scale) & (scale > 0), scale.clamp(1 / _MOST, _MOST), torch.ones_like(scale))


def some_rows(weights: Weights) -> Weights:
    """Up to about 256 rows of each weight, evenly spread."""
    return [(w[:: max(1, w.shape[0] // _ROWS)], grid) for w, grid in weights]


def output_errors(
    weights: Weights, inputs: Observed, scales: Sequence[Tensor], rounding: Rounding | None = None
) -> Tensor:
    """For each scale s the squared error of the outputs when each weight W is rounded to nearest as W * s; float64.

    Over all calibration tokens: sum ||(Q(W s) / s - W) X^T||^2 = tr(D H D^T) with D = Q(W s) / s - W and H the second
    moment of X: no pass over X is needed. With `rounding`, which needs the inputs themselves, over the kept rows.
    """
    if rounding is not None:
        return torch.stack([_error_of_rows(weights, inputs, scale, rounding) for scale in scales])
    total = torch.zeros(len(scales), dtype=torch.float64, device=inputs.peak.device)
    for weight, grid in weights:
        total += _errors_by_moment(weight, grid, inputs, scales)
    return total


def _errors_by_moment(weight: Tensor, grid: Grid, inputs: Observed, scales: Sequence[Tensor]) -> Tensor:
    step, w, found = _step(weight, grid), weight.to(torch.float32), []
    for start in range(0, len(scales), step):
        some = torch.stack(list(scales[start : start + step]))[:, None]
        scaled = (w * some).to(weight.dtype)
        moment = inputs.divided(scales[start]).moment if grid.scale_search == "activation" else None
        nearest = rtn(scaled.flatten(0, 1), grid, Rtn(), moment).linear.dequantize()
        off = (nearest.view(scaled.shape) - scaled.to(torch.float32)).div_(some)
        found.append(output_power(off.flatten(0, 1), inputs.moment).view(len(some), -1).sum(1))
    return torch.cat(found)


def _step(weight: Tensor, grid: Grid) -> int:
    """How many scales' rows are rounded together: several on a GPU, where no grid depends on other rows or inputs."""
    apart = grid.scale_search != "activation" and not (grid.shares_rows or grid.shares_across_linears)
    return max(1, _TOGETHER // weight.numel()) if apart and weight.is_cuda else 1


def _error_of_rows(weights: Weights, inputs: Observed, scale: Tensor, rounding: Rounding) -> Tensor:
    moved, total = inputs.divided(scale), torch.zeros((), dtype=torch.float64, device=scale.device)
    x = rounding(moved.rows)
    for weight, grid in weights:
        w = weight.to(torch.float32)
        nearest = rtn((w * scale).to(weight.dtype), grid, Rtn(), moved.moment).linear.dequantize()
        total += (x @ nearest.T - inputs.rows @ w.T).square().sum()
    return total


def least(
    weights: Weights,
    inputs: Observed,
    candidates: Sequence[tuple[float, Tensor]],
    rounding: Rounding | None = None,
    *,
    or_none: bool = True,
) -> Scaling:
    """Of `candidates` (strength, scale), and with `or_none` of no scaling, the one with the least output error."""
    weights = some_rows(weights)
    scales = [torch.ones_like(inputs.peak), *(scale for _, scale in candidates)]
    found = output_errors(weights, inputs, scales, rounding)
    if rounding is None:
        powers = [output_power(w.to(torch.float32), inputs.moment).sum() for w, _ in weights]
    else:
        powers = [(inputs.rows @ w.to(torch.float32).T).square().sum() for w, _ in weights]
    # In one go: a GPU waits for it.
    before, *errors, power = torch.cat([found, torch.stack(powers).to(torch.float64).sum()[None]]).tolist()
    best = min(range(len(errors)), key=errors.__getitem__)
    power = power or 1.0
    if or_none and before <= errors[best]:
        return Scaling(torch.ones_like(inputs.peak), None, before / power, before / power)
    return Scaling(candidates[best][1], candidates[best][0], before / power, errors[best] / power)
