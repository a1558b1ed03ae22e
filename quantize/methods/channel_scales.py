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


@dataclass(frozen=True)
class Observed:
    """Inputs X [tokens, in] of linears that share them: moment = X^T X or its diagonal, peak = max |X| [in], rows of X.

    tie: int64 [in], the source channel of each input; inputs from one channel get one scale.
    """

    moment: Tensor
    peak: Tensor
    rows: Tensor
    tie: Tensor

    def divided(self, scale: Tensor) -> "Observed":
        """The inputs X / scale."""
        moment = self.moment / (scale.square() if self.moment.dim() == 1 else scale[:, None] * scale)
        return Observed(moment, self.peak / scale, self.rows / scale, self.tie)

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
        return values[self.tie.argsort(stable=True)].reshape(int(self.tie.max()) + 1, -1).T


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


def output_error(weights: Weights, inputs: Observed, scale: Tensor, rounding: Rounding | None = None) -> float:
    """Squared error of the outputs when each weight W is rounded to nearest as W * scale.

    Over all calibration tokens: sum ||(Q(W s) / s - W) X^T||^2 = tr(D H D^T) with D = Q(W s) - W s and H the second
    moment of X / s: no pass over X is needed. With `rounding`, which needs the inputs themselves, over the kept rows.
    """
    moved, total = inputs.divided(scale), 0.0
    x = None if rounding is None else rounding(moved.rows)
    for weight, grid in weights:
        w = weight.to(torch.float32)
        scaled = (w * scale).to(weight.dtype)
        nearest = rtn(scaled, grid, Rtn(), moved.moment)
        if x is None:
            off = nearest.linear.dequantize() - scaled.to(torch.float32)
            total += float(output_power(off, moved.moment).sum())
        else:
            total += float((x @ nearest.linear.dequantize().T - inputs.rows @ w.T).square().sum())
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
    before = output_error(weights, inputs, torch.ones_like(inputs.peak), rounding)
    errors = [output_error(weights, inputs, scale, rounding) for _, scale in candidates]
    if rounding is None:
        power = sum(float(output_power(w.to(torch.float32), inputs.moment).sum()) for w, _ in weights)
    else:
        power = sum(float((inputs.rows @ w.to(torch.float32).T).square().sum()) for w, _ in weights)
    best = min(range(len(errors)), key=errors.__getitem__)
    power = power or 1.0
    if or_none and before <= errors[best]:
        return Scaling(torch.ones_like(inputs.peak), None, before / power, before / power)
    return Scaling(candidates[best][1], candidates[best][0], before / power, errors[best] / power)
