"""Round to nearest."""

import torch
from torch import Tensor

from ..grid import QuantizedLinear, fit, scale_dtype, snap
from ..recipe import Grid, Method
from .rounded import Rounded


def rtn(weight: Tensor, grid: Grid, settings: Method, moment: Tensor | None = None) -> Rounded:
    """Round `weight` [out, in] to the nearest point of a grid fitted to each group of columns.

    `moment` [in, in] = X^T X, when there is one, only measures the error; it does not steer the rounding.
    """
    out_features, in_features = weight.shape
    columns, dtype = grid.columns(in_features), scale_dtype(weight)
    w = weight.to(torch.float32).reshape(-1, columns)
    scale, zero = fit(w, grid, dtype)
    codes = snap(w, scale[:, None], zero[:, None], grid).to(torch.uint8).reshape(out_features, in_features)
    scales, zeros = scale.reshape(out_features, -1), zero.reshape(out_features, -1)
    linear = QuantizedLinear(codes, scales.to(dtype), zeros.to(torch.uint8), grid)
    w = w.reshape(out_features, in_features)
    return Rounded(linear, output_power(linear.dequantize() - w, moment), output_power(w, moment))


def output_power(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Squared output of each row of `weight` [out, in] over the tokens in `moment`; its squared norm without one."""
    moved = weight if moment is None else weight @ moment
    return (moved * weight).sum(1)
