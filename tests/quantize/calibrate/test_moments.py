"""Sums as a GPU makes them, computed on the CPU, beside the plain sums."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.calibrate import moments, picked_rows
from quantpress.calibrate.moments import Moments, drift_powers, end_lanes

from ...bench import sixteen_bits

WIDTH = 40


def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit factors with float32 sums, which a CPU lacks."""
    monkeypatch.setattr(torch, "mm", sixteen_bits.mm)
    monkeypatch.setattr(torch, "addmm", sixteen_bits.addmm)
    monkeypatch.setattr(moments, "_sums_in_float32", lambda device, dtype: dtype == torch.bfloat16)
    for name in ("_WHOLE", "_PANEL"):
        monkeypatch.setattr(moments, name, 16)


def summed(batches: list[list[Tensor]], weights: list[Tensor] | None = None) -> list[Moments]:
    """Two inputs' sums over lanes of two batches each; the second gets no rows in the last lane."""
    sums = [Moments(torch.empty(0), WIDTH, paired=True, weights=weights or ()) for _ in range(2)]
    for at, (seen, original) in enumerate(batches):
        sums[0].add(seen, original)
        sums[1].add(*(x[: 0 if at > 3 else 5] for x in (original, seen)))
        if at % 2:
            end_lanes(sums, 1)
    for one in sums:
        one.finish(1, unmatched=False)
    return sums


def test_sums_of_sixteen_bits_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(30, WIDTH, generator=generator).bfloat16() for _ in range(2)] for _ in range(6)]
    with monkeypatch.context() as patched:
        patched.setattr(moments, "_add_of_differences", moments.add_product)
        plain = [(one.moment(), one.drift, one._sums["squares"].triu()) for one in summed(batches)]
    with monkeypatch.context() as patched:
        emulated(patched)
        fresh: Any = torch.Tensor.new_empty
        patched.setattr(torch.Tensor, "new_empty", lambda x, *args, **kw: fresh(x, *args, **kw).fill_(torch.nan))
        found = [(one.moment(), one.drift, one._sums["squares"].triu()) for one in summed(batches)]
    torch.testing.assert_close(found, plain)


