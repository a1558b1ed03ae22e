"""Number grids: fitting scales, snapping weights to codes, and the record every rounder returns.

A grid maps a weight w to a number n of a small set and back to (n - zero) * scale. Integer grids have n = 0 … 2^bits-1,
the unsigned code itself; a symmetric one is the same thing with every zero at 2^(bits-1). Float grids have the numbers
of E4M3 or E2M1 and zero 0; their code is the number's bit pattern. ggml's block types are integer grids with a fixed
zero; those with an offset, (n - zero) * scale - offset, have it fitted as a zero that need not be whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import ggml_scales as ggml
from .types import SUPER_BLOCK, Activations, BlockGrid, Grid

__all__ = ["Grid", "Inputs", "QuantizedLinear", "fit", "global_scale", "round_numbers_", "scale_dtype", "snap"]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
BLOCK = 128  # rows and columns of a weight that share a scale in fp8-block
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SHRINKS = tuple(1.0 - 0.05 * i for i in range(13))  # 1.00 … 0.40 of the min-max range
# Floats gain less by clipping, and more by scales above min-max, with which other weights meet the wide gaps below the
# largest number (Four Over Six, arXiv:2512.02010). A twelfth of an octave is less than a step of E4M3, so that none of
# nvfp4's scales between the ends is left out. Min-max itself is first: the first of equals is kept.
_FLOAT_RANGES = (1.0, *(2.0 ** (i / 12) for i in range(-4, 12) if i))
_OCTAVE = tuple(factor for factor in _FLOAT_RANGES if factor >= 1)  # E4M3 repeats itself beyond, but for its ends
_POWERS = (1.0, 2.0, 0.5)  # scales that are powers of two: the rule's own, and its neighbours
_SHIFTS = (-0.12, -0.06, 0.06, 0.12)  # of one end of the range, in widths of it
_WIDE = 2048  # weights that share a scale of FP8, above which its search gains little
_EXPONENT = 0x7F800000  # the bits of a float32 that hold it
SMALLEST_SCALE = 2.0**-17  # of integer grids: exact in both 16-bit types
SMALLEST_FLOAT_SCALE = 2.0**-60
_CHUNK = 1 << 18  # weights searched at a time and thread, so that intermediates stay in cache
_GPU_CHUNK = 1 << 26  # on a GPU, which has no such cache and is fast with many; intermediates take 256 MB each


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a linear are rounded at run time; `scale` float32 [] and `zero` [] where they are static.

    columns: values of a token that share a dynamic scale, 0 for all of them. For nvfp4 `scale` is the global scale,
    a power of two that the E4M3 scales were multiplied by before rounding.
    """

    spec: Activations
    columns: int = 0
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True)
class QuantizedLinear:
    """The rounded weight of one linear layer, unpacked: what every rounder returns and every format packs.

    codes [out, in] uint8; scales [out, groups] in the dtype that is stored, [1, 1] for one scale a tensor and
    [out / 128, in / 128] rounded up for fp8-block; zeros uint8 like scales; g_idx [in] int32, the group of each column,
    or None when column j is in group j // group_size. global_scale: nvfp4 only, float32 [], a power of two that the
    scales were multiplied by before they were rounded to E4M3. inputs: None where inputs stay in 16 bit.
    offsets, shaped like scales: what ggml's asymmetric types subtract from each weight. In the K types scales (int16)
    and offsets are whole numbers, in units of `supers` float16 [1 or 2, out, in / 256]: the super scales and, with
    offsets, the super offsets.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grid: Grid
    g_idx: Tensor | None = None
    global_scale: Tensor | None = None
    inputs: Inputs | None = None
    offsets: Tensor | None = None
    supers: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def column_groups(self) -> Tensor:
        """The group of each column, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.codes.device) // self.grid.columns(self.in_features)

    def step(self) -> Tensor:
        """The scale of each weight, float32, broadcastable to [out, in]: what one unit of its code is worth."""
        scales = self.scales.to(torch.float32)
        if self.global_scale is not None:
            scales = scales / self.global_scale
        if self.supers is not None:
            scales = scales * self._over_groups(self.supers[0])
        if self.grid.type == "fp8-block":
            scales = scales.repeat_interleave(BLOCK, 0)[: self.out_features]
        return self._over_columns(scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]: (number - zero) * scale - offset, computed in float32."""
        numbers = decode(self.codes, self.grid)
        if self.grid.uniform:
            numbers -= self._over_columns(self.zeros)
        numbers.mul_(self.step())
        if self.offsets is not None:
            offsets = self.offsets.to(torch.float32)
            if self.supers is not None:
                offsets = offsets * self._over_groups(self.supers[1])
            numbers -= self._over_columns(offsets)
        return numbers.to(dtype)

    def _over_columns(self, values: Tensor) -> Tensor:
        """One of `values` [out, groups] for each column, float32 [out, in]."""
        values, columns = values.to(torch.float32), self.grid.columns(self.in_features)
        if self.g_idx is not None or self.in_features % columns:
            return values[:, self.column_groups()]
        return values.repeat_interleave(columns, 1)

    def _over_groups(self, supers: Tensor) -> Tensor:
        """One of `supers` [out, in / 256] for each group, float32 [out, groups]."""
        return supers.to(torch.float32).repeat_interleave(SUPER_BLOCK // self.grid.group_size, 1)

    def rows(self, start: int, stop: int) -> "QuantizedLinear":
        """Output rows [start, stop), to separate linears that were solved in one stack.

        fp8-block, whose scales are shared by blocks of rows, only allows all rows.
        """
        whole = self.scales.shape[0] == 1 or (start, stop) == (0, self.out_features)
        assert whole or self.grid.type != "fp8-block"
        part = slice(None) if whole else slice(start, stop)
        return replace(
            self,
            codes=self.codes[start:stop].contiguous(),
            scales=self.scales[part].contiguous(),
            zeros=self.zeros[part].contiguous(),
            offsets=None if self.offsets is None else self.offsets[part].contiguous(),
            supers=None if self.supers is None else self.supers[:, part].contiguous(),
        )


def stacked_rows(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One linear out of parts of its rows, the reverse of `rows`; of grids whose rows share nothing."""

    def joined(name: str, dim: int = 0) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim)

    return replace(
        parts[0],
        codes=joined("codes"), scales=joined("scales"), zeros=joined("zeros"),
        offsets=joined("offsets"), supers=joined("supers", 1),
    )  # fmt: skip


