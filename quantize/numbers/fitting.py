"""Fitting scales and zeros to weights: by min-max, or by a search for the least error."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import ggml_scales as ggml
from .grid import BLOCK, E2M1_MAX, E4M3_MAX, shared_scale, snap
from .types import BlockGrid, Grid

_SHRINKS = tuple(1.0 - 0.05 * i for i in range(13))  # 1.00 … 0.40 of the min-max range
_TRIED = 4  # of these, for all groups; the best is mostly among them
# Floats gain less by clipping, and more by scales above min-max, with which other weights meet the wide gaps below the
# largest number (Four Over Six, arXiv:2512.02010). A twelfth of an octave is less than a step of E4M3, so that none of
# nvfp4's scales between the ends is left out. Min-max itself is first: the first of equals is kept.
_FLOAT_RANGES = (1.0, *(2.0 ** (i / 12) for i in range(-4, 12) if i))
_OCTAVE = tuple(factor for factor in _FLOAT_RANGES if factor >= 1)  # E4M3 repeats itself beyond, but for its ends
_POWERS = (1.0, 2.0, 0.5)  # scales that are powers of two: the rule's own, and its neighbours
_SHIFTS = (-0.12, -0.06, 0.06, 0.12)  # of one end of the range, in widths of it
_WIDE = 2048  # weights that share a scale of FP8, above which its search gains little
SMALLEST_SCALE = 2.0**-17  # of integer grids: exact in both 16-bit types
SMALLEST_FLOAT_SCALE = 2.0**-60
_CHUNK = 1 << 19  # weights searched at a time and thread, so that intermediates stay in cache
_GPU_CHUNK = 1 << 26  # on a GPU, which has no such cache and is fast with many; intermediates take 256 MB each


def global_scale(weight: Tensor, grid: Grid) -> Tensor | None:
    """The factor on scales before they are rounded to E4M3: float32 [...] for weights [..., out, in]; nvfp4 only.

    The largest power of two that keeps the widest range tried, amax / 6 * 1.89, within E4M3. NVIDIA's rule is
    6 * 448 / amax itself; a power of two has an exact inverse, so that formats that store the inverse hold the same
    weights.
    """
    if grid.type != "nvfp4":
        return None
    amax = torch.maximum(weight.amax((-2, -1)), -weight.amin((-2, -1))).to(torch.float32).clamp(min=2.0**-60)
    return torch.exp2(torch.floor(torch.log2(E4M3_MAX * E2M1_MAX / max(_FLOAT_RANGES) / amax)))


def fit(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    overall: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero for each row of `weight` [rows, columns], the columns of one group.

    Min-max is the rule of compressed-tensors (zero always inside the range; `shared_scale` for mxfp). The searches
    try smaller ranges, of floats larger ones too, of 2 and 3 bits both ends separately, and keep the one with the least
    squared error weighted by `importance` [columns] (None: 1, and of 4-bit floats a power above 2), or of the output
    where that is a moment X^T X [columns, columns]. `overall`: the global scale (nvfp4), or super scales and offsets
    [2, rows] (`ggml.fit_super`). Rows that share a scale (tensor, block) get the same one. Returns scales, float32
    [rows] that `dtype` can store exactly, and zeros, float32 [rows], whole numbers except for ggml's types with an
    offset.
    """
    weight = weight.to(torch.float32)
    if isinstance(grid, BlockGrid):
        return ggml.fit_group(weight, grid, importance, overall)
    store = _Store(grid, dtype, overall)
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    shared = {0: len(weight)}.get(grid.group_size, BLOCK) if grid.shares_rows else 1
    if shared > 1:
        low, high = _over_rows(low, shared, torch.amin), _over_rows(high, shared, torch.amax)
    if grid.scale_search == "minmax":
        return _affine(low, high, store)
    scales, zeros = torch.empty_like(low), torch.empty_like(low)
    if weight.is_cuda:
        step = -(-max(1, _GPU_CHUNK // weight.shape[1]) // shared) * shared
    else:
        step = max(1, _CHUNK // weight.shape[1]) * torch.get_num_threads() if shared == 1 else shared
    for r in range(0, weight.shape[0], step):
        rows = slice(r, r + step)
        scales[rows], zeros[rows] = _search(weight[rows], low[rows], high[rows], store, importance, shared)
    return scales, zeros


def fit_alone(weight: Tensor, grid: Grid, dtype: torch.dtype, overall: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `fit`, for all groups of a weight of which nothing else is known. FP8's rows of more than 2,048 get min-max.

    For them the search takes most of the time and gains 2 to 6 % of the squared error, for 512 weights 11 to 14 %.
    """
    if grid.type == "fp8" and weight.shape[1] > _WIDE:
        grid = grid.model_copy(update={"scale_search": "minmax"})
    return fit(weight, grid, dtype, None, overall)


@dataclass(frozen=True)
class _Store:
    """A grid and the scales that can be stored for it."""

    grid: Grid
    dtype: torch.dtype
    overall: Tensor | None

    def nearest(self, scale: Tensor) -> Tensor:
        """The scales (float32) nearest to `scale` that can be stored."""
        if self.overall is not None:
            smallest = 2.0**-9  # of E4M3: a scale of 0 would lose the group, and divide by zero
            scaled = (scale * self.overall).clamp_(smallest, E4M3_MAX)
            return scaled.to(self.dtype).to(torch.float32) / self.overall
        if self.dtype == torch.float8_e8m0fnu:
            return shared_scale(scale * (E4M3_MAX if self.grid.bits == 8 else E2M1_MAX), self.grid)
        # 2^-17 and up, a bfloat16 scale is exact in float16 too, so every format can store it; none divides by zero.
        smallest = SMALLEST_SCALE if self.grid.type == "int" else SMALLEST_FLOAT_SCALE
        return scale.clamp(min=smallest).to(self.dtype).to(torch.float32)


def ranges(grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The ranges that a search tries, relative to min-max, float32 [ranges]; min-max alone where there is none."""
    if grid.scale_search == "minmax":
        return _constant((1.0,), device)
    if dtype == torch.float8_e8m0fnu:
        return _constant(_POWERS, device)
    if grid.type == "int":
        return _constant(_SHRINKS, device)
    return _constant(_OCTAVE if grid.bits == 8 else _FLOAT_RANGES, device)


def end_shifts(grid: Grid, device: torch.device) -> Tensor:
    """How far one end of the range is moved afterwards, float32 [shifts], in widths of it; coarse grids gain by it."""
    coarse = grid.type == "int" and not grid.symmetric and grid.bits <= 3 and grid.scale_search != "minmax"
    return _constant(_SHIFTS if coarse else (), device)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to a device once: every copy of a few numbers waits for the GPU."""
    return torch.tensor(values, dtype=torch.float32).to(device)


def _over_rows(values: Tensor, rows: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each of `values` [n] replaced by the reduction of its run of `rows` values; 0 changes no reduction."""
    if len(values) <= rows:
        return reduce(values, 0).expand_as(values)
    padded = torch.nn.functional.pad(values, (0, -len(values) % rows)).view(-1, rows)
    return reduce(padded, 1).repeat_interleave(rows)[: len(values)]


def _affine(low: Tensor, high: Tensor, store: _Store) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high]; a row of zeros gets scale 1."""
    grid = store.grid
    if grid.type != "int":
        span = torch.maximum(-low, high) / (E4M3_MAX if grid.bits == 8 else E2M1_MAX)
    else:
        span = (torch.maximum(-low, high) * 2 if grid.symmetric else high - low) / grid.levels
    scale = store.nearest(span)
    scale = torch.where((low == 0) & (high == 0), store.nearest(torch.ones_like(scale)), scale)
    if grid.type != "int":
        return scale, torch.zeros_like(scale)
    if grid.symmetric:
        return scale, torch.full_like(scale, float(1 << (grid.bits - 1)))
    return scale, (-low / scale).round_().clamp_(0, grid.levels)


def _steeper(error: Tensor, grid: Grid) -> Tensor:
    """What errors of 4-bit floats cost where nothing is known of the inputs: more than their squares is lower in KL
    (docs/measured.md). llm-compressor's observers take the power of 2.4; for nvfp4, of many ranges, roots are faster.
    """
    size = error.abs_()
    return size.pow_(2.4) if grid.type == "mxfp4" else size.sqrt().sqrt_().mul_(size).mul_(size)


def _offsets(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """`snap` less the zero."""
    if grid.type != "int" or not grid.symmetric:
        return snap(weight, scale, zero, grid).sub_(zero)
    half = 1 << (grid.bits - 1)
    return (weight / scale).round_().clamp_(-half, half - 1)


def _losses(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    ends: tuple[Tensor, Tensor],
    grid: Grid,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`loss` [candidates, rows] of each row of `weight` with each of scales and zeros [candidates, rows].

    Infinite where what a row's smallest and largest weight, its ends [rows], lose by being clipped is more than another
    scale loses.
    """
    losses, (low, high) = torch.full_like(scales, torch.inf), ends
    for i in range(_TRIED):
        losses[i] = loss(scales[i, :, None], zeros[i, :, None], weight)
    least, rest = losses.amin(0), slice(_TRIED, None)
    over = (high - (grid.levels - zeros[rest]) * scales[rest]).clamp_(min=0)
    under = (-zeros[rest] * scales[rest] - low).clamp_(min=0)
    possible = 0.999 * (over.square_() + under.square_()) <= least
    for i, count in enumerate(possible.sum(1).tolist(), _TRIED):
        if 3 * count > 2 * len(weight):  # to pick some rows costs a third of what trying them does
            losses[i] = loss(scales[i, :, None], zeros[i, :, None], weight)
        elif count:
            left = possible[i - _TRIED].nonzero()[:, 0]
            losses[i, left] = loss(scales[i, left, None], zeros[i, left, None], weight.index_select(0, left))
    return losses


def _search(
    weight: Tensor, low: Tensor, high: Tensor, store: _Store, importance: Tensor | None, shared: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range with the least weighted squared error, for each run of `shared` rows."""
    grid = store.grid
    importance = None if importance is None else importance.to(weight.dtype)
    known = importance is not None or grid.type == "int" or grid.bits == 8

    def loss(scale: Tensor, zero: Tensor, rows: Tensor = weight) -> Tensor:
        """Of each of the rows, [rows, 1] each."""
        offsets = _offsets(rows, scale, zero, grid)
        error = torch.addcmul(rows, offsets, scale, value=-1, out=offsets)
        if importance is not None and importance.dim() == 2:
            found = (error @ importance).mul_(error).sum(1)
        else:
            cost = error.square_() if known else _steeper(error, grid)
            found = cost.sum(1) if importance is None else cost @ importance
        return found if shared == 1 else _over_rows(found, shared, torch.sum)

    def best(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ranges [candidates, rows]: scale, zero and loss [rows], the first of equals."""
        scales, zeros = _affine(low, high, store)
        if alone:
            losses = _losses(weight, scales, zeros, ends, grid, loss)
        else:
            losses = torch.stack([loss(*pair) for pair in zip(scales[..., None], zeros[..., None], strict=True)])
        least, at = losses.min(0, keepdim=True)  # four times as fast as argmin, with the same answer
        return scales.gather(0, at)[0], zeros.gather(0, at)[0], least[0]

    ends = low, high
    # On a GPU, which would wait for the host, and where rows weigh columns or share scales, all ranges are tried.
    alone = grid.type == "int" and importance is None and shared == 1 and not weight.is_cuda
    factors = ranges(grid, store.dtype, low.device)[:, None]
    scale, zero, least = best(low * factors, high * factors)
    if (shifts := end_shifts(grid, low.device)).numel():
        width = scale * grid.levels
        near, shifts = -zero * scale, shifts[:, None] * width
        far = near + width
        lows = torch.cat([(near + shifts).clamp_(max=0), near.expand_as(shifts)])
        highs = torch.cat([far.expand_as(shifts), (far + shifts).clamp_(min=0)])
        other_scale, other_zero, other = best(lows, highs)
        scale, zero = torch.where(other < least, other_scale, scale), torch.where(other < least, other_zero, zero)
    return scale, zero
