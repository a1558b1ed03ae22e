"""What is done to weights and matrices between products, as Triton kernels that read and write each number once.

Import this module only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numbers.types import Grid
from .column_kernels import Numbers

_SPLIT = 1024  # numbers of a program that splits a row's
_ROWS, _COLUMNS = 32, 32  # of a tile of a weight, which is transposed in registers
_TILES = 8  # of a program that sums up over columns


def split_in_halves(x: Tensor) -> Tensor:
    """Float32 x [matrices, rows, n] as a + b, both of which TF32 holds exactly: [a a b a], [matrices, rows, 4 n].

    The first three times the last three of another, transposed, is x y^T to about 20 bits: a c + a d + b c. a has the
    10 bits of the fraction that TF32 has; of b they leave out at most a 2^21st of x.
    """
    matrices, rows, n = x.shape
    assert x.stride(-1) == 1
    out = torch.empty(matrices, rows, 4 * n, dtype=x.dtype, device=x.device)
    _split_in_halves[(rows, triton.cdiv(n, _SPLIT), matrices)](
        x, out, rows, n, *x.stride()[:2], BLOCK=_SPLIT, num_warps=4
    )
    return out


def columns_first(x: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
    """x [linears, out, in] as [linears, in, out] of `dtype`, column j in the place back[j] of back [linears, in]."""
    linears, rows, columns = x.shape
    assert x.stride(-1) == 1
    assert back.is_contiguous()
    out = torch.empty(linears, columns, rows, dtype=dtype, device=x.device)
    _columns_first[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS), linears)](
        x, back, out, rows, columns, *x.stride()[:2], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
    )
    return out


def rows_first(
    numbers: Tensor,
    back: Tensor,
    group: Tensor,
    scales: tuple[Tensor, Tensor],
    weight: Tensor,
    damping: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of numbers of the grid [linears, in, out], and the weight that they stand for, [linears, out, in] both.

    Column j is at back[j] of `numbers`, and its scale and zero at group[j] of `scales`, [groups, linears, out] float32;
    back, group [linears, in]. weight [linears, out, in]: what was rounded, whose dtype the new one gets. Of each row,
    [linears, out] float32, the squares are summed up of what the weight is changed by, times the column's `damping`
    [linears, in].
    """
    linears, columns, rows = numbers.shape
    scale, zero = scales
    assert weight.stride(-1) == 1
    assert all(x.is_contiguous() for x in (numbers, back, group, scale, zero, damping))
    assert max(rows * columns, rows * weight.stride(1), scale.numel()) < 1 << 31
    chunks = triton.cdiv(columns, _COLUMNS * _TILES)
    codes = torch.empty(linears, rows, columns, dtype=torch.uint8, device=numbers.device)
    rounded = torch.empty(linears, rows, columns, dtype=weight.dtype, device=numbers.device)
    lost = torch.empty(linears, chunks, rows, dtype=torch.float32, device=numbers.device)
    n = Numbers.of(grid)
    _rows_first[(triton.cdiv(rows, _ROWS), chunks, linears)](
        numbers, back, group, scale, zero, weight, damping, codes, rounded, lost, rows, columns, scale.stride(0),
        *weight.stride()[:2],
        UNIFORM=n.uniform, MANTISSA=n.mantissa, NORMAL=n.normal, SIGN=grid.bits - 1,
        ROWS=_ROWS, COLUMNS=_COLUMNS, TILES=_TILES, num_warps=4,
    )  # fmt: skip
    return codes, rounded, lost.sum(1)


@triton.jit
def _columns_first(x, back, out, rows, columns, x_linear, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    linear = tl.program_id(2).to(tl.int64)
    x += linear * x_linear + row[:, None].to(tl.int64) * x_row + column[None, :]
    value = tl.load(x, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    place = linear * columns + tl.load(back + linear * columns + column, mask=column < columns, other=0)
    here = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out + place[:, None] * rows + row[None, :], tl.trans(value).to(out.dtype.element_ty), mask=here)


@triton.jit
def _code(number, UNIFORM: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr, SIGN: tl.constexpr):
    """As `encode`: the number itself, or the bits of the small float, its sign at bit SIGN."""
    if UNIFORM:
        return number.to(tl.uint8)
    else:
        size = tl.abs(number)
        bits = size.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
        first = tl.full([], NORMAL, tl.float32).to(tl.int32, bitcast=True) >> (23 - MANTISSA)
        code = tl.where(size < NORMAL, (size * ((1 << MANTISSA) / NORMAL)).to(tl.int32), bits - first + (1 << MANTISSA))
        sign = (number.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
        return (code | (sign << SIGN)).to(tl.uint8)


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x in the dtype of a weight; to bfloat16 by hand: the interpreter's cast does not round."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def _rows_first(
    numbers, back, group, scales, zeros, weight, damping, codes, rounded, lost, rows, columns, scale_group,
    weight_linear, weight_row,
    UNIFORM: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr, SIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    linear = tl.program_id(2).to(tl.int64)
    back += linear * columns
    group += linear * columns
    damping += linear * columns
    numbers += linear * columns * rows
    weight += linear * weight_linear
    scales += linear * rows
    zeros += linear * rows
    codes += linear * rows * columns
    rounded += linear * rows * columns
    total = tl.zeros([ROWS], dtype=tl.float32)
    for tile in range(TILES):
        column = (tl.program_id(1) * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)
        known = column < columns
        here = known[:, None] & (row < rows)[None, :]
        # Offsets of 32 bits, of which the registers hold twice as many.
        place = tl.load(back + column, mask=known, other=0).to(tl.int32)
        at = (tl.load(group + column, mask=known, other=0).to(tl.int32) * scale_group)[:, None] + row[None, :]
        number = tl.load(numbers + place[:, None] * rows + row[None, :], mask=here, other=0.0).to(tl.float32)
        value = number
        if UNIFORM:
            value -= tl.load(zeros + at, mask=here, other=0.0)
        value = tl.trans(value * tl.load(scales + at, mask=here, other=0.0))
        code = tl.trans(_code(number, UNIFORM, MANTISSA, NORMAL, SIGN))
        here = (row < rows)[:, None] & known[None, :]
        out = row[:, None] * columns + column[None, :]
        tl.store(codes + out, code, mask=here)
        tl.store(rounded + out, _stored(value, rounded.dtype.element_ty), mask=here)
        before = tl.load(weight + row[:, None] * weight_row + column[None, :], mask=here, other=0.0)
        off = value - before.to(tl.float32)
        total += tl.sum(off * off * tl.load(damping + column, mask=known, other=0.0)[None, :], axis=1)
    tl.store(lost + (linear * tl.num_programs(1) + tl.program_id(1)) * rows + row, total, mask=row < rows)


@triton.jit
def _split_in_halves(x, out, rows, n, x_matrix, x_row, BLOCK: tl.constexpr):
    row, matrix = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < n
    value = tl.load(x + matrix * x_matrix + row * x_row + column, mask=here, other=0.0)
    high = (value.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    out += (matrix * rows + row) * 4 * n + column
    tl.store(out, high, mask=here)
    tl.store(out + n, high, mask=here)
    tl.store(out + 2 * n, value - high, mask=here)
    tl.store(out + 3 * n, high, mask=here)
