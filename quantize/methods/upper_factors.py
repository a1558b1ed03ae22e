"""Cholesky factors of many matrices at once, in place: H = A A^T with A upper triangular.

Blocks of columns are worked off with products of whole matrices, which a GPU does best; a library's own factorisation
of one matrix takes as long, of many of them longer, and needs a second copy, which for a linear of 53,248 inputs is
11 GB. A is never inverted, only its diagonal blocks are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.products import tf32_products
from .layout_kernels import split_in_halves

_BLOCK, _WIDE_BLOCK = 1024, 2048  # columns factored at a time, and of a matrix of more than _WIDE
_WIDE = 16384  # above it launches count for more than what narrower blocks save


@dataclass(frozen=True)
class UpperFactor:
    """H = T diag(variance) T^T of each matrix, T upper triangular with ones on its diagonal: A less A's diagonal.

    above [matrices, n, n]: T above its diagonal; on it 0, below it undefined. variance [matrices, n]. inverses: of T's
    diagonal blocks [matrices, b, b], the first first. sound [matrices]: whether H is positive definite; else undefined.
    """

    above: Tensor
    variance: Tensor
    inverses: list[Tensor]
    sound: Tensor

    def replace(self, at: Tensor, others: "UpperFactor") -> None:
        """Put other factors in the places `at`, int64."""
        for mine, new in zip(self._tensors(), others._tensors(), strict=True):
            mine[at] = new

    def _tensors(self) -> list[Tensor]:
        return [self.above, self.variance, self.sound, *self.inverses]

    def add_ahead(self, start: int, to: Tensor, x: Tensor) -> Tensor:
        """to + T_gg^-T x, with T_gg as many rows and columns of T from `start` on as to, x [matrices, rows, columns]
        have rows.
        """
        stop = start + x.shape[1]
        if not start and stop == self.above.shape[-1]:
            with tf32_products():
                return self.solve_transposed_(x.clone()).add_(to)
        for (begin, end), inverse in zip(_blocks(self.above.shape[-1]), self.inverses, strict=True):
            if begin <= start and stop <= end:
                here = slice(start - begin, stop - begin)
                return torch.baddbmm(to, inverse[:, here, here].mT, x)
        within = self.above[:, start:stop, start:stop].mT
        ahead: Tensor = torch.linalg.solve_triangular(within, x, upper=False, unitriangular=True)
        return to + ahead

    def solve_(self, x: Tensor) -> Tensor:
        """Replace x [matrices, n, columns] by T^-1 x."""
        n = x.shape[1]
        for (start, stop), inverse in reversed(list(zip(_blocks(n), self.inverses, strict=True))):
            rest = x[:, start:stop]
            if stop < n:
                rest = torch.baddbmm(rest, self.above[:, start:stop, stop:], x[:, stop:], alpha=-1)
            x[:, start:stop] = torch.bmm(inverse, rest)
        return x

    def solve_transposed_(self, x: Tensor) -> Tensor:
        """Replace x [matrices, n, columns] by T^-T x."""
        for (start, stop), inverse in zip(_blocks(x.shape[1]), self.inverses, strict=True):
            rest = x[:, start:stop]
            if start:
                rest = torch.baddbmm(rest, self.above[:, :start, start:stop].mT, x[:, :start], alpha=-1)
            x[:, start:stop] = torch.bmm(inverse.mT, rest)
        return x


def factor_upper_(h: Tensor) -> UpperFactor:
    """Factor h [matrices, n, n], symmetric, of which the upper triangle is read; its memory is taken over."""
    blocks = _blocks(h.shape[-1])
    failed: list[Tensor] = []
    inverses: list[Tensor] = []
    roots: list[Tensor] = []
    eye = torch.eye(blocks[0][1], dtype=h.dtype, device=h.device)
    for start, stop in reversed(blocks):
        here, size = slice(start, stop), stop - start
        # The library factors L L^T, from one triangle; with rows and columns reversed that is A A^T.
        flipped, info = torch.linalg.cholesky_ex(h[:, here, here].flip(-2, -1))
        failed.append(info)
        inverse = torch.linalg.solve_triangular(flipped, eye[:size, :size].expand_as(flipped), upper=False)
        inverses.append(inverse.flip(-2, -1))
        corner, panel = flipped.flip(-2, -1), h[:, :start, here]
        roots.append(corner.diagonal(dim1=-2, dim2=-1).clone())
        if start:
            left, _ = _factors(panel)
            _, right = _factors(inverses[-1])
            with tf32_products():
                torch.bmm(left, right.mT, out=panel)
            left, right = _factors(panel)
            with tf32_products():
                for begin, end in blocks[: -len(inverses)]:  # the parts that reach above the diagonal
                    h[:, :end, begin:end].baddbmm_(left[:, :end], right[:, begin:end].mT, alpha=-1)
            panel.div_(roots[-1][:, None, :])
            del left, right
        h[:, here, here] = corner / roots[-1][:, None, :]
    roots.reverse()
    inverses.reverse()
    root = torch.cat(roots, -1)
    sound = (torch.stack(failed) == 0).all(0) & root.isfinite().all(-1)  # any NaN or inf reaches the diagonal
    h.diagonal(dim1=-2, dim2=-1).zero_()
    for own, inverse in zip(roots, inverses, strict=True):
        inverse.mul_(own[:, :, None])
    return UpperFactor(h, root.square_(), inverses, sound)


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [matrices, rows, n], what x is multiplied as on the left of a y^T, and what y is, of another.

    Of float32 on a GPU the product is nearly as exact as float32's where TF32 is allowed.
    """
    if not x.is_cuda or x.dtype != torch.float32:
        x = x.clone()  # of which a product may take the place
        return x, x
    halves, n = split_in_halves(x), x.shape[-1]
    return halves[..., : 3 * n], halves[..., n:]


def _blocks(n: int) -> list[tuple[int, int]]:
    size = _BLOCK if n <= _WIDE else _WIDE_BLOCK
    return [(start, min(start + size, n)) for start in range(0, n, size)]
