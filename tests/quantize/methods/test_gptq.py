"""GPTQ against its definition, and the properties that make it worth having."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantpress.formats import ggml_blocks as ggml
from quantpress.methods.gptq import column_order, correct_, factor, gptq
from quantpress.methods.layer_error import output_power
from quantpress.methods.rtn import rtn
from quantpress.numbers.fitting import fit, global_scale
from quantpress.numbers.ggml_scales import fit_super
from quantpress.numbers.grid import Grid, snap
from quantpress.numbers.types import BlockGrid, GgmlType
from quantpress.recipe import Gptq, Rtn
from quantpress.recipe.methods import LEAST_DAMP


def problem(out: int, n: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight [out, n] and the moment [n, n] of correlated inputs whose columns differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5 + torch.eye(n)
    x = torch.randn(tokens, n, generator=g) @ mix * torch.rand(n, generator=g).add(0.1)
    return torch.randn(out, n, generator=g) * 0.1, x.T @ x


def order_by_definition(diagonal: list[float], columns: int, order: str, span: int) -> list[int]:
    """The column order in words: what is larger comes first, of equals the one on the left.

    Columns inside their group, groups inside their span by the largest column, spans by the largest group; a last group
    of fewer columns stays last.
    """

    def falling(indices: list[int], size: list[float]) -> list[int]:
        return [i for _, i in sorted((-size[i], i) for i in indices)]

    n = len(diagonal)
    if order == "natural":
        return list(range(n))
    if order == "activation":
        return falling(list(range(n)), diagonal)
    groups = [falling(list(range(g, min(g + columns, n))), diagonal) for g in range(0, n, columns)]
    short = [groups.pop()] if n % columns else []
    per_span = max(1, span // columns)
    largest = [max(diagonal[i] for i in group) for group in groups]
    spans = [falling(list(range(g, g + per_span)), largest) for g in range(0, len(groups), per_span)]
    peaks = [max(largest[g] for g in members) for members in spans]
    chosen = [groups[g] for at in falling(list(range(len(spans))), peaks) for g in spans[at]]
    return [i for group in (*chosen, *short) for i in group]


def by_definition(weight: Tensor, moment: Tensor, grid: Grid, s: Gptq) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 column by column in float64: inverse Hessian, eager update of all columns."""
    n = weight.shape[1]
    columns, span = grid.columns(n), grid.span(n)
    perm = torch.tensor(order_by_definition(moment.diagonal().tolist(), columns, s.order, span))
    h = moment[perm][:, perm].double()
    dead = h.diagonal() == 0
    mean = h.diagonal().mean()
    h = h + torch.diag(dead * mean) + (s.damp or LEAST_DAMP) * mean * torch.eye(n, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    importance = u.diagonal() ** -2 if s.weighted_scales else torch.ones(n, dtype=torch.float64)
    w, q = weight.double()[:, perm].clone(), torch.empty(weight.shape, dtype=torch.float64)
    static = s.order == "activation" and s.static_groups
    original = importance[perm.argsort()]
    supers: dict[int, Tensor] = {}
    fitted: dict[int, tuple[Tensor, Tensor]] = {}
    for j in range(n):
        source, weigh, i = (weight, original, int(perm[j])) if static else (w, importance, j)
        if grid.nested and i // span not in supers:  # seen for the first time
            part = slice(i // span * span, i // span * span + span)
            supers[i // span] = fit_super(source[:, part].float(), grid, weigh[part].float())
        if i // columns not in fitted:
            part = slice(i // columns * columns, i // columns * columns + columns)
            over = supers.get(i // span)
            fitted[i // columns] = fit(source[:, part].float(), grid, torch.float16, weigh[part].float(), over)
        scale, zero = fitted[i // columns]
        q[:, j] = (snap(w[:, j].float(), scale, zero, grid) - zero) * scale
        error = (w[:, j] - q[:, j]) / u[j, j]
        w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return q[:, perm.argsort()].float()


ORDERS = [("natural", True), ("group_aware", True), ("activation", True), ("activation", False)]


@pytest.mark.parametrize(("order", "static"), ORDERS)
@pytest.mark.parametrize("group_size", [16, 48, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (8, False), (2, False)])
def test_equals_the_definition(order: str, static: bool, group_size: int, bits: int, symmetric: bool) -> None:
    if group_size == -1 and not static:
        pytest.skip("no shuffled groups per channel")
    weight, moment = problem(24, 96, seed=bits)
    moment = moment.double()  # in float32 a fitted scale falls to one side or the other by the noise of the solve
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    s = Gptq(order=order, static_groups=static)
    got = gptq(weight, grid, s, moment).linear.dequantize()
    want = by_definition(weight, moment, grid, s)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    single = gptq(weight, grid, s, moment.float()).linear.dequantize()
    ours, theirs = (output_power((x - weight).double(), moment).sum() for x in (single, want))
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("kind", "order"),
    [("Q4_0", "natural"), ("Q5_1", "group_aware"), ("Q2_K", "group_aware"), ("Q3_K", "activation"),
     ("Q4_K", "group_aware"), ("Q4_K", "activation"), ("Q6_K", "natural")],
)  # fmt: skip
def test_equals_the_definition_on_block_types(kind: GgmlType, order: str) -> None:
    weight, moment = problem(6, 512, seed=3, tokens=1500)
    moment, grid, s = moment.double(), BlockGrid(type=kind), Gptq(order=order)
    done = gptq(weight, grid, s, moment)
    want = by_definition(weight, moment, grid, s)
    same = torch.isclose(done.linear.dequantize(), want, rtol=1e-5, atol=1e-7)
    assert same.float().mean() > 0.95  # a search ends elsewhere where two scales are as good but for the last bit
    ours, theirs = (output_power((x - weight).double(), moment).sum() for x in (done.linear.dequantize(), want))
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)
    assert torch.equal(ggml.unpack(ggml.pack(done.linear), grid, 512).dequantize(), done.linear.dequantize())
    nearest = rtn(weight, grid, Rtn(), moment.float()).linear.dequantize()
    assert ours < output_power((nearest - weight).double(), moment).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_to_nearest(bits: int) -> None:
    weight, moment = problem(64, 128, seed=7)
    grid = Grid(bits=bits, group_size=32, symmetric=False)
    both = rtn(weight, grid, Rtn(), moment), gptq(weight, grid, Gptq(), moment)
    nearest, solved = (output_power(done.linear.dequantize() - weight, moment).sum() for done in both)
    assert solved < 0.7 * nearest


def test_stacked_linears_equal_single_ones() -> None:
    weight, moment = problem(48, 64, seed=5)
    grid = Grid(group_size=16, symmetric=False)
    together = gptq(weight, grid, Gptq(), moment).linear
    alone = gptq(weight[16:32], grid, Gptq(), moment).linear
    part = together.rows(16, 32)
    assert (part.codes != alone.codes).float().mean() < 0.005
    assert torch.equal(part.scales, alone.scales) or (part.scales != alone.scales).float().mean() < 0.02


def test_a_dead_column_counts_as_the_mean_one_and_takes_no_part() -> None:
    _, moment = problem(1, 32, seed=9)
    moment[5], moment[:, 5] = 0, 0
    mean = moment.diagonal().mean()  # of all columns, the dead one too
    feedback, variance, _ = factor(moment, 0.01)
    torch.testing.assert_close(variance[5], mean * 1.01)
    assert not bool(feedback[5].any())
    assert not bool(feedback[:, 5].any())


def test_dead_columns_are_solved_by_the_definition() -> None:
    weight, moment = problem(24, 64, seed=13)
    for column in (3, 40):
        moment[column], moment[:, column] = 0, 0
    grid, s = Grid(bits=3, group_size=16, symmetric=False), Gptq()
    got = gptq(weight, grid, s, moment.double()).linear.dequantize()
    torch.testing.assert_close(got, by_definition(weight, moment.double(), grid, s), rtol=1e-6, atol=1e-7)


def test_dead_column_is_rounded_to_nearest() -> None:
    weight, moment = problem(16, 32, seed=9)
    moment[5], moment[:, 5] = 0, 0
    done = gptq(weight, Grid(bits=8, group_size=-1), Gptq(), moment).linear
    assert (done.dequantize()[:, 5] - weight[:, 5]).abs().max() <= done.scales.max() / 2 + 1e-6


@pytest.mark.parametrize(("inputs", "tokens", "damp"), [(512, 1024, 0.25), (512, 1 << 20, 0.01), (512, 300, 0.5)])
def test_damping_by_tokens(inputs: int, tokens: int, damp: float) -> None:
    assert Gptq().damping(inputs, tokens) == damp
    assert Gptq(damp=0.02).damping(inputs, tokens) == 0.02


def test_with_few_tokens_damping_helps_on_other_text() -> None:
    """Each text has topics of its own beside what all have in common."""
    make = torch.Generator().manual_seed(0)
    n, tokens = 64, 160
    common = torch.randn(n, n, generator=make) * torch.logspace(-0.3, -1.8, n)[:, None]

    def text() -> Tensor:
        topics = torch.randn(4, n, generator=make)
        rows = torch.randn(tokens // 4, n, generator=make), torch.randn(tokens // 4, 4, generator=make)
        return rows[0] @ common + rows[1] @ topics

    seen, other = (torch.cat([text() for _ in range(texts)]) for texts in (4, 32))
    weight, grid, moment = torch.randn(48, n, generator=make), Grid(bits=3, group_size=32), seen.T @ seen

    def error(damp: float) -> float:
        rounded = gptq(weight, grid, Gptq(damp=damp), moment.clone()).linear.dequantize()
        return float((other @ (rounded - weight).T).square().mean())

    assert error(Gptq().damping(n, tokens)) < 0.7 * error(LEAST_DAMP)


def test_singular_hessian_is_damped_more_and_said_so() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 1e3
    moment = x.T @ x - 50 * torch.eye(64)  # as rounding can leave it: slightly indefinite
    weight, _ = problem(8, 64, seed=1)
    done = gptq(weight, Grid(group_size=16), Gptq(damp=1e-8), moment)
    assert done.damp is not None
    assert done.damp > 1e-8
    assert done.note == f"singular Hessian: damping raised from 1e-08 to {done.damp:g}"
    assert torch.isfinite(done.linear.scales).all()


@pytest.mark.parametrize(("beside", "damp"), [(0.5, 0.01), (2.0, 2.43), (7.0, 7.29), (8.5, None), (50.0, None)])
def test_damping_is_tripled_up_to_ten_and_no_further(beside: float, damp: float | None) -> None:
    """[[1, b], [b, 1]] is positive definite once b - 1 is added to its diagonal."""
    moment = torch.tensor([[1.0, beside], [beside, 1.0]], dtype=torch.float64)
    if damp is None:
        with pytest.raises(ValueError, match="stays singular with damping 10"):
            factor(moment, 0.01)
    else:
        assert factor(moment, 0.01)[2] == pytest.approx(damp)


def test_zero_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        gptq(torch.ones(4, 16), Grid(group_size=16), Gptq(), torch.zeros(16, 16))


def test_no_moment_and_settings_of_another_method_are_refused() -> None:
    weight, moment = problem(4, 16, seed=1)
    for s, given_moment in ((Gptq(), None), (Rtn(), moment)):
        with pytest.raises(ValueError, match="gptq needs the second moment of the inputs and its own settings"):
            gptq(weight, Grid(group_size=16), s, given_moment)


def test_factor_is_the_inverse_hessians() -> None:
    _, moment = problem(1, 48, seed=2)
    feedback, variance, damp = factor(moment.double(), 0.01)
    h = moment.double() + damp * moment.double().diagonal().mean() * torch.eye(48)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    torch.testing.assert_close(variance, u.diagonal() ** -2)
    torch.testing.assert_close(feedback, -(u / u.diagonal()[:, None]).T.tril(-1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=24, max_size=24), st.sampled_from([4, 8, 12, 24]))
def test_group_aware_order_keeps_groups_together(diagonal: list[float], columns: int) -> None:
    d = torch.tensor(diagonal)
    order = column_order(d, columns, "group_aware")
    assert order.sort().values.tolist() == list(range(24))
    for group in order.reshape(-1, columns):
        assert (group // columns).unique().numel() == 1
        assert d[group].diff().le(0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=24, max_size=48),
    st.sampled_from([("natural", 8, 8), ("activation", 8, 8), ("group_aware", 8, 8), ("group_aware", 4, 12),
                     ("group_aware", 16, 16), ("group_aware", 64, 64)]),
)  # fmt: skip
def test_the_order_is_its_definition(diagonal: list[int], how: tuple[str, int, int]) -> None:
    """Small whole numbers, of which many are equal; of any length, so that the last group may be short."""
    order, columns, span = how
    if span > columns:  # super-blocks are whole
        diagonal = diagonal[: len(diagonal) // span * span]
    sizes = [float(size) for size in diagonal]
    got = column_order(torch.tensor(sizes), columns, order, span).tolist()
    assert got == order_by_definition(sizes, columns, order, span)


@pytest.mark.parametrize("order", ["group_aware", "activation"])
def test_blocks_that_do_not_divide_are_solved_in_the_order_asked_for(order: str) -> None:
    weight, moment = problem(128, 200, seed=5, tokens=700)
    grid, s = Grid(type="fp8-block"), Gptq(order=order)
    done = gptq(weight, grid, s, moment)
    assert done.linear.scales.shape == (1, 2)
    n = weight.shape[1]
    perm = order_by_definition(moment.diagonal().tolist(), 128, order, 128)
    assert perm != list(range(n))
    natural = gptq(weight, grid, Gptq(order="natural"), moment)
    assert not torch.equal(done.linear.codes, natural.linear.codes)
    nearest = rtn(weight, grid, Rtn(), moment).linear
    ours, theirs = (output_power(q.dequantize() - weight, moment).sum() for q in (done.linear, nearest))
    assert ours < theirs


def test_nvfp4s_global_scale_is_that_of_the_weight_qep_made() -> None:
    """Its largest weight may pass the one that was read: a scale fixed before would clip it."""
    weight, moment = problem(16, 32, seed=4)
    drift = 4 * moment  # the original's inputs are five times as large: W + 4 W
    grid, s = Grid(type="nvfp4"), Gptq(error_correction=1, damp=1e-6, order="natural")
    done = gptq(weight, grid, s, moment, drift)
    assert done.linear.global_scale is not None
    assert torch.equal(done.linear.global_scale, global_scale(5 * weight, grid))
    largest = (5 * weight).abs().amax()
    assert done.linear.dequantize().abs().amax() > 0.8 * largest
    assert done.note is None


def test_groups_that_outgrow_nvfp4s_global_scale_are_told() -> None:
    """Feedback makes the last group large, after the scale was fixed: all its inputs follow those of the first one."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=g)
    inputs = torch.cat([100 * x, x + 0.01 * torch.randn(400, 16, generator=g)], 1)
    weight = torch.cat([0.9 * torch.ones(4, 16), 0.01 * torch.ones(4, 16)], 1)
    weight[:, 0] = 6 * 448 / 2**11 / 1.89  # as large as a global scale of 2^11 allows
    grid, s = Grid(type="nvfp4", scale_search="minmax"), Gptq(order="natural", damp=1e-6)
    done = gptq(weight, grid, s, inputs.T @ inputs)
    assert done.note is not None
    assert "of 8 groups outgrew the global scale and are clipped" in done.note
    assert torch.isfinite(done.linear.dequantize()).all()


def test_corrected_is_the_least_squares_weight() -> None:
    """Full strength, no damping to speak of: no other weight makes less error of the inputs at hand."""
    torch.manual_seed(0)
    original = torch.randn(200, 24, dtype=torch.float64)
    actual = original + 0.1 * torch.randn(200, 24, dtype=torch.float64)
    weight = torch.randn(5, 24, dtype=torch.float64)
    moment, drift = actual.T @ actual, (original - actual).T @ actual
    best = torch.linalg.lstsq(actual, original @ weight.T).solution.T
    order = torch.randperm(24)
    factored = factor(moment[order][:, order], 1e-12)
    torch.testing.assert_close(corrected(weight, weight @ drift, order, factored, 1.0), best)
    torch.testing.assert_close(corrected(weight, weight @ drift, order, factored, 0.5), (weight + best) / 2)
    torch.testing.assert_close(corrected(weight, torch.zeros_like(weight), order, factored, 1.0), weight)


def corrected(
    weight: Tensor, moved: Tensor, order: Tensor, factored: tuple[Tensor, Tensor, float], strength: float
) -> Tensor:
    """[out, in], after `correct_`, whose answer is moved H^-1 moved^T of each row."""
    w, back = weight.T[order].contiguous(), order.argsort()
    gain = correct_(w, moved.T[order].contiguous(), *factored[:2], strength)
    if strength:
        torch.testing.assert_close(gain, ((w[back].T - weight) * moved).sum(1) / strength)
    return w[back].T


@pytest.mark.parametrize("order", ["group_aware", "activation", "natural"])
@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_the_error_it_knows_is_that_of_the_rounded_weight(order: Literal["natural"], damp: float) -> None:
    """With a column no token reaches, and QEP's correction at several strengths."""
    make = torch.Generator().manual_seed(2)
    original = torch.randn(300, 64, generator=make, dtype=torch.float64)
    actual = original + 0.1 * torch.randn(300, 64, generator=make, dtype=torch.float64)
    original[:, 5] = actual[:, 5] = 0
    weight = torch.randn(9, 64, generator=make, dtype=torch.float64)
    moment, drift = actual.T @ actual, (original - actual).T @ actual
    for told, strength in ((None, 0.5), (drift, 0.5), (drift, 1.0)):
        s = Gptq(order=order, damp=damp, error_correction=strength)
        done = gptq(weight, Grid(bits=4, group_size=16), s, moment, told)
        assert done.weight is not None
        assert torch.equal(done.weight, done.linear.dequantize())
        wanted = output_power(done.weight.double() - weight, moment)
        torch.testing.assert_close(done.off_power, wanted, rtol=1e-3, atol=0)


def test_a_wide_hessian_is_factored_and_corrected_in_parts() -> None:
    """300 columns are three panels: as the inverse in one piece gives it."""
    make = torch.Generator().manual_seed(3)
    x = torch.randn(900, 300, generator=make, dtype=torch.float64)
    moment, order = x.T @ x, torch.randperm(300, generator=make)
    weight, moved = torch.randn(2, 7, 300, generator=make, dtype=torch.float64)
    feedback, variance, _ = factor(moment[order][:, order], 1e-12)
    upper = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    torch.testing.assert_close(variance, upper.diagonal().square().reciprocal())
    torch.testing.assert_close(feedback, -(upper / upper.diagonal()[:, None]).T.tril(-1))
    found = corrected(weight, moved, order, (feedback, variance, 0.0), 0.5)
    torch.testing.assert_close(found, weight + 0.5 * torch.linalg.solve(moment, moved.T).T)


def test_qep_brings_the_output_closer_to_the_originals() -> None:
    make = torch.Generator().manual_seed(8)
    original = torch.randn(600, 64, generator=make) @ (torch.randn(64, 64, generator=make) / 8 + torch.eye(64))
    actual = original + 0.2 * torch.randn(600, 64, generator=make) @ torch.randn(64, 64, generator=make) / 8
    weight = torch.randn(32, 64, generator=make) * 0.1
    moment, drift = actual.T @ actual, (original - actual).T @ actual
    grid = Grid(bits=4, group_size=32, symmetric=False)

    def off(done: Tensor) -> float:
        return (actual @ done.T - original @ weight.T).square().sum().item()

    s = Gptq(error_correction=0.5)
    plain = gptq(weight, grid, s, moment, None).linear.dequantize()
    assert off(gptq(weight, grid, s, moment, drift).linear.dequantize()) < 0.9 * off(plain)
