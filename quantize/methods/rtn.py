"""Round to nearest."""

import torch
from torch import Tensor

from ..numbers.block_types import by_size
from ..numbers.grid import scale_dtype, snap
from ..numbers.types import BlockGrid, Grid
from ..recipe.methods import MethodSettings
from .fitting import Fitting
from .rounded import Rounded
from .threads import one_thread

_WIDEST = 256  # columns of a group


def rtn(
    weight: Tensor, grid: Grid, settings: MethodSettings, moment: Tensor | None = None, drift: Tensor | None = None
) -> Rounded:
    """Round `weight` [out, in] to the nearest point of a grid fitted to each group of columns.

    `moment` [in, in] = X^T X, when there is one, measures the error; of it the diagonal [in] alone will do. With
    `scale_search: activation` scales are sought that make the least error in a group's output, by its block of the
    moment; of groups wider than 256 columns only by the diagonal of it: the block would cost more than everything else.
    ggml's types weigh each weight's error by its size too (`ggml.by_size`), and are then chosen by the block.
    """
    in_features, fitting = weight.shape[1], Fitting(weight, grid, scale_dtype(weight, grid))
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


def column_power(moment: Tensor) -> Tensor:
    """The diagonal [in] of X^T X, which may be all that `moment` is."""
    return moment if moment.dim() == 1 else moment.diagonal()
