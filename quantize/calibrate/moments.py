"""The second moments of a linear's inputs, summed over rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..methods.symmetric_products import panels


class Moments:
    """Sums over rows of a linear's inputs X and of D = X0 - X: X^T X, D^T X (the drift) and D^T D."""

    def __init__(self, *, diagonal: bool) -> None:
        self._diagonal = diagonal
        self._moment: Tensor | None = None
        self._squares: Tensor | None = None  # D^T D [in, in], its upper triangle
        self.drift: Tensor | None = None
        self.tokens, self.unmatched = 0, False

    def add(self, seen: Tensor, original: Tensor | None) -> None:
        """Add rows of X [tokens, in] in the model's dtype, and the same rows of X0."""
        if self._diagonal:
            squares = seen.to(torch.float32).square().sum(0)
            self._moment = squares if self._moment is None else self._moment.add_(squares)
            return
        if self._moment is None:
            self._moment = seen.new_zeros(seen.shape[1], seen.shape[1], dtype=torch.float32)
        add_product(self._moment, seen, seen)
        if original is None:
            return
        if self.drift is None or self._squares is None:
            self.drift, self._squares = torch.zeros_like(self._moment), torch.zeros_like(self._moment)
        # The difference is small: bfloat16's 8 bits of it are enough, at twice the speed.
        factor = seen if seen.dtype == torch.bfloat16 else seen.to(torch.float32)
        difference = original - factor
        if seen.is_cuda:
            add_product(self.drift, difference, factor)
        else:
            self.drift += difference.T @ factor
        add_product(self._squares, difference, difference)

    def count(self, x: Tensor, *, unmatched: bool) -> None:
        """Count a batch x [tokens, in] whose rows have been added."""
        self.tokens += x.shape[0]
        self.unmatched |= unmatched

    def moment(self) -> Tensor | None:
        """X^T X [in, in], or its diagonal [in]; None when no row has passed."""
        return self._moment if self._moment is None or self._diagonal else _whole(self._moment)

    def drift_moment(self) -> Tensor:
        """D^T D [in, in]."""
        assert self._squares is not None
        return _whole(self._squares)


def _whole(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle; made in place."""
    return upper.triu_().add_(upper.triu(1).T)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` [in, in] float32, for rows [tokens, in]; of a symmetric product on a CPU only the
    upper triangle, below which `total` is undefined.

    Factors of 16 bits are multiplied exactly, and their products summed in float32. A GPU takes them as they are.
    """
    if left.is_cuda and _sums_in_float32(left.device, left.dtype):
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
        return
    with exact_products(left.dtype):
        if left is right:
            add_second_moment(total, left.to(torch.float32))
        else:
            total.addmm_(left.to(torch.float32).T, right.to(torch.float32))


@cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies values of 16 bits as they are and sums up in float32: tried once, on whole numbers, of
    which every product and sum is exact.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    numbers = torch.arange(512 * 96, device=device).reshape(512, 96) * 7 % 31 - 15
    wanted = torch.eye(96, device=device, dtype=torch.float64) + numbers.double().T @ numbers.double()
    rows, total = numbers.to(dtype), torch.eye(96, device=device)
    try:
        torch.addmm(total, rows.T, rows, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total.double(), wanted)


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    """Add X^T X to the upper triangle of `total` [in, in] for X = rows [tokens, in] float32; below it, undefined."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for part in panels(rows.shape[1]):
        total[part, part.start :].addmm_(rows[:, part].T, rows[:, part.start :])


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices whose values came from `dtype` use faster units that multiply them exactly.

    AMX's bfloat16 and TF32 represent bfloat16 values exactly, TF32 also float16 values; sums stay float32.
    """
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    gpu: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        gpu.fp32_precision = "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
