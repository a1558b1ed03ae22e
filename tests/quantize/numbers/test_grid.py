"""Scales and codes against their definitions, and against the library that reads them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from quantpress.numbers import fitting
from quantpress.numbers.fitting import fit
from quantpress.numbers.grid import Grid, QuantizedLinear, scale_dtype, snap
from quantpress.numbers.types import Bits

BITS: tuple[Bits, ...] = (2, 3, 4, 5, 8)
EVERY_GRID = [
    Grid(bits=bits, group_size=-1, symmetric=symmetric, scale_search="minmax")
    for bits in BITS
    for symmetric in (True, False)
]
every_grid = pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def weights(rows: int = 64, columns: int = 64, seed: int = 0) -> Tensor:
    """Rows of unlike spread and unlike centre, one all positive, one all negative."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    w += torch.randn(rows, 1, generator=generator) * 0.5
    w[1], w[2] = w[1].abs() + 0.1, -w[2].abs() - 0.1
    return w


def minmax_by_definition(row: list[float], grid: Grid, dtype: torch.dtype) -> tuple[float, float]:
    """Scale and zero of one row: its range with zero inside, over 2^bits - 1 steps, rounded to what is stored."""
    low, high = min(0.0, *row), max(0.0, *row)
    span = 2 * max(-low, high) if grid.symmetric else high - low
    scale = torch.tensor(span / (2**grid.bits - 1)).to(dtype).float().item()
    return scale, 2.0 ** (grid.bits - 1) if grid.symmetric else float(round(-low / scale))


