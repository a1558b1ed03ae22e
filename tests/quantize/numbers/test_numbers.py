"""Float number grids and rounded inputs, against the formats' own tables and rules."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantpress.methods import ROUNDERS
from quantpress.numbers.activations import columns_of, measured, round_inputs, static_int8
from quantpress.numbers.fitting import fit, global_scale, ranges
from quantpress.numbers.grid import Grid, Inputs, decode, encode, scale_dtype, snap
from quantpress.numbers.types import Activations, NumberType, ScaleSearch
from quantpress.recipe import Gptq, Rtn

FLOATS = [
    Grid(type="fp8"),
    Grid(type="fp8", group_size=0),
    Grid(type="fp8-block"),
    Grid(type="mxfp8"),
    Grid(type="mxfp4"),
    Grid(type="nvfp4"),
]
every_type = pytest.mark.parametrize("grid", FLOATS, ids=str)


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (Grid(group_size=64, symmetric=False), "int4 g64 asym"),
        (Grid(bits=8, group_size=-1, symmetric=True), "int8 channel sym"),
        (Grid(type="fp8"), "fp8 channel"),
        (Grid(type="fp8", group_size=0), "fp8 tensor"),
        (Grid(type="nvfp4"), "nvfp4"),
    ],
)
def test_a_grid_in_words(grid: Grid, name: str) -> None:
    assert str(grid) == name


@every_type
def test_floats_are_symmetric_and_say_so(grid: Grid) -> None:
    assert grid.symmetric
    with pytest.raises(ValidationError, match="symmetric"):
        Grid(type=grid.type, symmetric=False)


def e2m1() -> list[float]:
    """The sixteen numbers by their bits: sign, two exponent bits (bias 1), one mantissa bit."""
    out = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        out.append(-size if code & 8 else size)
    return out


def e4m3() -> list[float]:
    """The 256 numbers by their bits: sign, four exponent bits (bias 7), three mantissa bits; 0x7f and 0xff are NaN."""
    out = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        size = math.nan if code & 127 == 127 else size
        out.append(-size if code & 128 else size)
    return out


@pytest.mark.parametrize(("grid", "numbers"), [(FLOATS[0], e4m3()), (FLOATS[4], e2m1())], ids=["e4m3", "e2m1"])
def test_codes_are_the_bits_of_the_numbers(grid: Grid, numbers: list[float]) -> None:
    codes = torch.tensor([c for c, x in enumerate(numbers) if not math.isnan(x)], dtype=torch.uint8)
    values = torch.tensor([x for x in numbers if not math.isnan(x)])
    assert torch.equal(decode(codes, grid), values)
    assert torch.equal(encode(values, grid), codes)  # -0.0 is a code of its own


@pytest.mark.parametrize(("grid", "numbers"), [(FLOATS[0], e4m3()), (FLOATS[4], e2m1())], ids=["e4m3", "e2m1"])
def test_snap_takes_the_nearest_number_and_ties_to_the_even_code(grid: Grid, numbers: list[float]) -> None:
    table = sorted({x for x in numbers if x >= 0})  # in the order of their codes
    ties = [(a + b) / 2 for a, b in pairwise(table)]
    between = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * table[-1] * 1.1
    w = torch.cat([torch.tensor([*table, *ties]), between])
    w = torch.cat([w, -w])
    got = snap(w, torch.ones(1), torch.zeros(1), grid)
    for x, y in zip(w.tolist(), got.tolist(), strict=True):
        distance = min(abs(abs(x) - n) for n in table)
        nearest = [i for i, n in enumerate(table) if abs(abs(x) - n) == distance]
        assert abs(y) == table[nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]]
        assert y == 0 or (y > 0) == (x > 0)


def weight(rows: int = 256, columns: int = 256, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=make) * torch.rand(rows, 1, generator=make).add(0.05) * 0.1


@every_type
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_type_is_stored_exactly_and_close(grid: Grid, search: ScaleSearch, method: str) -> None:
    w = weight().to(torch.bfloat16)
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(1))
    grid = grid.model_copy(update={"scale_search": search})
    settings = Rtn() if method == "rtn" else Gptq()
    q = ROUNDERS[method](w, grid, settings, x.T @ x if method == "gptq" else None).linear
    assert q.codes.dtype == torch.uint8
    shapes = {"fp8": (256, 1), "fp8-block": (2, 2), "mxfp8": (256, 8), "mxfp4": (256, 8), "nvfp4": (256, 16)}
    assert tuple(q.scales.shape) == ((1, 1) if grid.group_size == 0 else shapes[grid.type])
    assert q.scales.dtype == scale_dtype(w, grid)
    assert (q.global_scale is None) == (grid.type != "nvfp4")
    error = ((q.dequantize() - w.float()).norm() / w.float().norm()).item()
    assert error < (0.04 if grid.bits == 8 else 0.13 if method == "rtn" else 0.16)
    if method == "gptq":
        both = ROUNDERS["rtn"](w, grid, Rtn(), x.T @ x), ROUNDERS["gptq"](w, grid, Gptq(), x.T @ x)
        nearest, solved = ((x @ (done.linear.dequantize() - w.float()).T).square().sum() for done in both)
        assert solved <= nearest


@every_type
def test_dequantizing_is_the_definition(grid: Grid) -> None:
    w = weight(256, 192) if grid.type != "fp8-block" else weight(200, 192)  # the last blocks are smaller
    q = ROUNDERS["rtn"](w, grid, Rtn(), None).linear
    table = e4m3() if grid.bits == 8 else e2m1()
    got = q.dequantize()
    rows, columns = {"fp8-block": (128, 128)}.get(grid.type, (q.out_features if grid.group_size == 0 else 1, 0))
    columns = columns or grid.columns(q.in_features)
    for i in range(0, q.out_features, 37):
        for j in range(0, q.in_features, 11):
            scale = q.scales[i // rows, j // columns].float().item()
            scale /= 1 if q.global_scale is None else q.global_scale.item()
            assert got[i, j].item() == pytest.approx(table[int(q.codes[i, j])] * scale, rel=1e-6)


@pytest.mark.parametrize("amax", [1e-6, 0.013, 1.0, 300.0])
def test_global_scale_is_a_power_of_two_that_leaves_room_for_the_widest_range(amax: float) -> None:
    w = torch.zeros(16, 32)
    w[3, 5] = -amax
    overall = global_scale(w, Grid(type="nvfp4"))
    assert overall is not None
    assert math.log2(overall.item()).is_integer()
    widest = ranges(Grid(type="nvfp4"), torch.float8_e4m3fn, torch.device("cpu")).max().item()
    assert 0.5 < overall.item() * widest / (448 * 6 / amax) <= 1.000001


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "fp8-block"])
def test_a_scale_above_the_range_is_kept_where_it_fits_better(kind: NumberType) -> None:
    """1 and 0.75 are exact as 4 and 3 of E2M1, and no two of its numbers up to 6 have that ratio with 6."""
    w = torch.tensor([1.0, 0.75]).repeat(128, 64)
    narrow = Grid(type=kind, scale_search="minmax")
    overall = global_scale(w, narrow)
    dtype = scale_dtype(w, narrow)
    w = w[:, : min(narrow.columns(128), 128)]
    full, best = (fit(w, grid, dtype, None, overall) for grid in (narrow, Grid(type=kind)))
    assert (best[0] > full[0]).all()
    errors = [snap(w, s[:, None], z[:, None], narrow).mul(s[:, None]).sub(w).abs().max() for s, z in (best, full)]
    assert errors[0] < errors[1]
    assert kind != "nvfp4" or errors[0] == 0


def test_every_e4m3_scale_near_min_max_is_tried_for_nvfp4() -> None:
    factors = ranges(Grid(type="nvfp4"), torch.float8_e4m3fn, torch.device("cpu"))
    for start in torch.linspace(1, 2, 97):
        tried = set((start * factors).to(torch.float8_e4m3fn).tolist())
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        inside = codes[(codes >= start * factors.min()) & (codes <= start * factors.max())]
        assert set(inside.tolist()) <= tried


def power_of_two(amax: float, kind: str) -> float:
    """The exponent of `amax`, the next one from a mantissa of 1.75 on, less the type's own."""
    fraction, exponent = math.frexp(amax)  # fraction in [0.5, 1)
    return 2.0 ** (exponent - 1 + (fraction >= 0.875) - (8 if kind == "mxfp8" else 2))


