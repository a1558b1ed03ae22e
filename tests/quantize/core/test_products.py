"""In which precision matrices are multiplied, and that the process is as it was afterwards."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from quantpress.core.products import exact_float32_products, fast_16_bit_products, multiplies, no_16_bit_products

from ...multiplied import Multiplied

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


THERE = torch.device("cpu")


def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda a, b, bias: F.linear(a, b, bias),
    "linear, bias by name": lambda a, b, bias: F.linear(a, b, bias=bias),
    "at": lambda a, b, _: a @ b.T,
    "matmul": lambda a, b, _: torch.matmul(a, b.T),
    "method": lambda a, b, _: a.matmul(b.T),
    "mm": lambda a, b, _: torch.mm(a, b.T),
    "addmm": lambda a, b, bias: torch.addmm(bias, a, b.T),
    "bmm": lambda a, b, _: torch.bmm(a[None], b.T[None]),
    "baddbmm": lambda a, b, bias: torch.baddbmm(bias, a[None], b.T[None]),
    "einsum": lambda a, b, _: torch.einsum("ij,kj->ik", a, b),
    "convolution": lambda a, b, bias: F.conv1d(a.T[None], b[:, :, None], bias),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_instructions_for_them_16_bit_products_are_float32_ones_rounded_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_units(monkeypatch)
    g = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((5, 64), (7, 64), (7,)))
    a.requires_grad_()
    with Multiplied() as seen, fast_16_bit_products():
        found = PRODUCTS[name](a, b, bias)
        (gradient,) = torch.autograd.grad(found.float().square().sum(), a)
    wide = [x.detach().double() for x in (a, b, bias)]
    wide[0].requires_grad_()
    wanted = PRODUCTS[name](*wide)
    (expected,) = torch.autograd.grad(wanted.square().sum(), wide[0])
    assert seen.types == {torch.float32}
    assert found.dtype == gradient.dtype == dtype
    step = torch.finfo(dtype).eps
    assert_close(found.double(), wanted, rtol=step, atol=step / 16)
    assert (gradient.double() - expected).norm() < 2 * step * expected.norm()


def test_other_products_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    without_units(monkeypatch)
    a = torch.randn(4, 4)
    with fast_16_bit_products():
        assert (a @ a).dtype == torch.float32
        assert torch.equal(
            torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), 2)
        )
        with pytest.raises(RuntimeError, match="same dtype"):
            a @ a.bfloat16()
        with pytest.raises(RuntimeError, match="same dtype"):
            a.bfloat16() @ a.double()
        out = torch.empty(4, 4, dtype=torch.bfloat16)
        assert torch.mm(a.bfloat16(), a.bfloat16(), out=out) is out


def test_where_none_is_announced_no_operation_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    without_units(monkeypatch)
    a = torch.randn(4, 4).bfloat16()
    with fast_16_bit_products(), Multiplied() as seen:
        with no_16_bit_products():
            a @ a
        assert seen.types == {torch.bfloat16}
        seen.types.clear()
        a @ a
        assert seen.types == {torch.float32}


def test_with_the_instructions_nothing_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx512_fp16": False})
    assert multiplies(torch.bfloat16, THERE)
    assert not multiplies(torch.float16, THERE)
    x = torch.ones(2, 2)
    with Multiplied() as seen, fast_16_bit_products():
        x.bfloat16() @ x.bfloat16()
        assert seen.types == {torch.bfloat16}
        seen.types.clear()
        x.half() @ x.half()
    assert seen.types == {torch.float32}
