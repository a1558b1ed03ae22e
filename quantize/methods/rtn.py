"""Round to nearest."""

import torch
from torch import Tensor

from ..grid import QuantizedLinear, collapse, encode, fit, global_scale, scale_dtype, snap
from ..recipe import Grid, Method
from .rounded import Rounded
from .threads import one_thread

_WIDEST = 256  # columns of a group


def rtn(
    weight: Tensor, grid: Grid, settings: Method, moment: Tensor | None = None, drift: Tensor | None = None
) -> Rounded:
    """Round `weight` [out, in] to the nearest point of a grid fitted to each group of columns.

    `moment` [in, in] = X^T X, when there is one, measures the error. With `scale_search: activation` scales are sought
    that make the least error in a group's output, by its block of the moment; of groups wider than 256 columns only by
    the diagonal of it: the block would cost more than everything else.
    """
    in_features = weight.shape[1]
    columns, dtype, overall = grid.columns(in_features), scale_dtype(weight, grid), global_scale(weight, grid)
    weigh = moment if grid.scale_search == "activation" else None
    w = weight.to(torch.float32)
    scales, zeros, numbers = [], [], torch.empty_like(w)
    with one_thread():
        for start in range(0, in_features, columns):
            part = slice(start, start + columns)
            importance = None if weigh is None else weigh[part, part]
            if importance is not None and columns > _WIDEST:
                importance = importance.diagonal()
            scale, zero = fit(w[:, part], grid, dtype, importance, overall)
            numbers[:, part] = snap(w[:, part], scale[:, None], zero[:, None], grid)
            scales.append(scale)
            zeros.append(zero)
    linear = as_stored(numbers, torch.stack(scales, 1), torch.stack(zeros, 1), grid, dtype, overall)
    return Rounded(linear, output_power(linear.dequantize() - w, moment), output_power(w, moment))


def as_stored(
    numbers: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, dtype: torch.dtype, overall: Tensor | None
) -> QuantizedLinear:
    """The record of numbers [out, in] with float32 scales and zeros [out, groups] that `dtype` holds exactly."""
    scales = collapse(scales if overall is None else scales * overall, grid).to(dtype).contiguous()
    zeros = collapse(zeros, grid).to(torch.uint8).contiguous()
    return QuantizedLinear(encode(numbers, grid).contiguous(), scales, zeros, grid, global_scale=overall)


def output_power(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Squared output of each row of `weight` [out, in] over the tokens in `moment`; its squared norm without one."""
    moved = weight if moment is None else weight @ moment
    return (moved * weight).sum(1)
