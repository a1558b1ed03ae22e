"""The scales of ggml's block types: what can be stored, and the search for the best.

In all of them a weight is scale * (q - zero) - offset, q its code. The zero is fixed: the middle of the codes for
Q4_0, Q5_0, Q8_0, Q3_K and Q6_K, which have no offset; 0 for Q4_1, Q5_1, Q2_K, Q4_K and Q5_K, which have one. In the
K types scale and offset of a group are whole numbers times float16 that the 256 columns of a super-block share; in the
others they are float16 themselves. (ggml-quants.c and ggml-common.h of llama.cpp.)

Inside, weights are laid out columns first, [groups, columns of a group, rows], so that sums over a group's columns run
along contiguous rows. `importance` weighs the squared errors, by column [columns] or by weight [rows, columns].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .types import BlockGrid

BLOCK_BYTES = {  # of a block: 32 columns, 256 in the K types
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34,
    "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
}  # fmt: skip
SCALE_CODES: dict[str, tuple[int, int]] = {  # smallest and largest; 0, which would erase a group, is never used
    "Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127),
}  # fmt: skip
_TINY, _HUGE = 2.0**-24, 65504.0  # the ends of float16
_ROWS = 1024  # rows searched at a time, so that a super-block of them stays in cache
_AGAIN = 3  # iterations of least squares, each from the codes of the last
_REFITS = 3  # times super scales are refitted to the codes they led to
_SUPER_STEPS = tuple(0.5 * i for i in range(-8, 3))  # added to the largest code that the largest scale may get


def zero_of(grid: BlockGrid) -> int:
    """The code that stands for a weight of 0 in a type without offsets; 0 in one with offsets."""
    return 1 << (grid.bits - 1) if grid.symmetric else 0


def fit_super(weight: Tensor, grid: BlockGrid, importance: Tensor | None) -> Tensor:
    """Super scales (and super offsets) of one super-block of a K type: float32 [2, rows], exact in float16.

    weight [rows, 256], importance [256] or [rows, 256] or None. They start from the best
    scale of each group alone and are refitted, by least squares, to the codes that the groups get with them; the one
    with the least weighted error is kept.
    """
    columns = grid.columns(weight.shape[1])
    x = weight.to(torch.float32).T.contiguous().reshape(-1, columns, len(weight))
    w = _weights(importance, x)
    out = x.new_empty(2, len(weight))
    step = _rows_at_once(weight, _ROWS)
    for r in range(0, len(weight), step):
        rows = slice(r, r + step)
        part, mine = x[..., rows].contiguous(), _of(w, rows)
        out[:, rows] = _super(part, mine, grid, _ideal(part, mine, grid))
    return out


def fit_group(
    weight: Tensor,
    grid: BlockGrid,
    importance: Tensor | None,
    overall: Tensor | None,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale [rows] and zero [rows], float32, of one group: a weight is scale * (q - zero), the zero holds the offset.

    weight [rows, columns of the group], importance [columns] or [rows, columns] or None, overall [2, rows] from
    `fit_super` for K types. With a moment X^T X [columns, columns] of the inputs, K types choose among the storable
    scales near the best by the error in the output: inputs correlate, and an offset that is a step off costs more than
    the sum of its columns' errors.
    """
    x = weight.to(torch.float32).T.contiguous()[None]
    w = _weights(importance, x)
    scales, offsets = x.new_empty(2, len(weight)).unbind(0)
    step = _rows_at_once(weight, 4 * _ROWS)
    for r in range(0, len(weight), step):
        rows = slice(r, r + step)
        part, mine = x[..., rows].contiguous(), _of(w, rows)
        found = _ideal(part, mine, grid)
        if overall is None:
            scale, offset = found
            scales[rows], offsets[rows] = _half(scale)[0], (offset.clamp(-_HUGE, _HUGE).half().float())[0]
        else:
            codes, shifts, _ = _coded(part, mine, grid, found, overall[:, rows], moment)
            scales[rows], offsets[rows] = (codes * overall[0, rows])[0], (shifts * overall[1, rows])[0]
    return scales, zero_of(grid) + offsets / scales