def test_products_of_differences_keep_bfloat16s_bits_on_a_cpu() -> None:
    """300 columns are three panels; X^T X itself stays exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=generator).bfloat16()
    x0 = (x + 0.1 * torch.randn(200, 300, generator=generator)).bfloat16()
    sums = Moments(torch.empty(0), 300, paired=True)
    sums.add(x, x0)
    end_lanes([sums], 1)
    sums.finish(len(x), unmatched=False)
    d, moment, drift = (x0 - x).double(), sums.moment(), sums.drift
    assert moment is not None
    assert drift is not None
    torch.testing.assert_close(moment.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    for found, wanted in ((drift.double(), d.T @ x.double()), (sums._sums["squares"].double(), d.T @ d)):
        off = (found - wanted).triu()
        assert off.abs().max() > 0
        assert off.norm() < 2**-8 * wanted.triu().norm()


def test_powers_of_drifts_of_several_inputs_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_TOGETHER", 2 * WIDTH * WIDTH)
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(30, WIDTH, generator=generator) for _ in range(2)] for _ in range(2)]
    weights = [[torch.randn(rows, WIDTH, generator=generator) for rows in (7, 9)] for _ in range(4)]
    each, together = (
        list(drift_powers(weights, [*summed(batches), *summed(batches)], together=way)) for way in (False, True)
    )
    drifts = [(x0 - x) for x, x0 in batches]
    wanted = sum((d @ weights[2][1].T).square().sum(0) for d in drifts)
    torch.testing.assert_close(each[2][1], wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(each, together, strict=True):
        torch.testing.assert_close(list(one), list(other), rtol=1e-4, atol=1e-4)


def test_few_rows_have_their_outputs_summed_up_in_the_place_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(30, WIDTH, generator=generator).bfloat16() for _ in range(2)] for _ in range(6)]
    few, many = ([torch.randn(rows, WIDTH, generator=generator).bfloat16() for rows in (7, n)] for n in (9, 23))
    for weights in (few, many):
        with monkeypatch.context() as patched:
            emulated(patched)
            exact = summed(batches)
        plain = list(drift_powers([weights] * 2, exact, together=False))
        for as_on_a_gpu in (False, True):
            with monkeypatch.context() as patched:
                if as_on_a_gpu:
                    emulated(patched)
                sums = summed(batches, weights)
            assert ("squares" in sums[0]._sums) == (sums[0].drift is not None) == (weights is many)
            wanted = [
                weight.float() @ one.drift for one in summed(batches) for weight in weights if one.drift is not None
            ]
            moved = [part for one in sums for part in one.moved]
            assert moved == [] if weights is many else len(moved) == len(wanted)
            for ours, theirs in zip(moved, wanted, strict=False):  # D W^T is shortened to bfloat16
                assert (ours - theirs).norm() < 2**-8 * theirs.norm()
            found = list(drift_powers([weights] * 2, sums, together=True))
            for one, other in zip(found, plain, strict=True):
                for ours, theirs in zip(one, other, strict=True):  # squares and outputs are shortened to bfloat16
                    assert (ours - theirs).norm() < 2**-8 * theirs.norm()


def test_outputs_of_the_original_give_what_its_inputs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's outputs are bfloat16; what is summed up from them is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, WIDTH, generator=generator).bfloat16()
    seen = [torch.randn(300, WIDTH, generator=generator).bfloat16() for _ in range(4)]
    outputs = [(x + 0.1 * torch.randn(x.shape, generator=generator)).bfloat16() @ weight.T for x in seen]
    exact = [y0.double() - x.double() @ weight.double().T for x, y0 in zip(seen, outputs, strict=True)]
    moved = sum(d.T @ x.double() for d, x in zip(exact, seen, strict=True))
    power = sum(d.square().sum(0) for d in exact)
    emulated(monkeypatch)
    for picked in (False, True):
        for name, value in (("_FEWEST", 50), ("_LITTLE", 0 if picked else 1 << 60)):
            monkeypatch.setattr(picked_rows, name, value)
        sums = Moments(torch.empty(0), WIDTH, paired=True, weights=[weight], outputs=True)
        for x, y0 in zip(seen, outputs, strict=True):
            sums.add(x, y0)
            end_lanes([sums], 1)
        sums.finish(1200, unmatched=False)
        (found,), ((powers,),) = sums.moved, drift_powers([[weight]], [sums], together=True)
        assert (found - moved).norm() < 5e-4 * moved.norm()
        assert abs(powers.sum() / power.sum() - 1) < (0.03 if picked else 1e-4)


def test_a_product_with_a_moment_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 alone would be off by 2^-9 of each number of H."""
    emulated(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 300, generator=generator), torch.randn(7, 300, generator=generator).bfloat16()
    moment = x.T @ x
    total = torch.zeros(7, 300)
    moments._subtract_product(total, weight, moment)
    wanted = -weight.double() @ moment.double()
    assert (total - wanted).norm() < 2**-16 * wanted.norm()


def test_a_lane_of_one_batch_is_summed_up_at_once_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(30, WIDTH, generator=generator).bfloat16() for _ in range(2)] for _ in range(6)]
    emulated(monkeypatch)
    found = []
    for at_once in (False, True):
        sums = [Moments(torch.empty(0), WIDTH, paired=True) for _ in range(2)]
        for at, (x, x0) in enumerate(batches):
            for one, rows in zip(sums, (30, 0 if at in (0, 3) else 5), strict=True):
                one.begin_lane(1 if at_once else 2)
                one.add(x[:rows], x0[:rows])
            assert all(bool(one._lane) != at_once for one in sums[:1])
            end_lanes(sums, 1)
        for one in sums:
            one.finish(1, unmatched=False)
        found.append([(one.moment(), one.drift, one._sums["squares"].triu()) for one in sums])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("heavy", [1, 1000])
def test_rows_that_are_picked_stand_for_all(heavy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of very different sizes, one of which may outweigh all others: within the paper's bound."""
    monkeypatch.setattr(picked_rows, "_FEWEST", 256)
    monkeypatch.setattr(picked_rows, "_LITTLE", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, WIDTH, generator=generator) * torch.rand(8192, 1, generator=generator) ** 3
    x[5] *= heavy
    rows = picked_rows.sampled_rows(x)
    assert len(rows) == 512
    found, wanted = rows.T @ rows, x.T @ x
    assert abs(found.trace() / wanted.trace() - 1) < 1e-3
    assert (found - wanted).norm() < wanted.trace() / len(rows) ** 0.5
    assert not picked_rows.sampled_rows(torch.zeros(8192, WIDTH)).any()
    assert len(picked_rows.sampled_rows(x[:511])) == 511


def test_a_large_symmetric_matrix_is_mirrored_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    wanted = moments._whole(x.clone())
    assert torch.equal(wanted, wanted.mT)
    monkeypatch.setattr(moments, "_COPIED", 0)
    torch.testing.assert_close(moments._whole(x.clone()), wanted, rtol=0, atol=0)