def test_microscaling_minmax_is_the_rule_of_the_standard_and_of_compressed_tensors() -> None:
    w = weight(512, 32)
    for grid in (Grid(type="mxfp8", scale_search="minmax"), Grid(type="mxfp4", scale_search="minmax")):
        scale, _ = fit(w, grid, torch.float8_e8m0fnu)
        for row, got in zip(w.tolist(), scale.tolist(), strict=True):
            assert got == power_of_two(max(map(abs, row)), grid.type)


@every_type
def test_searching_is_never_worse_than_the_range(grid: Grid) -> None:
    w = weight(seed=3)
    errors = {}
    for search in ("minmax", "mse"):
        q = ROUNDERS["rtn"](w, grid.model_copy(update={"scale_search": search}), Rtn(), None).linear
        errors[search] = (q.dequantize() - w).square().sum().item()
    if str(grid) in ("fp8 tensor", "mxfp8"):  # of these, on weights like these, the range is the best already
        assert errors["mse"] <= errors["minmax"]
    else:
        assert errors["mse"] < errors["minmax"]


@every_type
def test_a_searched_scale_is_the_best_of_those_it_may_have(grid: Grid) -> None:
    """The whole range, then 2^(-4/12) to 2^(11/12) of it; powers of two for OCP's types; the first of equals."""
    w = weight(128, grid.columns(128), seed=11)
    dtype = scale_dtype(w, grid)
    overall = global_scale(w, grid)
    near = [1.0, *(2 ** (i / 12) for i in range(-4, 12) if i)]
    factors = (1.0, 2.0, 0.5) if grid.type in ("mxfp8", "mxfp4") else near
    plain = grid.model_copy(update={"scale_search": "minmax"})
    one = 128 if grid.shares_rows else 1

    def error(scale: Tensor) -> Tensor:
        off = snap(w, scale[:, None], torch.zeros(128, 1), grid) * scale[:, None] - w
        power = {"nvfp4": 2.25, "mxfp4": 2.4}.get(grid.type, 2.0)
        return off.abs().pow(power).sum(1).reshape(-1, one).sum(1)

    candidates = [fit(w * factor, plain, dtype, None, overall)[0] for factor in factors]
    errors = torch.stack([error(scale) for scale in candidates])
    got, _ = fit(w, grid, dtype, None, overall)
    torch.testing.assert_close(error(got), errors.amin(0), rtol=1e-5, atol=0)


