"""What a run sets of the process, and that it is as it was afterwards."""

from collections.abc import Iterator

import pytest
import torch

from quantpress.core.machine import exact_float32_products

BACKENDS = torch.backends


def state() -> dict[str, str]:
    """How each operator multiplies float32 numbers."""
    found = {"mkldnn matmul": BACKENDS.mkldnn.matmul.fp32_precision, "cuda": BACKENDS.cuda.matmul.fp32_precision}
    return found | {
        "cudnn conv": BACKENDS.cudnn.conv.fp32_precision,
        "mkldnn conv": BACKENDS.mkldnn.conv.fp32_precision,
    }


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.mkldnn.matmul.fp32_precision = before["mkldnn matmul"]
    BACKENDS.cuda.matmul.fp32_precision = before["cuda"]
    assert state() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_products_are_exact_inside_and_as_they_were_outside(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = state()
    with exact_float32_products():
        assert torch.get_float32_matmul_precision() == "highest"
        assert set(state().values()) == {"ieee"}
    assert torch.get_float32_matmul_precision() == precision
    assert state() == before


def test_what_was_set_operator_by_operator_comes_back_too_after_an_error() -> None:
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()  # no one word says it
    before = state()
    with pytest.raises(KeyError, match="inside"), exact_float32_products():
        raise KeyError("inside" if set(state().values()) == {"ieee"} else "not exact")
    assert state() == before


def test_products_inside_are_those_of_float32() -> None:
    """On CPUs with instructions for bfloat16 the shortened product shows; on others both are the same."""
    torch.set_float32_matmul_precision("medium")
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    with exact_float32_products():
        inside = a @ a
    assert ((inside - a.double() @ a.double()).abs().max()) < 1e-3
