"""Number grids: snapping weights to codes, and the record every rounder returns.

A grid maps a weight w to a number n of a small set and back to (n - zero) * scale. Integer grids have n = 0 … 2^bits-1,
the unsigned code itself; a symmetric one is the same thing with every zero at 2^(bits-1). Float grids have the numbers
of E4M3 or E2M1 and zero 0; their code is the number's bit pattern. ggml's block types are integer grids with a fixed
zero; those with an offset, (n - zero) * scale - offset, have it fitted as a zero that need not be whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .types import SUPER_BLOCK, Activations, BlockGrid, Grid

__all__ = ["Grid", "Inputs", "QuantizedLinear", "round_numbers_", "scale_dtype", "snap"]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
BLOCK = 128  # rows and columns of a weight that share a scale in fp8-block
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_EXPONENT = 0x7F800000  # the bits of a float32 that hold it


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