def test_an_nvfp4_group_too_small_for_the_global_scale_keeps_a_scale_above_zero() -> None:
    """Its E4M3 scale would be 0, and the group NaN: the smallest there is takes its place, and 0 stays 0."""
    w = torch.zeros(3, 32)
    w[0, :16], w[0, 16:] = 1.0, 1e-9
    w[1, 20] = -1e-12
    for method in ("rtn", "gptq"):
        q = ROUNDERS[method](w, Grid(type="nvfp4"), Rtn() if method == "rtn" else Gptq(), torch.eye(32)).linear
        assert (q.scales.float() > 0).all()
        back = q.dequantize()
        assert torch.isfinite(back).all()
        assert back[0, 0] == pytest.approx(1.0, rel=0.1)
        assert (back[:, 16:].abs() < 1e-5).all()
        assert (back[2] == 0).all()


def test_activation_search_weighs_the_columns_that_count() -> None:
    w, x = weight(64, 64, seed=5), torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    x[:, :8] *= 20
    grid = Grid(bits=3, group_size=32, symmetric=False)
    plain = ROUNDERS["rtn"](w, grid, Rtn(), x.T @ x)
    weighed = ROUNDERS["rtn"](w, grid.model_copy(update={"scale_search": "activation"}), Rtn(), x.T @ x)
    plain_error, weighed_error = ((x @ (q.linear.dequantize() - w).T).square().sum() for q in (plain, weighed))
    assert weighed_error < 0.9 * plain_error


@pytest.mark.parametrize(("columns", "whole"), [(32, True), (256, True), (288, False)])
def test_activation_search_takes_a_groups_whole_block_of_the_moment_up_to_256_columns(
    columns: int, whole: bool
) -> None:
    make = torch.Generator().manual_seed(4)
    n = 2 * columns
    x = torch.randn(700, n, generator=make) @ torch.randn(n, n, generator=make) + 1
    w, moment = weight(24, n, seed=6), x.T @ x
    grid = Grid(bits=3, group_size=columns, symmetric=False, scale_search="activation")
    q = ROUNDERS["rtn"](w, grid, Rtn(), moment).linear
    for g in range(2):
        part = slice(g * columns, (g + 1) * columns)
        weigh = moment[part, part] if whole else moment.diagonal()[part]
        scale, zero = fit(w[:, part], grid, q.scales.dtype, weigh)
        torch.testing.assert_close(q.scales[:, g].float(), scale, rtol=0, atol=0)
        assert torch.equal(q.zeros[:, g].float(), zero)


@every_type
def test_rows_are_taken_apart_with_the_scale_they_share(grid: Grid) -> None:
    q = ROUNDERS["rtn"](weight(), grid, Rtn(), None).linear
    if grid.type == "fp8-block":
        assert torch.equal(q.rows(0, 256).dequantize(), q.dequantize())
        return
    part = q.rows(64, 200)
    assert torch.equal(part.dequantize(), q.dequantize()[64:200])


