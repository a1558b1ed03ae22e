"""The solve of many linears at once, its kernels interpreted on the CPU, against GPTQ of each alone."""

import pytest
import torch
from torch import Tensor

from quantpress.methods.gptq import gptq
from quantpress.methods.layer_error import layer_error
from quantpress.numbers.types import BlockGrid, Grid
from quantpress.recipe import Gptq

from .test_gptq import problem

pytest.importorskip("triton")
from quantpress.methods import gptq_batch as batch
from quantpress.methods import layout_kernels, upper_factors

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/gpu/check_kernels.py runs the kernels"
)


def problems(linears: int, out: int, n: int, *, drift: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights [linears, out, n], moments and drifts [linears, n, n] in float64."""
    weights, moments = zip(*(problem(out, n, seed) for seed in range(linears)), strict=True)
    moment = torch.stack(moments).double()
    drifts = 0.1 * moment + torch.randn(moment.shape, generator=torch.Generator().manual_seed(1)) if drift else None
    return torch.stack(weights), moment, drifts


def test_each_linear_may_have_its_own_damping() -> None:
    weight, moment, _ = problems(3, 8, 48)
    grid, damps = Grid(bits=4, group_size=16), [0.01, 0.03, 0.5]
    got = batch.gptq_batch(weight, grid, Gptq(), moment, damps=damps)
    assert got.damp == damps
    for i, linear in enumerate(got.linears):
        assert torch.equal(linear.codes, gptq(weight[i], grid, Gptq(damp=damps[i]), moment[i]).linear.codes)


CASES = [  # a grid, the order, static groups, whether QEP corrects
    (Grid(bits=4, group_size=16, symmetric=False), "group_aware", True, True),
    (Grid(bits=2, group_size=24, symmetric=False), "natural", True, False),
    (Grid(bits=3, group_size=-1, symmetric=True), "group_aware", True, True),
    (Grid(bits=8, group_size=16, symmetric=False, scale_search="minmax"), "activation", True, True),
    (Grid(bits=4, group_size=24, symmetric=True), "activation", False, False),
    (BlockGrid(type="Q5_0"), "group_aware", True, False),
    (BlockGrid(type="Q4_0"), "group_aware", True, True),
]


def solve_and_compare(weight: Tensor, moment: Tensor, drift: Tensor | None, grid: Grid, s: Gptq) -> batch.SolvedBatch:
    """The batch, after a comparison of each of its linears with `gptq` and `layer_error`."""
    power = None if drift is None else torch.rand(weight.shape[:2], dtype=torch.float64) * 1e3
    got = batch.gptq_batch(weight, grid, s, moment, drift, power)
    for i, linear in enumerate(got.linears):
        want = gptq(weight[i], grid, s, moment[i], None if drift is None else drift[i])
        assert want.damp == got.damp[i]
        assert want.linear.grid == linear.grid
        for name in ("codes", "scales", "zeros", "g_idx", "global_scale", "offsets", "supers"):
            ours, theirs = getattr(linear, name), getattr(want.linear, name)
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
                assert ours.is_contiguous()
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, msg=name)
        torch.testing.assert_close(got.weight[i], linear.dequantize(), rtol=0, atol=0)
        told = (moment[i], None, None) if drift is None or power is None else (moment[i], drift[i], power[i])
        error = layer_error(weight[i].double(), got.weight[i].double(), *told)
        torch.testing.assert_close(got.error[i].double(), error.error, rtol=1e-4, atol=0)
        torch.testing.assert_close(got.power[i].double(), error.power, rtol=1e-4, atol=0)
    return got


@pytest.mark.parametrize(("grid", "order", "static", "drift"), CASES, ids=str)
def test_every_linear_of_a_batch_is_as_if_solved_alone(grid: Grid, order: str, static: bool, drift: bool) -> None:
    n = 64 if isinstance(grid, BlockGrid) else 48
    weight, moment, drifts = problems(2, 3, n, drift=drift)
    s = Gptq(order=order, static_groups=static)
    solve_and_compare(weight, moment, drifts, grid, s)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_weights_are_corrected_as_far_as_asked(strength: float) -> None:
    weight, moment, drifts = problems(2, 3, 48, drift=True)
    grid = Grid(bits=4, group_size=24, symmetric=False)
    solve_and_compare(weight, moment, drifts, grid, Gptq(error_correction=strength))


def test_a_global_scale_spans_the_corrected_weight() -> None:
    """Of nvfp4, which is not computed in float64, so that single numbers may be rounded to the other side."""
    weight, moment, drifts = problems(2, 24, 48, drift=True)
    assert drifts is not None
    grid, s = Grid(type="nvfp4"), Gptq(error_correction=1.0)
    moment, drift = moment.float(), 5 * drifts.float()
    power = torch.rand(weight.shape[:2]) * 1e3
    got = batch.gptq_batch(weight, grid, s, moment, drift, power)
    for i, linear in enumerate(got.linears):
        want = gptq(weight[i], grid, s, moment[i], drift[i]).linear
        assert torch.equal(linear.global_scale, want.global_scale)
        assert (linear.codes == want.codes).float().mean() > 0.97


def test_rows_that_are_solved_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "BATCH_ELEMENTS", 2 * 48 * 2)
    weight, moment, drifts = problems(2, 5, 48, drift=True)
    solve_and_compare(weight, moment, drifts, Grid(bits=4, group_size=24), Gptq())
    weight, moment, _ = problems(1, 2, 256)  # a row at once
    solve_and_compare(weight, moment, None, BlockGrid(type="Q4_K"), Gptq(order="natural"))


def test_errors_of_many_columns_reach_the_later_ones_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_PANEL", 16), ("COLUMNS", 8)):
        monkeypatch.setattr(batch, name, value)
    monkeypatch.setattr(upper_factors, "_BLOCK", 20)
    weight, moment, drifts = problems(1, 3, 64, drift=True)
    solve_and_compare(weight, moment, drifts, Grid(bits=4, group_size=16, symmetric=False), Gptq())


def test_a_weight_times_its_drift_stands_for_the_drift() -> None:
    weight, moment, drifts = problems(2, 5, 48, drift=True)
    assert drifts is not None
    grid, s = Grid(bits=4, group_size=24, symmetric=False), Gptq()
    power = torch.rand(weight.shape[:2], dtype=torch.float64) * 1e3
    moved = weight.double() @ drifts
    want = batch.gptq_batch(weight, grid, s, moment, drifts, power)
    got = batch.gptq_batch(weight, grid, s, moment, None, power, moved)
    torch.testing.assert_close([got.weight, got.error, got.power], [want.weight, want.error, want.power])
    for i, linear in enumerate(got.linears):
        alone = gptq(weight[i], grid, s, moment[i], moved=moved[i])
        assert torch.equal(linear.codes, alone.linear.codes)
        errors = [
            layer_error(weight[i].double(), got.weight[i].double(), moment[i], drift, power[i], by_rows)
            for drift, by_rows in ((drifts[i], None), (None, moved[i]))
        ]
        torch.testing.assert_close(errors[0].error, errors[1].error)
        assert errors[0].measure == errors[1].measure == "output_accumulated"


def test_products_of_split_numbers_are_nearly_those_of_float32() -> None:
    """Multiplied as a GPU does in TF32: of each number 10 bits of the fraction count, rounded."""

    def tf32(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + (1 << 12)) & (-1 << 13)).view(torch.float32)

    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 40, 60, generator=g) * 10.0 ** torch.randn(60, generator=g) for _ in range(2))
    exact = left.double() @ right.mT.double()
    size = left.double().abs() @ right.mT.double().abs()

    def off(a: Tensor, b: Tensor) -> float:
        return float(((a.double() @ b.mT.double() - exact) / size).abs().max())

    assert off(tf32(left), tf32(right)) > 1e-4
    ours, theirs = (layout_kernels.split_in_halves(x) for x in (left, right))
    assert off(tf32(ours[..., :180]), tf32(theirs[..., 60:])) < 1e-6
    inside = torch.randn(2, 50, 80, generator=g)[:, 3:43, 7:67]  # of a larger matrix
    parts = layout_kernels.split_in_halves(inside).chunk(4, -1)
    assert torch.equal(parts[0] + parts[2], inside)
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0], parts[3])


@pytest.mark.parametrize("n", [5, 20, 47])
def test_a_factor_is_the_matrix_and_solves_with_it(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper_factors, "_BLOCK", 20)
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3 * n, n, generator=g, dtype=torch.float64)
    h = x.mT @ x
    found = upper_factors.factor_upper_(h.clone())
    t = found.above.triu(1) + torch.eye(n, dtype=h.dtype)
    torch.testing.assert_close(t @ torch.diag_embed(found.variance) @ t.mT, h)
    assert found.sound.all()
    y = torch.randn(2, n, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(t @ found.solve_(y.clone()), y)
    torch.testing.assert_close(t.mT @ found.solve_transposed_(y.clone()), y)
    here = slice(n // 3, n - 1)
    ahead = y[:, here] + torch.linalg.inv(t[:, here, here]).mT @ y[:, here]
    torch.testing.assert_close(found.add_ahead(here.start, y[:, here], y[:, here]), ahead)
    torch.testing.assert_close(found.add_ahead(0, y, y), y + torch.linalg.inv(t).mT @ y)
    h[1] = -h[1]
    assert upper_factors.factor_upper_(h).sound.tolist() == [True, False]
