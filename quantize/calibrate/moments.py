"""The second moments of a linear's inputs, summed over rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.ranks import ALONE, Ranks
from ..methods.symmetric_products import panels


class Moments:
    """Sums over rows of a linear's inputs X and of D = X0 - X: X^T X, D^T X (the drift) and D^T D.

    Of all processes of a run: each adds the rows of its lane, `end_lane` joins them, `finish` ends it. like: a tensor
    of the device. width: columns of X. paired: whether there may be a D. diagonal: only X^T X, and its diagonal only.
    """

    def __init__(
        self, like: Tensor, width: int, *, paired: bool = False, diagonal: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self._like, self._diagonal, self._ranks = like, diagonal, ranks
        self._shape = (width,) if diagonal else (width, width)
        self._names = ("moment", "drift", "squares") if paired and not diagonal else ("moment",)
        self._lane: dict[str, Tensor] = {}  # X^T X and D^T D: their upper triangles
        self._sums: dict[str, Tensor] = {}
        self.tokens, self.unmatched = 0, False

    def add(self, seen: Tensor, original: Tensor | None) -> None:
        """Add rows of X [tokens, in] in the model's dtype, and the same rows of X0."""
        if self._diagonal:
            self._of_lane("moment").add_(seen.to(torch.float32).square().sum(0))
            return
        add_product(self._of_lane("moment"), seen, seen)
        if original is None:
            return
        # The difference is small: bfloat16's 8 bits of it are enough, at twice the speed.
        factor = seen if seen.dtype == torch.bfloat16 else seen.to(torch.float32)
        difference, drift = original - factor, self._of_lane("drift")
        if seen.is_cuda:
            add_product(drift, difference, factor)
        else:
            drift += difference.T @ factor
        add_product(self._of_lane("squares"), difference, difference)

    def count(self, x: Tensor, *, unmatched: bool) -> None:
        """Count a batch x [tokens, in] whose rows have been added."""
        self.tokens += x.shape[0]
        self.unmatched |= unmatched

    def end_lane(self, holders: int) -> None:
        """Add the lane of this process, and those of the others; the first `holders` of them have one."""
        for name in self._names if self._ranks.size > 1 else tuple(self._lane):
            lane = self._of_lane(name)
            before = self._sums.get(name)
            self._sums[name] = self._ranks.add(before, lane, holders)
            if self._sums[name] is lane:
                del self._lane[name]
            else:
                lane.zero_()

    def finish(self, tokens: int, unmatched: bool) -> None:
        """No more rows come. tokens, unmatched: of all processes."""
        self.tokens, self.unmatched = tokens, unmatched
        self._lane.clear()
        if not tokens:
            self._sums.clear()
        self._sums = {name: self._ranks.whole(part, self._shape[0]) for name, part in self._sums.items()}

    @property
    def drift(self) -> Tensor | None:
        """D^T X [in, in]; None when no row of D has passed."""
        return self._sums.get("drift")

    def moment(self) -> Tensor | None:
        """X^T X [in, in], or its diagonal [in]; None when no row has passed."""
        moment = self._sums.get("moment")
        return moment if moment is None or self._diagonal else _whole(moment)

    def drift_moment(self) -> Tensor:
        """D^T D [in, in]."""
        return _whole(self._sums["squares"])

    def _of_lane(self, name: str) -> Tensor:
        if name not in self._lane:
            self._lane[name] = self._like.new_zeros(self._shape, dtype=torch.float32)
        return self._lane[name]


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
