"""Sums as a GPU makes them, computed on the CPU, beside the plain sums."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.calibrate import moments
from quantpress.calibrate.moments import Moments, drift_powers, end_lanes

WIDTH = 40


def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit factors with float32 sums, which a CPU lacks."""

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        product = left.to(out_dtype) @ right.to(out_dtype)
        return product if out is None else out.copy_(product)

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total is out
        return out.add_(left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
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


def test_a_large_symmetric_matrix_is_mirrored_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    wanted = moments._whole(x.clone())
    assert torch.equal(wanted, wanted.mT)
    monkeypatch.setattr(moments, "_COPIED", 0)
    torch.testing.assert_close(moments._whole(x.clone()), wanted, rtol=0, atol=0)
