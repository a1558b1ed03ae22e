"""Cholesky factors of many matrices at once, in place: H = A A^T with A upper triangular, and A^-1.

Blocks of columns are worked off with products of whole matrices, which a GPU does best; a library's own factorisation
of one matrix takes as long, of many of them longer, and needs a second copy, which for a linear of 53,248 inputs is
11 GB.
"""

import torch
from torch import Tensor

_BLOCK = 512  # columns factored at a time
_STRIP = 2048  # columns updated in one product; only those parts that reach above the diagonal are


def factor_upper_(h: Tensor) -> tuple[list[Tensor], Tensor]:
    """Replace h [matrices, n, n], symmetric, by A. Returns the inverses [matrices, b, b] of A's diagonal blocks, the
    last first, and info int32 [matrices], 0 where the matrix is positive definite.
    """
    n = h.shape[-1]
    info = torch.zeros(len(h), dtype=torch.int32, device=h.device)
    inverses = []
    for start, stop in reversed(_blocks(n)):
        here = slice(start, stop)
        block = h[:, here, here]
        # The library factors L L^T, from one triangle; with rows and columns reversed that is A A^T.
        flipped, failed = torch.linalg.cholesky_ex(block.flip(-2, -1))
        info += failed.abs()
        eye = torch.eye(stop - start, dtype=h.dtype, device=h.device).expand_as(flipped)
        inverse = torch.linalg.solve_triangular(flipped, eye, upper=False).flip(-2, -1)
        block.copy_(flipped.flip(-2, -1))
        inverses.append(inverse)
        if not start:
            break
        panel = h[:, :start, here]
        panel.copy_(panel @ inverse.mT)
        for left in range(0, start, _STRIP):
            right = min(left + _STRIP, start)
            h[:, :right, left:right].baddbmm_(panel[:, :right], panel[:, left:right].mT, alpha=-1)
    h.triu_()
    return inverses, info


def invert_upper_(a: Tensor, inverses: list[Tensor]) -> None:
    """Replace A [matrices, n, n] by A^-1; `inverses` of its diagonal blocks as `factor_upper_` returns them."""
    for (start, stop), inverse in zip(_blocks(a.shape[-1]), reversed(inverses), strict=True):
        here = slice(start, stop)
        if start:
            panel = a[:, :start, here] @ inverse
            for top in range(0, start, _STRIP):
                bottom = min(top + _STRIP, start)
                a[:, top:bottom, here] = torch.bmm(a[:, top:bottom, top:start], panel[:, top:]).neg_()
        a[:, here, here] = inverse


def _blocks(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK)]
