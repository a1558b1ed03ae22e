"""GPTQ's inner loops as Triton kernels: columns rounded one after another, and the search for a group's scales.

Weights are laid out columns first, [linears, columns, rows], so that a program, one warp with a row a lane, reads and
writes whole lines. Import this module only where Triton is installed; `gptq` and `numbers.grid.fit` are the reference.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numbers.fitting import SMALLEST_FLOAT_SCALE, SMALLEST_SCALE, end_shifts, ranges
from ..numbers.grid import E2M1_MAX, E4M3_MAX
from ..numbers.types import BlockGrid, Grid

COLUMNS = 128  # solved in one launch; the errors of all of them stay in a lane's registers
_ROWS = 32  # of a program: a lane each

# What a scale is rounded to when it is stored.
_STORES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e8m0fnu: 4,
}


@dataclass(frozen=True)
class Numbers:
    """A grid as the kernels see it. Codes 0 … largest of an integer grid, or floats with `mantissa` bits up to
    `largest`, whose smallest normal number is `normal`.
    """

    uniform: bool
    largest: float
    mantissa: int = 0
    normal: float = 1.0

    @classmethod
    def of(cls, grid: Grid) -> "Numbers":
        if grid.uniform:
            return cls(True, float(grid.levels))
        return cls(False, E4M3_MAX, 3, 2.0**-6) if grid.bits == 8 else cls(False, E2M1_MAX, 1, 1.0)


def solve_columns(
    fed: Tensor,
    inside: Tensor,
    variance: Tensor,
    scales: Tensor,
    zeros: Tensor,
    error: Tensor,
    numbers: Tensor,
    squares: Tensor,
    grid: Grid,
    lead: Tensor | None = None,
    strength: float = 1.0,
) -> None:
    """Round the columns in `error` [linears, columns, rows] one by one, each with feedback of those before it.

    fed: the feedback on each column of all columns before these. inside [linears, columns, columns]: how much of what
    column i loses is fed to column k, at [k, i], read for i < k. scales, zeros: as `error`, or one for all its columns.
    Fills `numbers`, and puts in the place of each column what it loses; both are views with rows next to each other. To
    `squares` [linears, rows] the squared error of each updated column is added, times its `variance` [linears,
    columns]. lead, as `error`: the part of `fed` that corrects the weight, `strength` times what corrects it fully; of
    each column the square is then that of its error against the full correction, less the full correction's own. At
    most COLUMNS columns.
    """
    linears, columns, rows = error.shape
    width = max(16, triton.next_power_of_2(columns))
    assert columns <= COLUMNS
    assert all(x.stride(-1) == 1 for x in (fed, inside, variance, scales, error, numbers, squares))
    assert scales.stride() == zeros.stride()
    assert error.stride() == numbers.stride()
    assert lead is None or lead.stride() == error.stride()
    n = Numbers.of(grid)
    _solve_columns[(triton.cdiv(rows, _ROWS), linears)](
        fed, inside, variance, scales, zeros, error, numbers, squares, error if lead is None else lead, rows,
        2.0 / strength, *fed.stride()[:2], *inside.stride()[:2], variance.stride(0),
        scales.stride(0), scales.stride(1) if scales.shape[1] > 1 else 0, *error.stride()[:2], squares.stride(0),
        UNIFORM=n.uniform, LARGEST=n.largest, MANTISSA=n.mantissa, NORMAL=n.normal,
        COLUMNS=columns, WIDTH=width, ROWS=_ROWS, LED=lead is not None, num_warps=1,
    )  # fmt: skip


def can_fit(grid: Grid) -> bool:
    """Whether `fit_scales` knows the grid: rows do not share scales, and it is none of ggml's types."""
    return not isinstance(grid, BlockGrid) and not grid.shares_rows