def scale_dtype(weight: Tensor, grid: Grid) -> torch.dtype:
    """The dtype the scales of a weight are stored in.

    For integers the model's own 16-bit dtype, float16 for a float32 model; E4M3, E8M0, float16 or int16 where the type
    prescribes it; for fp8 a dtype with float32's range, since its scales may be too small for float16.
    """
    if isinstance(grid, BlockGrid):
        return torch.int16 if grid.nested else torch.float16
    if grid.type == "nvfp4":
        return torch.float8_e4m3fn
    if grid.type in ("mxfp4", "mxfp8"):
        return torch.float8_e8m0fnu
    if weight.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float16 if grid.type == "int" else torch.float32


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


def snap(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Numbers of the grid (float32) nearest to `weight`; `scale` and `zero` broadcast against it."""
    numbers = weight / scale
    if isinstance(grid, BlockGrid):  # a zero that is not whole is added before rounding
        return numbers.add_(zero).round_().clamp_(0, grid.levels)
    if grid.type == "int":
        return numbers.round_().add_(zero).clamp_(0, grid.levels)
    return round_numbers_(numbers, grid)


def round_numbers_(numbers: Tensor, grid: Grid) -> Tensor:
    """Round float32 `numbers`, weights in units of their scale (zero added), to the grid in place; ties to even."""
    if grid.uniform:
        return numbers.round_().clamp_(0, grid.levels)
    smallest, bits, largest = (2.0**-6, 3, E4M3_MAX) if grid.bits == 8 else (1.0, 1, E2M1_MAX)  # normal; of mantissa
    # Equal to a cast, where torch has one, and four times as fast: the step is the power of two below, shifted.
    power = numbers.abs().clamp_(smallest, largest).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    step = power.mul_(2.0**-bits)
    return numbers.div_(step).round_().mul_(step).clamp_(-largest, largest)


def encode(numbers: Tensor, grid: Grid) -> Tensor:
    """Numbers of the grid (float32) -> codes uint8: the number itself, the E4M3 byte, or the E2M1 nibble."""
    if grid.uniform:  # on a CPU four times as fast as at once
        return (numbers.to(torch.int16) if numbers.device.type == "cpu" else numbers).to(torch.uint8)
    if grid.bits == 8:
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    size = numbers.abs()  # 0, 0.5, … 2 are codes 0 to 4, then 3, 4 and 6
    codes = (size * 2).clamp_(max=4).add_((size - 2).clamp_(0, 2)).add_((size - 4).clamp_(min=0).mul_(0.5))
    return codes.add_(torch.signbit(numbers), alpha=8).to(torch.uint8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 -> numbers of the grid, float32."""
    if grid.uniform:
        return codes.to(torch.float32)
    if grid.bits == 8:
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    table = torch.cat([_E2M1, -_E2M1]).to(codes.device)
    return table[codes.long()]


def shared_scale(amax: Tensor, grid: Grid) -> Tensor:
    """The power-of-two scale of a group of mxfp8 or mxfp4 numbers whose largest is `amax`.

    Its exponent is that of amax less that of the type's largest number (OCP Microscaling v1.0, 6.3), and one more where
    the mantissa of amax is 1.75 or more, as in compressed-tensors: the types end at 1.75 * 2^8 and 1.5 * 2^2.
    """
    exponent = 8 if grid.bits == 8 else 2
    return torch.exp2(torch.floor(torch.log2(amax.clamp(min=2.0**-100) * (2 / 1.75))) - exponent)


def collapse(scales: Tensor, grid: Grid) -> Tensor:
    """Scales (or zeros) [out, groups], one a row, reduced to what is stored: one a block of rows, or one in all."""
    if grid.group_size == 0:
        return scales[:1, :1]
    return scales[::BLOCK] if grid.type == "fp8-block" else scales


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


def _search(
    weight: Tensor, low: Tensor, high: Tensor, store: _Store, importance: Tensor | None, shared: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range with the least weighted squared error, for each run of `shared` rows."""
    grid = store.grid
    importance = None if importance is None else importance.to(weight.dtype)
    known = importance is not None or grid.type == "int" or grid.bits == 8

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        """Of each row, [rows, 1] each."""
        error = torch.addcmul(weight, snap(weight, scale, zero, grid).sub_(zero), scale, value=-1)
        if importance is not None and importance.dim() == 2:
            found = (error @ importance).mul_(error).sum(1)
        else:
            cost = error.square_() if known else _steeper(error, grid)
            found = cost.sum(1) if importance is None else cost @ importance
        return found if shared == 1 else _over_rows(found, shared, torch.sum)

    def best(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ranges [candidates, rows]: scale, zero and loss [rows], the first of equals."""
        scales, zeros = _affine(low, high, store)
        losses = torch.stack([loss(*pair) for pair in zip(scales[..., None], zeros[..., None], strict=True)])
        at = losses.argmin(0, keepdim=True)
        scale, zero, least = (x.gather(0, at)[0] for x in (scales, zeros, losses))
        return scale, zero, least

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
