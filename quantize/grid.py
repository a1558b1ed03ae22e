"""Number grids: fitting scales, snapping weights to codes, and the record every rounder returns.

A grid maps a weight w to an unsigned code c in [0, 2^bits - 1] and back to (c - zero) * scale. A symmetric grid is
the same thing with every zero at 2^(bits-1).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .recipe import Grid

__all__ = ["Grid", "QuantizedLinear", "fit", "scale_dtype", "snap"]

_SHRINKS = tuple(1.0 - 0.05 * i for i in range(13))  # 1.00 … 0.40 of the min-max range
_SMALLEST_SCALE = 2.0**-17
_CHUNK = 1 << 20  # weights searched at a time, so that the candidates stay in cache


@dataclass(frozen=True)
class QuantizedLinear:
    """The rounded weight of one linear layer, unpacked: what every rounder returns and every format packs.

    codes [out, in] uint8; scales [out, groups] in the dtype that is stored; zeros [out, groups] uint8;
    g_idx [in] int32, the group of each column, or None when column j is in group j // group_size.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grid: Grid
    g_idx: Tensor | None = None

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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] the artifact stands for: (codes - zeros) * scales, multiplied in float32."""
        groups = self.column_groups()
        codes = self.codes.to(torch.float32) - self.zeros.to(torch.float32)[:, groups]
        return codes.mul_(self.scales.to(torch.float32)[:, groups]).to(dtype)

    def stored_bits(self) -> int:
        """Bits this layer needs: codes, scales, zeros (asymmetric only) and g_idx (when columns are shuffled)."""
        bits = self.codes.numel() * self.grid.bits + self.scales.numel() * self.scales.element_size() * 8
        if not self.grid.symmetric:
            bits += self.zeros.numel() * self.grid.bits
        return bits + (0 if self.g_idx is None else 32 * self.in_features)

    def rows(self, start: int, stop: int) -> "QuantizedLinear":
        """Output rows [start, stop): linears solved together are taken apart again with this."""
        return replace(
            self,
            codes=self.codes[start:stop].contiguous(),
            scales=self.scales[start:stop].contiguous(),
            zeros=self.zeros[start:stop].contiguous(),
        )


def scale_dtype(weight: Tensor) -> torch.dtype:
    """The dtype scales are stored in: the model's own 16-bit dtype, float16 for a float32 model."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16


def fit(weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero for each row of `weight` [rows, columns], one group of columns a row.

    Min-max is the rule of compressed-tensors (zero always inside the range). `scale_search: mse` tries smaller
    ranges, both ends separately at 2 and 3 bits, and keeps the one with the least squared error weighted by
    `importance` [columns] (1 when None). Returns float32 [rows] scales, already rounded to `dtype`, and zeros.
    """
    weight = weight.to(torch.float32)
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    if grid.scale_search == "minmax":
        return _affine(low, high, grid, dtype)
    scales, zeros = torch.empty_like(low), torch.empty_like(low)
    step = max(1, _CHUNK // weight.shape[1] // 4)
    for r in range(0, weight.shape[0], step):
        rows = slice(r, r + step)
        scales[rows], zeros[rows] = _search(weight[rows], low[rows], high[rows], grid, dtype, importance)
    return scales, zeros


def snap(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes (float32, whole numbers) nearest to `weight`; `scale` and `zero` broadcast against it."""
    return (weight / scale).round_().add_(zero).clamp_(0, grid.levels)


def _affine(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high]; a row of zeros gets scale 1."""
    scale = (torch.maximum(-low, high) * 2 if grid.symmetric else high - low) / grid.levels
    # 2^-17 and up, a bfloat16 scale is exact in float16 too, so every format can store it; and none divides by zero.
    scale = scale.clamp_(min=_SMALLEST_SCALE).to(dtype).to(torch.float32)
    scale = torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)
    if grid.symmetric:
        return scale, torch.full_like(scale, float(1 << (grid.bits - 1)))
    return scale, (-low / scale).round_().clamp_(0, grid.levels)


def _search(
    weight: Tensor, low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The candidate range with the least weighted squared error, row by row."""
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best, best_scale, best_zero
        error = snap(weight, scale[:, None], zero[:, None], grid).sub_(zero[:, None]).mul_(scale[:, None])
        error = error.sub_(weight).square_()
        loss = error.sum(1) if importance is None else error @ importance.to(error.dtype)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)

    for shrink in _SHRINKS:
        consider(*_affine(low * shrink, high * shrink, grid, dtype))
    if not grid.symmetric and grid.bits <= 3:  # coarse grids gain from clipping one end only
        width = best_scale * grid.levels
        near, far = -best_zero * best_scale, -best_zero * best_scale + width
        for shift in (-0.12, -0.06, 0.06, 0.12):
            consider(*_affine((near + shift * width).clamp(max=0), far, grid, dtype))
            consider(*_affine(near, (far + shift * width).clamp(min=0), grid, dtype))
    return best_scale, best_zero
