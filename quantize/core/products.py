"""In which precision matrices are multiplied."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_UNITS = {  # instructions that multiply numbers of a type, by their names in torch.cpu.get_capabilities
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "arm_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "arm_fp16"),
}
_PRODUCTS = {
    torch.nn.functional.linear, torch.nn.functional.conv1d, torch.einsum,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm,
}  # fmt: skip


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever the process or its environment has allowed; restored afterwards.

    `torch.set_float32_matmul_precision("high")` and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE shorten float32 numbers to TF32
    (10 bits of mantissa) or bfloat16 (7) before they are multiplied, on CPUs too; cuDNN does so in convolutions
    unless told otherwise. A Hessian made so need not be positive definite, and the bytes of an artifact would depend on
    what else runs in the process.
    """
    of: Any = torch.backends
    operators = (of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn)
    before = [operator.fp32_precision for operator in operators]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None  # set operator by operator, not by one word for all
    torch.set_float32_matmul_precision("highest")
    for operator in operators:
        operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let a GPU multiply float32 matrices as TF32 (10 bits of mantissa, float32 sums), eight times as fast."""
    gpu: Any = torch.backends.cuda.matmul
    before = gpu.fp32_precision
    gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        gpu.fp32_precision = before


def multiplies(dtype: torch.dtype, where: torch.device) -> bool:
    """Whether `where` has instructions for products of `dtype`, bfloat16 or float16: else float32 ones are faster."""
    if where.type == "cuda":
        return dtype == torch.float16 or bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in _UNITS[dtype])


@contextmanager
def fast_16_bit_products() -> Iterator[None]:
    """On a CPU without instructions for products of 16-bit floats, multiply those as float32 and round the results.

    That is what such instructions do, too: products and sums in float32. Left to itself torch takes 7 times as long for
    x W^T there, and 30 times for what a backward pass multiplies. Attention that is one operation is as fast as it is.
    """
    slow = frozenset(dtype for dtype in _UNITS if not multiplies(dtype, torch.device("cpu")))
    if slow:
        with _InFloat32(slow):
            yield
    else:
        yield


@contextmanager
def no_16_bit_products() -> Iterator[None]:
    """Inside is no product of 16-bit floats: `fast_16_bit_products` need not look at every operation there, which
    doubles the time of one that takes a few microseconds.
    """
    with torch._C.DisableTorchFunction():
        yield


class _InFloat32(TorchFunctionMode):
    def __init__(self, slow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._slow = slow

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and kwargs.keys().isdisjoint(("out", "out_dtype")):
            first = next((x for x in args if isinstance(x, Tensor)), None)
            if first is not None and first.dtype in self._slow and first.device.type == "cpu":
                dtype = first.dtype
                wide = {name: _widened(x, dtype) for name, x in kwargs.items()}
                return func(*(_widened(x, dtype) for x in args), **wide).to(dtype)
        return func(*args, **kwargs)


def _widened(x: Any, dtype: torch.dtype) -> Any:
    """A tensor of this type as float32, anything else as it is: a mistake in types is torch's to tell."""
    return x.float() if isinstance(x, Tensor) and x.dtype == dtype else x
