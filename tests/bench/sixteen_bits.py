"""Products of 16-bit factors with float32 sums as a GPU makes them, computed on a CPU, which lacks them."""

from typing import Any

import torch
from torch import Tensor

_mm, _addmm = torch.mm, torch.addmm


def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """`torch.mm`, with `out_dtype` too."""
    if out_dtype is None:
        return _mm(left, right, out=out)
    product = left.to(out_dtype) @ right.to(out_dtype)
    return product if out is None else out.copy_(product)


def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: Any = None, **options: Any) -> Tensor:
    """`torch.addmm`; with `out_dtype` into the tensor it adds to."""
    if out_dtype is None:
        return _addmm(total, left, right, **options)
    assert total is options["out"]
    return total.add_(left.to(out_dtype) @ right.to(out_dtype))
