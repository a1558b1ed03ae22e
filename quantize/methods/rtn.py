"""Round to nearest."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from ..core.machine import one_thread
from ..core.products import no_16_bit_products
from ..numbers.fitting import fit_alone, global_scale
from ..numbers.ggml_scales import by_size
from ..numbers.grid import E4M3_MAX, QuantizedLinear, encode, scale_dtype, snap
from ..numbers.types import BlockGrid, Grid
from ..plugin import MethodSettings
from .group_scales import GroupScales
from .rounded import Rounded

_PIECE = 1 << 19  # weights rounded at a time where rows are independent
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


class Rows(Protocol):
    """A weight [out, in], or what reads rows of one."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@no_16_bit_products()
def rtn_by_rows(weight: Rows, grid: Grid, memory: Tensor | None = None) -> tuple[QuantizedLinear, Tensor, Tensor]:
    """As `rtn` where nothing is known of the inputs, for grids whose rows share nothing but a global scale; with the
    error of each row and its power [out], as in `layer_error`.

    A few rows at a time, so that what is made of them stays in the cache and in memory that is used again. On a CPU
    every thread has rows of its own, and all give the same as one. memory [out, in] uint8: for the codes.
    """
    out_features, in_features = weight.shape
    columns, stored = grid.columns(in_features), scale_dtype(weight[:0], grid)
    overall = global_scale(weight[:], grid) if grid.type == "nvfp4" else None
    groups = in_features // columns
    codes = (
        torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device) if memory is None else memory
    )
    scales = torch.empty(out_features, groups, dtype=stored, device=weight.device)
    zeros = torch.empty(out_features, groups, dtype=torch.uint8, device=weight.device)
    error, power = torch.empty(2, out_features, device=weight.device).unbind()
    step = max(1, _PIECE // in_features)

    def round_(start: int) -> None:
        rows = slice(start, min(start + step, out_features))
        w = weight[rows].to(torch.float32).view(-1, groups, columns)
        scale, zero = (x.view(-1, groups, 1) for x in fit_alone(w.view(-1, columns), grid, stored, overall))
        numbers, coded = _snap_and_encode(w, scale, zero, grid)
        codes[rows] = coded.flatten(1)
        scales[rows] = (scale if overall is None else scale * overall).squeeze(2)  # rounded as they are stored
        zeros[rows] = zero.squeeze(2)
        if grid.uniform:
            numbers -= zero
        error[rows] = numbers.mul_(scale).sub_(w).flatten(1).square_().sum(1)
        power[rows] = torch.mul(w, w, out=numbers).flatten(1).sum(1)  # w may be the weight itself

    _for_each(round_, range(0, out_features, step), torch.get_num_threads() if weight.device.type == "cpu" else 1)
    return QuantizedLinear(codes, scales, zeros, grid, global_scale=overall), error, power


def _for_each(do: Callable[[int], None], values: Sequence[int], threads: int) -> None:
    """Call `do` with each of `values`, in threads that compute on one core each."""
    if threads == 1 or len(values) < 2:
        for value in values:
            do(value)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(do, values):
            pass


def _snap_and_encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The numbers that `snap` gives, and the codes that `encode` gives for them."""
    if grid.bits != 8 or grid.uniform or weight.device.type != "cpu":
        numbers = snap(weight, scale, zero, grid)
        return numbers, encode(numbers, grid)
    codes = (weight / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    # Back again, thirty times as fast as torch's own cast: as float16, whose exponent is one bit longer and its bias
    # larger by 8, the bits of E4M3 are the number's 256th part.
    bits = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).to(torch.float32).mul_(256), codes.view(torch.uint8)


def column_power(moment: Tensor) -> Tensor:
    """The diagonal [in] of `moment`, X^T X [in, in] or that diagonal itself."""
    return moment if moment.dim() == 1 else moment.diagonal()
