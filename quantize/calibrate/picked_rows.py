"""Sums of squares over many rows, from some of them that are picked by their size."""

from functools import cache

import torch
from torch import Tensor

# One row in 16 is picked and at least so many; where all are so little work, all are taken.
_SHARE, _FEWEST, _LITTLE = 16, 1024, 1 << 37


def sampled_rows(x: Tensor) -> Tensor:
    """Rows of x [tokens, in], scaled so that the sum of their squares S^T S is X^T X in the mean; few are all of them.

    With shares |x_t|^2 / ||x||^2, the choice of the least expected error.
    """
    count = _picks(len(x), x.shape[1] ** 2)
    if not count:
        return x
    picked, scale = _picked(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_(), count)
    return x[picked].mul_(scale.to(x.dtype)[:, None])


def missed_squares(wanted: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The sum of the squares of each column of Y - X W^T [out], for wanted = Y [tokens, out] and x = X [tokens, in].

    Of many rows some are picked, half of them by their |y_t|^2: those that are off by much are often large.
    """
    count, scale = _picks(len(x), weight.numel()), None
    if count:
        norms = torch.linalg.vector_norm(wanted, dim=1, dtype=torch.float32).square_()
        picked, scale = _picked(norms, count, evenly=True)
        wanted, x = wanted[picked], x[picked]
    off = wanted - torch.mm(x, weight.T, out_dtype=torch.float32)
    return column_squares(off if scale is None else off.mul_(scale[:, None]))


def column_squares(x: Tensor) -> Tensor:
    """The sum of the squares of each column of x [tokens, in], in float32; a GPU reads x once and makes no copies."""
    if x.is_cuda:
        norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)
        return norms.square_()
    return x.to(torch.float32).square().sum(0)


def _picks(rows: int, work: int) -> int:
    """How many of so many rows, each of so much work, are picked to stand for all; 0 if all are taken."""
    count = max(_FEWEST, rows // _SHARE)
    return count if 2 * count <= rows and rows * work >= _LITTLE else 0


def _picked(shares: Tensor, count: int, *, evenly: bool = False) -> tuple[Tensor, Tensor]:
    """Picks among rows in proportion to their `shares` [rows], float32 and not negative, at even steps of their sum.

    evenly: half of them; the others without regard to their shares. And what each pick is multiplied by, so that
    squares summed over picks are those summed over rows, in the mean (Drineas, Kannan and Mahoney, doi
    10.1137/S0097539704442684, section 4). A row that outweighs others is always picked.
    """
    whole = count << 30
    least, places = _constants(count, shares.device)
    parts = (shares / torch.add(least, shares.sum(), alpha=1 / whole)).to(torch.int64)
    # Whole numbers, of which a GPU's sums are always the same.
    ends = parts.add_(whole // len(shares) if evenly else 1).cumsum(0)
    points = ends[-1].div(2 * count, rounding_mode="floor") * places
    picked = torch.searchsorted(ends, points[1:], right=True)
    return picked, (points[0] / parts[picked]).sqrt_()


@cache
def _constants(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is added so that nothing is divided by 0; and, in half steps, a step's length and the places of picks."""
    return torch.tensor(1e-30, device=device), torch.tensor([2, *range(1, 2 * count, 2)], device=device)
