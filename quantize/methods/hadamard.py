"""Orthogonal matrices that spread each channel over all others: randomised Hadamard matrices of many orders."""

from functools import lru_cache, reduce

import torch
from torch import Tensor

_LARGEST_POWER = 6  # log2 of the largest Sylvester factor: two products by 64 cost less than one by 4096


class Rotation:
    """An orthogonal matrix R [n, n] from a seed: random signs times a Hadamard matrix, diag(s) H / sqrt(n).

    H is a Kronecker product of Paley's and Sylvester's matrices, applied factor by factor. Where no such product has
    order n, R is a uniformly random orthogonal matrix.
    """

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        factors = hadamard_factors(n)
        self.n, self.is_hadamard = n, factors is not None
        if factors is not None:
            self.factors = factors
            self.signs = (2 * torch.randint(2, (n,), generator=g) - 1).double()
        else:
            q, r = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
            self.factors = (q * r.diagonal().sign(),)
            self.signs = torch.ones(n, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """x R for x [..., n] in float64."""
        y = (x * self.signs).reshape(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, 1):
            y = (y.movedim(axis, -1) @ factor).movedim(-1, axis)
        return y.reshape(x.shape)


@lru_cache
def hadamard_factors(n: int) -> tuple[Tensor, ...] | None:
    """Orthogonal matrices, float64, whose Kronecker product is a Hadamard matrix of order n over sqrt(n).

    A Paley matrix covers the odd part of n with as few factors of two as it needs, Sylvester matrices the remaining
    powers of two. None where no known combination has order n.
    """
    odd, twos = n, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    factors = []
    if odd > 1:
        found = ((j, _paley(odd << j)) for j in range(2, twos + 1))
        used, first = next(((j, H) for j, H in found if H is not None), (0, None))
        if first is None:
            return None
        factors.append(first / len(first) ** 0.5)
        twos -= used
    while twos:
        power = min(twos, _LARGEST_POWER)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        factors.append(reduce(torch.kron, [two] * power) / 2 ** (power / 2))
        twos -= power
    return tuple(factors)


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix of this order, +-1: q + 1 for a prime q = 3 mod 4, 2 (q + 1) for a prime q = 1 mod 4.

    R.E.A.C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
    """
    if _is_prime(order - 1) and order % 4 == 0:
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    q = order // 2 - 1
    if order % 4 == 0 and _is_prime(q) and q % 4 == 1:
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q), on) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def _conference(q: int) -> Tensor:
    """C [q + 1, q + 1] with C C^T = q I from the squares modulo the prime q: symmetric for q = 1 mod 4, else skew."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[x * x % q for x in range(1, q)]] = 1.0
    character[0] = 0.0
    i = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:] = 1.0
    C[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    C[1:, 1:] = character[(i[:, None] - i) % q]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