def as_kernel(x: Tensor, spec: Activations, group: int) -> Tensor:
    """Values [tokens, in] rounded group by group with plain Python numbers."""
    table = sorted({n for n in (e4m3() if "8" in spec.type else e2m1()) if n >= 0})
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        for g in range(0, x.shape[1], group):
            part = x[t, g : g + group].double()
            amax = part.abs().max().item()
            if spec.type == "int8" and spec.symmetric:
                scale = amax / 127
                numbers = (part / scale).round().clamp(-128, 127)
            elif spec.type == "int8":  # 256 codes, and so 255 steps from the smallest to the largest value
                low, high = min(0.0, part.min().item()), max(0.0, part.max().item())
                scale = (high - low) / 255
                zero = min(127.0, max(-128.0, round(-128 - low / scale)))
                numbers = ((part / scale).round() + zero).clamp(-128, 127) - zero
            else:
                scale = amax / 448
                if spec.type.startswith("mx"):
                    scale = power_of_two(amax, spec.type)
                numbers = torch.tensor([min(table, key=lambda n, v=v: abs(abs(v) - n)) * (1 if v > 0 else -1)
                                        for v in (part / scale).tolist()])  # fmt: skip
            out[t, g : g + group] = (numbers * scale).float()
    return out


@pytest.mark.parametrize("kind", ["int8", "fp8", "mxfp8", "mxfp4"])
def test_dynamic_inputs_are_rounded_by_the_kernels_rule(kind: str) -> None:
    spec = Activations.model_validate({"type": kind})
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 3
    columns = columns_of(spec, Grid())
    got = round_inputs(x, measured(spec, columns, -1, 1))
    torch.testing.assert_close(got, as_kernel(x, spec, columns or 96), rtol=1e-5, atol=1e-6)


def test_dynamic_asymmetric_inputs_use_all_255_steps() -> None:
    spec = Activations(type="int8", symmetric=False)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * 3 + torch.tensor(
        [[0.0], [5], [-5], [2], [9], [-9]]
    )
    got = round_inputs(x, measured(spec, 0, -1, 1))
    torch.testing.assert_close(got, as_kernel(x, spec, 96), rtol=1e-5, atol=1e-5)
    for row, back in zip(x, got, strict=True):
        low, high = min(0.0, row.min().item()), max(0.0, row.max().item())
        steps = back / ((high - low) / 255)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_blocks_of_fp8_inputs_need_not_divide() -> None:
    spec = Activations(type="fp8")
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    columns = columns_of(spec, Grid(type="fp8-block"))
    assert columns == 128
    got = round_inputs(x, measured(spec, columns, 0, 0))
    torch.testing.assert_close(got, as_kernel(x, spec, 128), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [0, 32])
def test_an_expert_without_tokens_has_no_inputs_to_round(columns: int) -> None:
    spec = Activations(type="int8")
    assert round_inputs(torch.empty(0, 48), measured(spec, columns, 0, 0)).shape == (0, 48)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_int8_inputs_use_the_measured_range(symmetric: bool) -> None:
    spec = Activations(type="int8", dynamic=False, symmetric=symmetric)
    inputs = measured(spec, 0, -1.0, 3.0)
    assert inputs.scale is not None
    assert inputs.scale.item() == pytest.approx(3 / 127 if symmetric else 4 / 255)
    x = torch.tensor([[-1.0, 0.0, 0.5, 3.0, 9.0]])
    got = round_inputs(x, inputs)
    assert got[0, 1] == 0  # zero stays zero
    assert (got - x).abs()[0, :4].max() <= inputs.scale.item() / 2 + 1e-6
    assert got[0, 4] < 3.1  # what was not seen is clipped


def test_nvfp4_inputs_have_a_scale_in_e4m3_a_group_of_16() -> None:
    spec = Activations(type="nvfp4")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    inputs = measured(spec, 16, x.min().item(), x.max().item())
    assert inputs.scale is not None
    got = round_inputs(x, inputs).reshape(-1, 16)
    for row, back in zip(x.reshape(-1, 16), got, strict=True):
        scale = (row.abs().max() / 6 * inputs.scale).to(torch.float8_e4m3fn).float() / inputs.scale
        assert set((back / scale).abs().tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
        assert (back - row).abs().max() <= scale * 1.01


def test_a_static_range_is_chosen_by_what_each_token_loses() -> None:
    """One token fifty times the others: the whole range would round these to nothing."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    spec = Activations(type="int8", dynamic=False)
    own, lost = static_int8(spec, x, float(x.min()), float(x.max()))
    assert lost < 0.1
    x[0, 3] = 500.0
    whole = measured(spec, 0, -4.0, 500.0)
    best, worst = static_int8(spec, x, -4.0, 500.0)
    assert worst > 0.5  # and says that no range fits
    assert best.scale is not None
    assert own.scale is not None
    assert float(best.scale) < 3 * float(own.scale)

    def losses(inputs: Inputs) -> torch.Tensor:
        found: torch.Tensor = (round_inputs(x, inputs) - x).norm(dim=-1) / x.norm(dim=-1)
        return found

    assert float(losses(best)[1:].max()) < 0.2 < float(losses(whole)[1:].min())
