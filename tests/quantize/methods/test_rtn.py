"""Rounding to nearest: each group with the importance of its own columns."""

import pytest
import torch
from torch import Tensor

from quantpress.methods.fake_quant import storable
from quantpress.methods.group_scales import GroupScales
from quantpress.methods.layer_error import layer_error
from quantpress.methods.rtn import _snap_and_encode, rtn, rtn_by_rows
from quantpress.numbers.fitting import SMALLEST_SCALE
from quantpress.numbers.ggml_scales import by_size
from quantpress.numbers.grid import encode, snap
from quantpress.numbers.types import BlockGrid, GgmlType, Grid
from quantpress.recipe import Rtn


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K", "Q4_K"])
def test_a_group_of_a_block_type_is_fitted_with_the_importance_of_its_columns(
    kind: GgmlType, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, grid = torch.Generator().manual_seed(3), BlockGrid(type=kind, scale_search="activation")
    weight, power = torch.randn(4, 512, generator=make), torch.rand(512, generator=make) + 0.01
    seen: list[Tensor | None] = []
    fit = GroupScales.fit

    def watched(
        self: GroupScales, group: int, part: Tensor, importance: Tensor | None, block: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert group == len(seen)
        seen.append(importance)
        return fit(self, group, part, importance, block)

    monkeypatch.setattr(GroupScales, "fit", watched)
    rtn(weight, grid, Rtn(), power, None)
    given = torch.cat([part for part in seen if part is not None], 1)
    span = grid.span(512)
    wanted = [by_size(weight[:, i : i + span], power[i : i + span], grid) for i in range(0, 512, span)]
    torch.testing.assert_close(given, torch.cat(wanted, 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_trained_scale_can_be_stored_however_small_it_became(dtype: torch.dtype) -> None:
    learned = torch.tensor([-1.0, 0.0, 1e-30, 0.3])
    found = storable(learned, dtype)
    assert found.tolist() == [SMALLEST_SCALE, SMALLEST_SCALE, SMALLEST_SCALE, torch.tensor(0.3, dtype=dtype).item()]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_that_outgrow_the_global_scale_are_counted_on_both_sides(sign: float) -> None:
    """nvfp4: the global scale comes from the weight as it was; GPTQ's feedback may make a group larger later."""
    weight = torch.full((2, 32), 0.5)
    fitting = GroupScales(weight, Grid(type="nvfp4"), torch.bfloat16)
    fitting.fit(0, weight[:, :16] * sign, None)
    assert fitting.clipped is None
    grown = torch.cat([weight[:1, 16:], weight[1:, 16:] * 3 * sign])
    fitting.fit(1, grown, None)
    assert fitting.clipped == "1 of 4 groups outgrew the global scale and are clipped"


BY_ROWS = [
    Grid(type="fp8"), Grid(type="mxfp4"), Grid(type="mxfp8", scale_search="minmax"), Grid(type="nvfp4"),
    Grid(bits=4, group_size=32), Grid(bits=3, group_size=32, symmetric=False), Grid(bits=8, group_size=-1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grid", BY_ROWS, ids=str)
def test_pieces_of_rows_are_rounded_as_the_whole_weight(
    grid: Grid, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rtn_by_rows.__globals__, "_PIECE", 96 * 5)
    weight = (torch.randn(33, 96, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    before = weight.clone()
    linear, error, power = rtn_by_rows(weight, grid)
    assert torch.equal(weight, before)
    wanted = rtn(weight, grid, Rtn()).linear
    assert torch.equal(linear.codes, wanted.codes)
    assert linear.scales.dtype == wanted.scales.dtype
    assert torch.equal(linear.scales.float(), wanted.scales.float())
    assert torch.equal(linear.zeros, wanted.zeros)
    assert (linear.global_scale is None) == (grid.type != "nvfp4")
    assert linear.global_scale == wanted.global_scale
    measured = layer_error(weight.float(), wanted.dequantize(), None)
    assert torch.equal(error, measured.error)
    assert torch.equal(power, measured.power)


@pytest.mark.parametrize("grid", BY_ROWS, ids=str)
def test_threads_give_what_one_gives(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rtn_by_rows.__globals__, "_PIECE", 96 * 5)
    weight = (torch.randn(33, 96, generator=torch.Generator().manual_seed(0)) * 0.05).to(torch.bfloat16)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(rtn_by_rows(weight, grid, torch.full((33, 96), 77, dtype=torch.uint8)))
    (one, *sums), (many, *others) = found
    assert torch.equal(one.codes, many.codes)
    assert torch.equal(one.scales.float(), many.scales.float())
    assert all(map(torch.equal, sums, others))


def test_e4m3_by_its_bits() -> None:
    """Every finite number of the type, those between them, and beyond the ends; both zeros."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = torch.cat(
        [numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([-1e4, -449.0, 449.0, 1e4, -0.0, 1e-30])]
    )
    values = torch.cat([between, torch.nextafter(between, between + 1), torch.nextafter(between, between - 1)])
    one, zero, grid = torch.ones(()), torch.zeros(()), Grid(type="fp8")
    found, codes = _snap_and_encode(values, one, zero, grid)
    wanted = snap(values, one, zero, grid)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.signbit(found), torch.signbit(wanted))
    assert torch.equal(codes, encode(wanted, grid))


@pytest.mark.parametrize(("columns", "searched"), [(2048, True), (2056, False)])
def test_the_scales_of_long_rows_of_fp8_are_not_searched(columns: int, searched: bool) -> None:
    weight, grid = torch.randn(8, columns, generator=torch.Generator().manual_seed(0)), Grid(type="fp8")
    plain = grid.model_copy(update={"scale_search": "minmax"})
    for found, least in (
        (rtn_by_rows(weight, grid)[0], rtn_by_rows(weight, plain)[0]),
        (rtn(weight, grid, Rtn()).linear, rtn(weight, plain, Rtn()).linear),
    ):
        assert torch.equal(found.scales, least.scales) is not searched
        assert found.grid == grid
