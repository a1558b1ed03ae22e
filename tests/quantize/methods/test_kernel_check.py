"""The trial that GPTQ's kernels must pass before they are used: it lets right ones pass and catches wrong ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantpress.methods import kernel_check
from quantpress.numbers.types import Grid
from quantpress.recipe import Gptq

pytest.importorskip("triton")
from quantpress.methods import gptq_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/gpu/check_kernels.py runs the kernels"
)
GRID, CPU = Grid(bits=4, group_size=16, symmetric=False), torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_ROWS", 8), ("_COLUMNS", 32), ("_LINEARS", 1)):
        monkeypatch.setattr(kernel_check, name, value)
    kernel_check.kernels_refused.cache_clear()


def refused() -> str | None:
    return kernel_check.kernels_refused(GRID, Gptq(), torch.float32, CPU)


def test_the_kernels_pass() -> None:
    assert refused() is None


def _one_column_lost(solve: Callable[..., None]) -> Callable[..., None]:
    def wrong(updated: Any, inside: Any, *others: Any) -> None:
        solve(updated, inside * 0, *others)

    return wrong


def _zero_off_by_one(fit: Callable[..., None]) -> Callable[..., None]:
    def wrong(*given: Any) -> None:
        fit(*given)
        given[-1][1].add_(1)

    return wrong


def _raises(solve: Callable[..., None]) -> Callable[..., None]:
    def wrong(*given: Any) -> None:
        raise RuntimeError("PassManager::run failed\nmore")

    return wrong


def _nan(solve: Callable[..., None]) -> Callable[..., None]:
    def wrong(*given: Any) -> None:
        solve(*given)
        given[6].fill_(torch.nan)

    return wrong


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [("solve_columns", _one_column_lost, "of the codes the same"), ("fit_scales", _zero_off_by_one, "the same"),
     ("solve_columns", _raises, "PassManager::run failed"), ("solve_columns", _nan, "of the codes the same")],
)  # fmt: skip
def test_wrong_kernels_are_caught(name: str, wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_batch, name, wrong(getattr(gptq_batch, name)))
    why = refused()
    assert why is not None
    assert why.startswith("rounded without GPTQ's kernels, which failed a trial on this GPU: ")
    assert said in why
    assert "\n" not in why
