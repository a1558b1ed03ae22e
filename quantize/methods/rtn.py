"""Round to nearest."""

import torch
from torch import Tensor

from ..core.machine import one_thread
from ..numbers.ggml_scales import by_size
from ..numbers.grid import QuantizedLinear, encode, fit_alone, global_scale, scale_dtype, snap
from ..numbers.types import BlockGrid, Grid
from ..plugin import MethodSettings
from .group_scales import GroupScales
from .rounded import Rounded

_PIECE = 1 << 18  # weights rounded at a time and thread where rows are independent
_WIDEST = 256  # columns of a group whose whole block of the moment is used


def rtn(
    weight: Tensor, grid: Grid, settings: MethodSettings, moment: Tensor | None = None, drift: Tensor | None = None
) -> Rounded:
    """Round `weight` [out, in] to the nearest point of a grid fitted to each group of columns.

    The error is measured with `moment` [in, in] = X^T X or its diagonal [in], where given. With `scale_search:
    activation` each group's scale is the one with the least error in the group's output, by its block of the moment;
    for groups wider than 256 columns by the block's diagonal only, since the block would cost more than all else.
    ggml's types also weigh each weight's error by its size (`ggml.by_size`) before the block decides.
    """
    in_features, fitting = weight.shape[1], GroupScales(weight, grid, scale_dtype(weight, grid))
    columns = fitting.columns
    weigh = moment if grid.scale_search == "activation" else None
    diagonal = None if weigh is None else column_power(weigh)
    w = weight.to(torch.float32)
    if weigh is None and not isinstance(grid, BlockGrid) and not grid.shares_rows:
        scales, zeros = fitting.fit_all(w)
        numbers = snap(w.reshape(len(w), -1, columns), scales.T[..., None], zeros.T[..., None], grid)
        return Rounded(fitting.linear(numbers.flatten(1)))
    numbers, each, block = torch.empty_like(w), None, None
    with one_thread():
        for start in range(0, in_features, columns):
            group, part = start // columns, slice(start, start + columns)
            importance = None if diagonal is None else diagonal[part]
            if isinstance(grid, BlockGrid):
                if start % fitting.span == 0:
                    wide = slice(start, start + fitting.span)
                    each = None if diagonal is None else by_size(w[:, wide], diagonal[wide], grid)
                    fitting.reach(group, w[:, wide], each)
                inside = slice(start % fitting.span, start % fitting.span + columns)
                importance = None if each is None else each[:, inside]
                block = None if weigh is None or weigh.dim() == 1 else weigh[part, part]
            elif weigh is not None and weigh.dim() == 2 and columns <= _WIDEST:
                importance = weigh[part, part]
            scale, zero = fitting.fit(group, w[:, part], importance, block)
            numbers[:, part] = snap(w[:, part], scale[:, None], zero[:, None], grid)
    return Rounded(fitting.linear(numbers))


def rtn_by_rows(weight: Tensor, grid: Grid) -> tuple[QuantizedLinear, Tensor, Tensor]:
    """As `rtn` where nothing is known of the inputs, for grids whose rows share nothing but a global scale; with the
    error of each row and its power [out], as in `layer_error`.

    A few rows at a time, so that what is made of them stays in the cache and in memory that is used again.
    """
    out_features, in_features = weight.shape
    columns, stored, overall = grid.columns(in_features), scale_dtype(weight, grid), global_scale(weight, grid)
    groups = in_features // columns
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, groups, dtype=stored, device=weight.device)
    zeros = torch.empty(out_features, groups, dtype=torch.uint8, device=weight.device)
    error, power = torch.empty(2, out_features, device=weight.device).unbind()
    step = max(1, _PIECE // in_features) * torch.get_num_threads()
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        w = weight[rows].to(torch.float32).view(-1, groups, columns)
        scale, zero = (x.view(-1, groups, 1) for x in fit_alone(w.view(-1, columns), grid, stored, overall))
        numbers = snap(w, scale, zero, grid)
        codes[rows] = encode(numbers, grid).flatten(1)
        scales[rows] = (scale if overall is None else scale * overall).squeeze(2)  # rounded as they are stored
        zeros[rows] = zero.squeeze(2)
        if grid.uniform:
            numbers -= zero
        error[rows] = numbers.mul_(scale).sub_(w).flatten(1).square_().sum(1)
        power[rows] = w.flatten(1).square().sum(1)  # w may be the weight itself
    return QuantizedLinear(codes, scales, zeros, grid, global_scale=overall), error, power


def column_power(moment: Tensor) -> Tensor:
    """The diagonal [in] of `moment`, X^T X [in, in] or that diagonal itself."""
    return moment if moment.dim() == 1 else moment.diagonal()