def fit_scales(
    columns: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    importance: Tensor | None,
    overall: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Find the scales of one group: `columns` [linears, columns, rows], rows next to each other.

    As `numbers.grid.fit`, for every linear with its own importance [linears, columns] and global scale `overall`
    [linears], where there are any. out: the scale, the zero and the largest size of each row [linears, rows] float32.
    """
    linears, count, rows = columns.shape
    n = Numbers.of(grid)
    factors, shifts = ranges(grid, dtype, columns.device), end_shifts(grid, columns.device)
    scale, zero, largest = out
    none = scale  # a pointer that is not read
    assert columns.stride(2) == 1
    assert all(part.is_contiguous() for part in out)
    assert importance is None or importance.stride(1) == 1
    _fit_scales[(triton.cdiv(rows, _ROWS), linears)](
        columns, none if importance is None else importance, none if overall is None else overall.contiguous(),
        factors, shifts, scale, zero, largest,
        rows, *columns.stride()[:2], 0 if importance is None else importance.stride(0),
        COUNT=count, WEIGHTED=importance is not None,
        INTEGER=grid.type == "int", SYMMETRIC=grid.symmetric, BITS=grid.bits,
        LARGEST=n.largest, MANTISSA=n.mantissa, NORMAL=n.normal,
        STORE=_STORES[dtype], SMALLEST=SMALLEST_SCALE if grid.type == "int" else SMALLEST_FLOAT_SCALE,
        RANGES=factors.numel(), RANGES_PADDED=triton.next_power_of_2(factors.numel()), SHIFTS=shifts.numel(),
        ROWS=_ROWS, num_warps=1,
    )  # fmt: skip


@triton.jit
def _divided(x, y):
    """x / y to the nearest number, which `/` alone is not; in float64, which only tests use, Triton has no other."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _nearest_whole(x):
    """Ties to even, for |x| < 2^22: float32 has no room for a fraction beside 1.5 * 2^23."""
    magic = 6755399441055744.0 if x.dtype == tl.float64 else 12582912.0
    return (x + magic) - magic


@triton.jit
def _nearest_float(x, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr):
    """The nearest number of a small float type: those near x are multiples of a power of two. Keeps the sign of 0."""
    size = tl.minimum(tl.abs(x), LARGEST, propagate_nan=tl.PropagateNan.ALL)
    power = (tl.maximum(size, NORMAL).to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = power * (12582912.0 / (1 << MANTISSA))
    size = (size + magic) - magic
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (size.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN, so that it is found later."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _snap(x, UNIFORM: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr):
    """The grid's number nearest to x, a weight in units of its scale with the zero added."""
    if UNIFORM:
        return _clamp(_nearest_whole(_clamp(x, -1.0, LARGEST + 1.0)), 0.0, LARGEST)
    else:
        return _nearest_float(x.to(tl.float32), LARGEST, MANTISSA, NORMAL)


@triton.jit
def _solve_columns(
    fed, inside, variance, scales, zeros, error, numbers, squares, lead, rows, twice,
    fed_linear, fed_column, inside_linear, inside_column, variance_linear, scale_linear, scale_column,
    error_linear, error_column, square_linear,
    UNIFORM: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LED: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one linear. `errors` [4, WIDTH / 4, ROWS] holds the columns that are done, else 0.

    twice: 2 / strength.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    linear = tl.program_id(1).to(tl.int64)
    here = row < rows
    # In quarters, so that a sum is four short chains of additions, not one as long as the block.
    earlier = tl.arange(0, 4)[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
    known = earlier < COLUMNS
    fed += linear * fed_linear
    inside += linear * inside_linear
    variance += linear * variance_linear
    scales += linear * scale_linear
    zeros += linear * scale_linear
    error += linear * error_linear
    numbers += linear * error_linear
    squares += linear * square_linear
    lead += linear * error_linear
    at_scale, at_error = row, row  # offsets that two tensors share: registers are scarce
    total = tl.load(squares + row, mask=here, other=0.0)
    errors = tl.zeros([4, WIDTH // 4, ROWS], dtype=fed.dtype.element_ty)
    # What the next column needs is read while this one is computed.
    r = tl.load(fed + row, mask=here, other=0.0)
    before = tl.load(error + at_error, mask=here, other=0.0)
    scale = tl.load(scales + at_scale, mask=here, other=1.0)
    zero = tl.load(zeros + at_scale, mask=here, other=0.0)
    feedback = tl.load(inside + earlier, mask=known, other=0.0)
    led = tl.load(lead + at_error, mask=here, other=0.0) if LED else before
    for j in range(COLUMNS):
        fed += fed_column
        at_scale += scale_column
        inside += inside_column
        more = j + 1 < COLUMNS
        next_before = tl.load(error + at_error + error_column, mask=here & more, other=0.0)
        next_fed = tl.load(fed + row, mask=here & more, other=0.0)
        next_scale = tl.load(scales + at_scale, mask=here & more, other=1.0)
        next_zero = tl.load(zeros + at_scale, mask=here & more, other=0.0)
        next_feedback = tl.load(inside + earlier, mask=known & more, other=0.0)
        next_led = tl.load(lead + at_error + error_column, mask=here & more, other=0.0) if LED else next_before
        r += tl.sum(tl.sum(errors * feedback[:, :, None], axis=1), axis=0)
        w = before + r + zero * scale
        number = _snap(_divided(w, scale.to(w.dtype)), UNIFORM, LARGEST, MANTISSA, NORMAL).to(w.dtype)
        off = w - number * scale
        if LED:  # the difference of two squares, each of which may be much larger
            own = off - led
            total += own * (own + twice * led) * tl.load(variance + j)
        else:
            total += off * off * tl.load(variance + j)
        lost = off - r
        errors = tl.where((earlier == j)[:, :, None], lost[None, None, :], errors)
        tl.store(numbers + at_error, number, mask=here)
        tl.store(error + at_error, lost, mask=here)
        at_error += error_column
        r, before, scale, zero, feedback = next_fed, next_before, next_scale, next_zero, next_feedback
        led = next_led
    tl.store(squares + row, total, mask=here)


@triton.jit
def _stored(scale, overall, STORE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The scales nearest to `scale` that can be stored; STORE as in _STORES."""
    if STORE == 3:
        return tl.div_rn(_nearest_float(_clamp(scale * overall, 0.001953125, 448.0), 448.0, 3, 0.015625), overall)
    elif STORE == 4:  # powers of two by the rule of `shared_scale`
        size = tl.maximum(scale * LARGEST, 7.888609052210118e-31) * 1.1428571428571428
        power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return power * (0.00390625 if LARGEST == 448.0 else 0.25)
    else:
        scale = tl.maximum(scale, SMALLEST)
        if STORE == 1:  # by hand: the interpreter's cast to bfloat16 does not round
            bits = scale.to(tl.uint32, bitcast=True)
            scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        elif STORE == 2:
            scale = scale.to(tl.float16).to(tl.float32)
        return scale


@triton.jit
def _scale_and_zero(
    low, high, overall, INTEGER: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr,
    STORE: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """The grid that spans [low, high]; a row of zeros gets scale 1."""
    if INTEGER and not SYMMETRIC:
        span = high - low
    elif INTEGER:
        span = tl.maximum(-low, high) * 2.0
    else:
        span = tl.maximum(-low, high)
    span = tl.where((low == 0) & (high == 0), LARGEST, span)
    scale = _stored(tl.div_rn(span, tl.zeros_like(span) + LARGEST), overall, STORE, SMALLEST, LARGEST)
    zero = tl.zeros_like(scale)
    if INTEGER and SYMMETRIC:
        zero += 1 << (BITS - 1)
    elif INTEGER:
        zero = _clamp(_nearest_whole(_clamp(tl.div_rn(-low, scale), -1.0, LARGEST + 1.0)), 0.0, LARGEST)
    return scale, zero


@triton.jit
def _losses(
    columns, importance, column_stride, row, here, scale, zero,
    COUNT: tl.constexpr, WEIGHTED: tl.constexpr, INTEGER: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """The weighted squared error [ranges, rows] of rounding all columns by each scale and zero [ranges, rows]."""
    total = tl.zeros_like(scale)
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    for j in range(COUNT):
        w = tl.load(columns + row, mask=here, other=0.0).to(tl.float32)[None, :]
        columns += column_stride
        if INTEGER:
            number = _clamp(_nearest_whole(_clamp(w * inverse, -LARGEST - 1.0, LARGEST + 1.0)) + zero, 0.0, LARGEST)
        else:
            number = _nearest_float(w * inverse, LARGEST, MANTISSA, NORMAL)
        off = w - (number - zero) * scale
        if WEIGHTED:
            total += off * off * tl.load(importance + j)
        else:
            total += off * off
    return total


@triton.jit
def _chosen(values, at, index):
    """The value of each row [rows] at its index `at` of the ranges."""
    return tl.sum(tl.where(index[:, None] == at[None, :], values, 0.0), axis=0)


@triton.jit
def _fit_scales(
    columns, importance, overall, factors, shifts, scale_out, zero_out, largest_out,
    rows, linear_stride, column_stride, importance_stride,
    COUNT: tl.constexpr, WEIGHTED: tl.constexpr, INTEGER: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr, NORMAL: tl.constexpr, STORE: tl.constexpr, SMALLEST: tl.constexpr,
    RANGES: tl.constexpr, RANGES_PADDED: tl.constexpr, SHIFTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one linear: all ranges of a row are tried side by side in its lane's registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    linear = tl.program_id(1).to(tl.int64)
    here = row < rows
    columns += linear * linear_stride
    importance += linear * importance_stride
    global_scale = tl.load(overall + linear) if STORE == 3 else 1.0
    low = tl.zeros([ROWS], dtype=tl.float32)
    high = tl.zeros([ROWS], dtype=tl.float32)
    column = columns
    for _ in range(COUNT):
        w = tl.load(column + row, mask=here, other=0.0).to(tl.float32)
        column += column_stride
        low = tl.minimum(low, w, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, w, propagate_nan=tl.PropagateNan.ALL)
    index = tl.arange(0, RANGES_PADDED)
    factor = tl.load(factors + index, mask=index < RANGES, other=1.0)[:, None]
    scales, zeros = _scale_and_zero(
        low[None, :] * factor, high[None, :] * factor, global_scale, INTEGER, SYMMETRIC, BITS, LARGEST, STORE, SMALLEST
    )
    scale = _chosen(scales, tl.zeros([ROWS], dtype=tl.int32), index)
    zero = _chosen(zeros, tl.zeros([ROWS], dtype=tl.int32), index)
    if RANGES > 1:
        losses = _losses(
            columns, importance, column_stride, row, here, scales, zeros,
            COUNT, WEIGHTED, INTEGER, LARGEST, MANTISSA, NORMAL,
        )  # fmt: skip
        losses = tl.where(index[:, None] < RANGES, losses, float("inf"))
        at = tl.argmin(losses, axis=0)
        scale, zero = _chosen(scales, at, index), _chosen(zeros, at, index)
        if SHIFTS > 0:  # one end of the range moved: the lower one first, then the upper
            least = tl.min(losses, axis=0)
            other = tl.arange(0, 2 * SHIFTS)
            width, near = scale * LARGEST, -zero * scale
            far = near + width
            shift = tl.load(shifts + other % SHIFTS)[:, None] * width[None, :]
            lower = (other < SHIFTS)[:, None]
            lows = tl.where(lower, tl.minimum(near[None, :] + shift, 0.0), near[None, :])
            highs = tl.where(lower, far[None, :], tl.maximum(far[None, :] + shift, 0.0))
            scales2, zeros2 = _scale_and_zero(
                lows, highs, global_scale, INTEGER, SYMMETRIC, BITS, LARGEST, STORE, SMALLEST
            )
            losses2 = _losses(
                columns, importance, column_stride, row, here, scales2, zeros2,
                COUNT, WEIGHTED, INTEGER, LARGEST, MANTISSA, NORMAL,
            )  # fmt: skip
            at2 = tl.argmin(losses2, axis=0)
            better = tl.min(losses2, axis=0) < least
            scale = tl.where(better, _chosen(scales2, at2, other), scale)
            zero = tl.where(better, _chosen(zeros2, at2, other), zero)
    out = linear * rows + row
    tl.store(scale_out + out, scale, mask=here)
    tl.store(zero_out + out, zero, mask=here)
    tl.store(largest_out + out, tl.maximum(-low, high), mask=here)