def nearest(weight: Tensor, grid: BlockGrid, importance: Tensor) -> Tensor:
    """`weight` [rows, in] as it is once rounded to nearest, float32; importance [in] weighs columns, as for `by_size`.

    As `rtn` rounds it, but for ties that sums in another order decide. All super-blocks are rounded together, each as a
    row: for a sample of a few rows, a tenth of the work.
    """
    span, columns = grid.span(weight.shape[1]), grid.columns(weight.shape[1])
    rows = weight.to(torch.float32).reshape(-1, span)
    x = rows.T.contiguous().reshape(-1, columns, len(rows))
    w = _weights(by_size(rows, importance.reshape(-1, span).repeat(len(weight), 1), grid), x)
    scale, offset = found = _ideal(x, w, grid)
    if grid.nested:
        overall = _super(x, w, grid, found)
        codes, shifts, _ = _coded(x, w, grid, found, overall)
        scale, offset = codes * overall[0], shifts * overall[1]
    else:
        scale, offset = _half(scale), offset.clamp(-_HUGE, _HUGE).half().float()
    back = _snap(x, scale, offset, grid).mul_(scale[:, None]).sub_(offset[:, None])
    return back.reshape(span, -1).T.reshape(weight.shape)


def codes_of(scales: Tensor, zeros: Tensor, grid: BlockGrid, overall: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of scales and offsets [...] for what `fit_group` found with super scales `overall` [2, ...]."""
    shifts = (zeros - zero_of(grid)) * scales / overall[1]
    return (scales / overall[0]).round(), shifts.round()


def by_size(weight: Tensor, importance: Tensor, grid: BlockGrid) -> Tensor:
    """The importance of each weight [rows, columns]: its column's [columns] times sqrt(mean square + its own square).

    As llama.cpp weighs the errors of rounding to nearest with an importance matrix (ggml-quants.c); for types of 6 bits
    and more it takes the column's importance alone.
    """
    if grid.bits >= 6:
        return importance.expand_as(weight)
    squares = weight.to(torch.float32).square()
    return importance * squares.add_(squares.mean(1, keepdim=True)).sqrt_()


def _rows_at_once(weight: Tensor, on_cpu: int) -> int:
    """All of them on a GPU, which has no cache to stay in."""
    return max(1, len(weight)) if weight.is_cuda else on_cpu


def _weights(importance: Tensor | None, x: Tensor) -> Tensor:
    """Weights [groups, columns, rows or 1] for x [groups, columns, rows], about 1 on average."""
    if importance is None:
        return x.new_ones(x.shape[0], x.shape[1], 1)
    w = importance.to(torch.float32)
    w = w / w.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    w = w + 1e-6  # columns of importance 0 still need a usable scale
    return w.reshape(-1, x.shape[0] * x.shape[1]).T.contiguous().reshape(x.shape[0], x.shape[1], -1)


def _of(w: Tensor, rows: slice) -> Tensor:
    return w if w.shape[-1] == 1 else w[..., rows].contiguous()


def _half(scale: Tensor) -> Tensor:
    """The float16 nearest to each scale, as float32; never 0."""
    size = scale.abs().clamp(_TINY, _HUGE).half().float()
    return torch.where(scale < 0, -size, size)


def _snap(x: Tensor, scale: Tensor, offset: Tensor, grid: BlockGrid) -> Tensor:
    """q - zero, float32, for each of `x` [groups, columns, rows]; scale and offset [groups, rows]."""
    zero = zero_of(grid)
    numbers = x * (1 / scale)[:, None]
    if not grid.symmetric:
        numbers.add_((offset / scale)[:, None])
    return numbers.round_().clamp_(-zero, grid.levels - zero)


def _ideal(x: Tensor, w: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """The scale and offset of each group [groups, rows] with the least weighted error, storable or not.

    For the codes of a number of ranges the least-squares scale and offset are found, then for the codes of the best
    result, a few times over. The error that least squares leaves is sum(w x^2) less the gain, so it is not computed.
    """
    xw = x * w
    best = torch.full_like(x[:, 0], -torch.inf)
    scale, offset = torch.ones_like(best), torch.zeros_like(best)
    sum_w, sum_x = w.sum(1), xw.sum(1)

    def consider(numbers: Tensor) -> None:
        nonlocal best, scale, offset
        n2, nx = (numbers * w).mul_(numbers).sum(1), (numbers * xw).sum(1)
        s = nx / n2
        gain, o = s * nx, torch.zeros_like(s)
        if not grid.symmetric:
            n1 = (numbers * w).sum(1)
            determinant = sum_w * n2 - n1 * n1
            both = (sum_w * nx - sum_x * n1) / determinant
            shift = (n1 * nx - n2 * sum_x) / determinant
            usable = (determinant > 1e-6 * sum_w * n2) & (both > 0)
            if grid.nested:  # their offsets are unsigned
                usable &= shift > 0
            gain = torch.where(usable, both * nx - shift * sum_x, gain)
            s, o = torch.where(usable, both, s), torch.where(usable, shift, o)
        better = (gain > best) & torch.isfinite(s) & (s != 0)
        best = torch.where(better, gain, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)

    for s, o in _ranges(x, grid):
        consider(_snap(x, s, o, grid))
    for _ in range(_AGAIN):
        consider(_snap(x, scale, offset, grid))
    return scale, offset


def _ranges(x: Tensor, grid: BlockGrid) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and offsets [groups, rows] to try; never 0 or not finite, even where all weights are 0."""
    low, high = x.amin(1), x.amax(1)
    if grid.symmetric:
        middle = zero_of(grid)
        end = torch.where(-low > high, low, high)
        end = torch.where(end == 0, torch.full_like(end, -float(middle)), end)
        none = torch.zeros_like(end)
        for i in range(-9, 10 + 6 * (grid.bits == 3), 1 if grid.bits < 6 else 3):
            yield -end / (middle + 0.1 * i), none  # the larger end takes the side with one code more
        for i in range(-3, 10, 3):
            yield end / (middle - 1 + 0.1 * i), none
        return
    low, high = (low.clamp(max=0), high) if grid.nested else (low, high)
    width = (high - low).clamp(min=0)
    width = torch.where(width == 0, torch.ones_like(width), width)
    if grid.bits == 2:
        for a in (0.0, 0.1, 0.2, 0.3):
            for b in (-0.1, 0.0, 0.1, 0.2, 0.3):
                yield width * ((1 - a - b) / grid.levels), -(low + a * width)
        return
    for i in range(-9, 18, 3):
        scale = width / (grid.levels + 0.1 * i)
        yield scale, -low  # fixed at the lower end,
        yield scale, scale * grid.levels - high  # at the upper end,
        yield scale, (scale * grid.levels - high - low) / 2  # at the middle


def _coded(
    x: Tensor, w: Tensor, grid: BlockGrid, ideal: tuple[Tensor, Tensor], overall: Tensor, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of scale and offset with the least weighted error near the ideal ones, and that error: [groups, rows].

    overall [2, rows]; moment [columns, columns] of one group. Every scale code near the ideal one is tried with the
    offset that fits it best; with a moment, with the neighbouring offsets, too.
    """
    smallest, largest = SCALE_CODES[grid.type]
    (scale, offset), d, m = ideal, overall[0], overall[1]
    over = (
        w if moment is None else moment.sum(0)[None, :, None]
    )  # how much an error common to all columns counts in each
    whole = over.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    start = (scale / d).round_()
    sum_x = (x * over).sum(1)
    best = torch.full_like(scale, torch.inf)
    codes, shifts = torch.ones_like(scale), torch.zeros_like(scale)
    for step in (-2, -1, 0, 1, 2) if grid.bits == 2 else (-1, 0, 1):
        code = (start + step).clamp_(smallest, largest)
        code = torch.where(code == 0, torch.where(scale < 0, -1.0, 1.0), code)
        s = code * d
        tried = [torch.zeros_like(code)]
        if not grid.symmetric:
            balanced = ((s * (_snap(x, s, offset, grid) * over).sum(1) - sum_x) / whole / m).round_()
            tried = [balanced] if moment is None else [balanced, balanced - 1, balanced + 1, (offset / m).round_()]
        for shift in tried:
            shift = shift.clamp(0, largest)
            error = _snap(x, s, shift * m, grid).mul_(s[:, None]).sub_((shift * m)[:, None]).sub_(x)
            error = (error.square_().mul_(w) if moment is None else (moment @ error).mul_(error)).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            codes, shifts = torch.where(better, code, codes), torch.where(better, shift, shifts)
    return codes, shifts, best


def _super(x: Tensor, w: Tensor, grid: BlockGrid, found: tuple[Tensor, Tensor]) -> Tensor:
    """`fit_super` for a few rows, x [groups, columns, rows], from the ideal scales and offsets."""
    scale, offset = found
    curvature = (_snap(x, scale, offset, grid).square_() * w).sum(1)
    largest = max(SCALE_CODES[grid.type], key=abs)
    d = _common(scale, curvature, largest)
    m = _common(offset, w.sum(1).expand_as(offset), largest) if not grid.symmetric else torch.full_like(d, _TINY)
    overall = torch.stack([d, m])
    best = torch.full_like(d, torch.inf)
    out = overall
    for attempt in range(_REFITS + 1):
        codes, shifts, error = _coded(x, w, grid, found, overall)
        total = error.sum(0)
        better = total < best
        best, out = torch.where(better, total, best), torch.where(better, overall, out)
        if attempt < _REFITS:
            overall = _refitted(x, w, grid, codes, shifts, overall)
    return out


def _common(values: Tensor, weight: Tensor, largest: int) -> Tensor:
    """The float16 unit [rows] in which `values` [groups, rows] are closest to whole numbers, up to `largest`."""
    index = values.abs().argmax(0, keepdim=True)
    end = values.gather(0, index)[0]
    low, high = (min(largest, -largest - 1), max(largest, -largest - 1)) if largest < 0 else (0, largest)
    best, out = torch.full_like(end, torch.inf), torch.full_like(end, _TINY)
    for step in _SUPER_STEPS:
        unit = _half(end / (largest + (step if largest > 0 else -step)))
        codes = (values / unit).round_().clamp_(low, high)
        fitted = _half((weight * values * codes).sum(0) / (weight * codes * codes).sum(0).clamp(min=1e-30))
        error = (weight * (values - fitted * codes).square_()).sum(0)
        better = error < best
        best, out = torch.where(better, error, best), torch.where(better, fitted, out)
    return out


def _refitted(x: Tensor, w: Tensor, grid: BlockGrid, codes: Tensor, shifts: Tensor, overall: Tensor) -> Tensor:
    """Least-squares super scale and offset [2, rows] for given codes: x ~ d * codes * numbers - m * shifts."""
    numbers = _snap(x, codes * overall[0], shifts * overall[1], grid).mul_(codes[:, None])
    nw = numbers * w
    nn, nx = (nw * numbers).sum((0, 1)), (nw * x).sum((0, 1))
    if grid.symmetric:
        return torch.stack([_half(torch.where(nn > 0, nx / nn, overall[0])), overall[1]])
    ns = (nw.sum(1) * shifts).sum(0)
    ss, sx = (w.sum(1) * shifts.square()).sum(0), ((x * w).sum(1) * shifts).sum(0)
    determinant = nn * ss - ns * ns
    d, m = (nx * ss - ns * sx) / determinant, (ns * nx - nn * sx) / determinant
    usable = (determinant > 1e-6 * nn * ss) & (d > 0) & (m > 0)
    return torch.where(usable, torch.stack([_half(d), _half(m)]), overall)