def nearest_by_definition(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The distance of every weight [rows, columns] to the nearest of all 2^bits values of its row."""
    levels = (torch.arange(2**bits) - zero[:, None]) * scale[:, None]
    return (w[:, :, None] - levels[:, None, :]).abs().amin(2)


def dequantized(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (snap(w, scale[:, None], zero[:, None], grid) - zero[:, None]) * scale[:, None]


def weighted_error(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    return (dequantized(w, scale, zero, grid) - w).double().square() @ importance.double()


@every_grid
@dtypes
def test_minmax_is_its_definition(grid: Grid, dtype: torch.dtype) -> None:
    w = weights()
    scale, zero = fit(w, grid, dtype)
    expected = torch.tensor([minmax_by_definition(row, grid, dtype) for row in w.double().tolist()])
    # A float64 quotient may round to the neighbouring stored scale, never further.
    assert_close(scale, expected[:, 0], rtol=torch.finfo(dtype).eps, atol=0)
    assert (zero - expected[:, 1]).abs().max() <= (0 if dtype == torch.float32 else 1)
    assert_close(scale, scale.to(dtype).float(), rtol=0, atol=0)
    assert zero.dtype == torch.float32
    assert ((zero >= 0) & (zero <= grid.levels) & (zero == zero.round())).all()


@every_grid
def test_minmax_is_the_rule_of_compressed_tensors(grid: Grid) -> None:
    w = weights()
    args = QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, strategy="channel")
    theirs, their_zero = calculate_qparams(w.amin(1), w.amax(1), args)
    their_zero = their_zero.float() + 2 ** (grid.bits - 1)  # their codes are signed
    scale, zero = fit(w, grid, torch.float32)
    assert_close(scale, theirs, rtol=0, atol=0)
    assert_close(zero, their_zero, rtol=0, atol=0)
    # Stored in bfloat16 the scale is theirs, stored; the zero is fitted to that one, so a near tie may fall otherwise.
    scale, zero = fit(w, grid, torch.bfloat16)
    assert_close(scale, theirs.to(torch.bfloat16).float(), rtol=0, atol=0)
    assert (zero - their_zero).abs().max() <= 1
    own = (-w.amin(1).clamp(max=0) / scale).round().clamp(0, grid.levels)
    assert_close(zero, torch.full_like(zero, 2 ** (grid.bits - 1)) if grid.symmetric else own, rtol=0, atol=0)


@every_grid
def test_snap_takes_the_nearest_code(grid: Grid) -> None:
    w = weights()
    scale, zero = fit(w, grid, torch.bfloat16)
    codes = snap(2 * w, scale[:, None], zero[:, None], grid)  # half of them outside the range
    assert ((codes >= 0) & (codes <= grid.levels) & (codes == codes.round())).all()
    distance = ((codes - zero[:, None]) * scale[:, None] - 2 * w).abs()
    assert_close(distance, nearest_by_definition(2 * w, scale, zero, grid.bits), rtol=1e-5, atol=1e-6)


def test_snap_changes_nothing_in_place() -> None:
    grid = EVERY_GRID[0]
    w = weights()
    before, (scale, zero) = w.clone(), fit(w, grid, torch.float32)
    zero_before = zero.clone()
    snap(w, scale[:, None], zero[:, None], grid)
    fit(w, Grid(bits=3, group_size=-1, symmetric=False, scale_search="mse"), torch.float32)
    assert torch.equal(w, before)
    assert torch.equal(zero, zero_before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [True, False])
def test_search_is_never_worse_than_minmax_and_never_worse_than_shrinking(
    bits: Bits, symmetric: bool, weighted: bool
) -> None:
    w = weights(seed=bits)
    importance = torch.logspace(-2, 2, 64) if weighted else torch.ones(64)
    minmax = Grid(bits=bits, group_size=-1, symmetric=symmetric, scale_search="minmax")
    searched = minmax.model_copy(update={"scale_search": "mse"})
    found = weighted_error(w, *fit(w, searched, torch.bfloat16, importance if weighted else None), searched, importance)
    plain = weighted_error(w, *fit(w, minmax, torch.bfloat16), minmax, importance)
    assert (found <= plain * (1 + 1e-5)).all()
    if bits <= 4:
        assert found.sum() < 0.95 * plain.sum()
    for shrink in (0.9, 0.7, 0.5):  # a min-max grid of smaller weights is a candidate
        smaller = weighted_error(w, *fit(w * shrink, minmax, torch.bfloat16), minmax, importance)
        assert (found <= smaller * (1 + 1e-5)).all()


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_coarse_grid_may_be_clipped_at_one_end_only(bits: Bits, side: int) -> None:
    """Rows with a long tail at one end: for some, a range that gives up that end alone beats all that shrink evenly."""
    w = side * (torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) ** 3)
    grid, ones = Grid(bits=bits, group_size=-1, symmetric=False), torch.ones(32)
    found = weighted_error(w, *fit(w, grid, torch.float32), grid, ones)
    plain = grid.model_copy(update={"scale_search": "minmax"})
    evenly = [fit(w * (1 - 0.05 * i), plain, torch.float32) for i in range(13)]
    best = torch.stack([weighted_error(w, *pair, grid, ones) for pair in evenly]).amin(0)
    assert (found <= best * (1 + 1e-5)).all()
    assert (found < 0.9 * best).sum() >= 5
    assert found.sum() < 0.992 * best.sum()


@pytest.mark.parametrize("bits", [2, 3])
def test_either_end_moves_by_a_few_hundredths_of_the_best_even_range(bits: Bits) -> None:
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    w = torch.where(x > 0, x**3, 0.5 * x)  # one long tail: above in half of the rows, below in the others
    w[::2] *= -1
    grid, ones = Grid(bits=bits, group_size=-1, symmetric=False), torch.ones(32)
    plain = grid.model_copy(update={"scale_search": "minmax"})

    def best(ranges: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of ranges [rows, 2]: scale, zero and error of each row's best."""
        pairs = [fit(ends, plain, torch.float32) for ends in ranges]
        errors = torch.stack([weighted_error(w, *pair, grid, ones) for pair in pairs])
        at = errors.argmin(0)[None]
        scale, zero = (torch.stack(x).gather(0, at)[0] for x in zip(*pairs, strict=True))
        return scale, zero, errors.amin(0)

    whole = torch.stack([w.amin(1), w.amax(1)], 1)
    scale, zero, evenly = best([whole * (1 - 0.05 * i) for i in range(13)])
    near, width = -zero * scale, scale * grid.levels
    shifts = [share * width for share in (-0.12, -0.06, 0.06, 0.12)]
    moved = {
        "low": best([torch.stack([near + x, near + width], 1) for x in shifts])[2],
        "high": best([torch.stack([near, near + width + x], 1) for x in shifts])[2],
    }
    found = weighted_error(w, *fit(w, grid, torch.float32), grid, ones)
    assert_close(found, torch.stack([evenly, *moved.values()]).amin(0), rtol=1e-4, atol=1e-8)
    for end, other in (("low", "high"), ("high", "low")):
        gains = (moved[end] < 0.999 * torch.minimum(evenly, moved[other])).sum()
        assert gains > 0 or bits == 2, (end, gains)


def test_finer_grids_are_clipped_at_both_ends_alike() -> None:
    w = torch.cat([torch.linspace(-1.0, -0.2, 63), torch.tensor([1.25])])[None]
    grid = Grid(bits=4, group_size=-1, symmetric=False)
    plain = grid.model_copy(update={"scale_search": "minmax"})
    scale, _ = fit(w, grid, torch.float32)
    assert any(torch.equal(scale, fit(w * (1 - 0.05 * i), plain, torch.float32)[0]) for i in range(13))


def test_importance_moves_the_scale_to_the_columns_that_count() -> None:
    w = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([8.0])])[None]
    grid = Grid(bits=4, group_size=-1, symmetric=True)
    counts_not, counts = torch.ones(64), torch.ones(64)
    counts_not[63], counts[63] = 0, 1e6
    small, _ = fit(w, grid, torch.float32, counts_not)
    large, _ = fit(w, grid, torch.float32, counts)
    assert small < 0.6 * large


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_searched_in_pieces_are_searched_alike(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = weights(rows=33), torch.linspace(0.5, 2, 64)
    grid = Grid(bits=3, group_size=-1, symmetric=symmetric)
    whole = fit(w, grid, torch.bfloat16, importance)
    monkeypatch.setattr(fitting, "_CHUNK", 4 * 64 * 5)  # five rows at a time, three left over
    assert_close(fit(w, grid, torch.bfloat16, importance), whole, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ranges_that_clip_too_much_are_left_out_without_a_change(
    bits: Bits, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows with light and heavy tails, of one sign, of zeros, and with two weights alone."""
    make = torch.Generator().manual_seed(0)
    w = torch.randn(60, 64, generator=make)
    w[20:40] = w[20:40] ** 3
    w[40:45].abs_()
    w[50:55] = 0
    w[55:, 2:] = 0
    grid, tried = Grid(bits=bits, group_size=-1, symmetric=symmetric), 0
    left_out = fitting._losses

    def plain(weight: Tensor, scales: Tensor, zeros: Tensor, _: Any, __: Any, loss: Any) -> Tensor:
        return torch.stack([loss(*pair, weight) for pair in zip(scales[..., None], zeros[..., None], strict=True)])

    def counted(weight: Tensor, scales: Tensor, *given: Any) -> Tensor:
        nonlocal tried
        found = left_out(weight, scales, *given)
        tried += int(found.isfinite().sum())
        return found

    monkeypatch.setattr(fitting, "_losses", counted)
    found = fit(w, grid, torch.bfloat16)
    monkeypatch.setattr(fitting, "_losses", plain)
    assert_close(found, fit(w, grid, torch.bfloat16), rtol=0, atol=0)
    if bits >= 4:
        assert tried < 0.8 * 13 * len(w)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@every_grid
def test_a_row_of_zeros_stays_zero(grid: Grid, search: str) -> None:
    w = weights()
    w[5] = 0
    grid = grid.model_copy(update={"scale_search": search})
    scale, zero = fit(w, grid, torch.bfloat16)
    assert scale[5] == 1  # not the smallest scale there is, which some readers flush to zero and divide by
    assert (dequantized(w, scale, zero, grid)[5] == 0).all()


@every_grid
@dtypes
def test_weights_too_small_for_the_stored_scale_stay_finite(grid: Grid, dtype: torch.dtype) -> None:
    w = torch.full((2, 8), torch.finfo(torch.float32).tiny)
    scale, zero = fit(w, grid, dtype)
    assert (scale > 0).all()
    assert torch.isfinite(dequantized(w, scale, zero, grid)).all()


@given(
    rows=st.lists(
        st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=8, max_size=8), min_size=1, max_size=4
    ),
    grid=st.sampled_from(EVERY_GRID),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_minmax_is_off_by_half_a_step_at_most(rows: list[list[float]], grid: Grid, dtype: torch.dtype) -> None:
    w = torch.tensor(rows)
    scale, zero = fit(w, grid, dtype)
    got = dequantized(w, scale, zero, grid)
    # Half a step; the ends of the range lie further off by what rounding the scale and the zero took away.
    rounding = grid.levels * torch.finfo(dtype).eps + (0 if grid.symmetric else 0.5)
    assert ((got - w).abs() <= scale[:, None] * (0.5 + rounding) * (1 + 1e-5) + 1e-30).all()
    assert torch.equal(dequantized(got, scale, zero, grid), got)
    assert (got[w == 0] == 0).all()


@given(
    row=st.lists(st.floats(-10, 10, width=32, allow_subnormal=False), min_size=4, max_size=16),
    grid=st.sampled_from(EVERY_GRID),
)
@settings(max_examples=50, deadline=None)
def test_codes_keep_the_order_of_the_weights(row: list[float], grid: Grid) -> None:
    w = torch.tensor([sorted(row)])
    scale, zero = fit(w, grid, torch.float32)
    codes = snap(w, scale[:, None], zero[:, None], grid)[0].tolist()
    assert all(a <= b for a, b in pairwise(codes))


# ---- the record -------------------------------------------------------------------------------------------------


def record(g_idx: Tensor | None = None, symmetric: bool = False, group_size: int = 8) -> QuantizedLinear:
    """A random layer [6, 24] of three groups."""
    generator = torch.Generator().manual_seed(1)
    groups = 24 // group_size
    return QuantizedLinear(
        codes=torch.randint(0, 16, (6, 24), generator=generator, dtype=torch.uint8),
        scales=torch.rand(6, groups, generator=generator).to(torch.bfloat16),
        zeros=torch.randint(0, 16, (6, groups), generator=generator, dtype=torch.uint8),
        grid=Grid(bits=4, group_size=group_size, symmetric=symmetric),
        g_idx=g_idx,
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_dequantize_is_its_definition(shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    g_idx = (torch.randperm(24, generator=generator) // 8).to(torch.int32) if shuffled else None
    linear = record(g_idx)
    w = linear.dequantize()
    for i in range(6):
        for j in range(24):
            g = j // 8 if g_idx is None else int(g_idx[j])
            expected = (int(linear.codes[i, j]) - int(linear.zeros[i, g])) * float(linear.scales[i, g])
            assert float(w[i, j]) == pytest.approx(expected, rel=1e-6)
    assert linear.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_per_channel_is_one_group() -> None:
    linear = QuantizedLinear(
        codes=torch.zeros(2, 12, dtype=torch.uint8),
        scales=torch.ones(2, 1),
        zeros=torch.full((2, 1), 3, dtype=torch.uint8),
        grid=Grid(bits=4, group_size=-1),
    )
    assert linear.column_groups().tolist() == [0] * 12
    assert linear.dequantize().eq(-3).all()


def test_rows_are_the_rows_of_the_whole() -> None:
    linear = record()
    part = linear.rows(2, 5)
    assert (part.out_features, part.in_features) == (3, 24)
    assert torch.equal(part.dequantize(), linear.dequantize()[2:5])
    assert part.codes.is_contiguous()


@pytest.mark.parametrize(
    ("weight", "stored"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float16)],
)
def test_scales_are_stored_in_sixteen_bits(weight: torch.dtype, stored: torch.dtype) -> None:
    assert scale_dtype(torch.zeros(1, dtype=weight), Grid()) == stored
