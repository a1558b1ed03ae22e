"""Orthogonal matrices of the transform `hadamard`: Hadamard where an order has one, a random one elsewhere."""

import pytest
import torch

from quantpress.methods.hadamard import Rotation, hadamard_factors


@pytest.mark.parametrize(
    "n",
    [1, 2, 12, 16, 20, 28, 36, 64, 80, 96, 128, 192, 256, 512, 576, 640, 896, 960, 1408, 1536, 2048, 2304, 4096],
)
def test_hadamard_matrices_are_orthogonal_and_flat(n: int) -> None:
    R = Rotation(n, seed=3)(torch.eye(n, dtype=torch.float64))
    # Of large ones the product with R^T is compared by what it makes of random vectors, in which no error cancels.
    x = torch.eye(n, dtype=torch.float64) if n <= 640 else torch.randn(n, 64, dtype=torch.float64)
    torch.testing.assert_close(R @ (R.T @ x), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(R.abs(), torch.full_like(R, n**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [2560, 3072, 3584, 5120, 6656, 2880, 7168, 8192, 16384])
def test_sizes_of_larger_models_have_one_too(n: int) -> None:
    R = Rotation(n, seed=0)
    assert R.is_hadamard
    assert max(len(factor) for factor in R.factors) < 400  # so that it is applied in less than n operations a value
    x = torch.randn(2, n, dtype=torch.float64)
    torch.testing.assert_close(R(x).square().sum(1), x.square().sum(1))


@pytest.mark.parametrize("n", [3, 10, 100, 250])
def test_other_sizes_get_a_random_orthogonal_matrix(n: int) -> None:
    assert hadamard_factors(n) is None
    R = Rotation(n, seed=3)(torch.eye(n, dtype=torch.float64))
    # Of large ones the product with R^T is compared by what it makes of random vectors, in which no error cancels.
    x = torch.eye(n, dtype=torch.float64) if n <= 640 else torch.randn(n, 64, dtype=torch.float64)
    torch.testing.assert_close(R @ (R.T @ x), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [64, 576, 1408, 4096])
def test_factor_by_factor_equals_the_whole_product(n: int) -> None:
    R = Rotation(n, seed=1)
    H = torch.ones(1, 1, dtype=torch.float64)
    for factor in R.factors:
        H = torch.kron(H, factor)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(R(x), x @ (R.signs[:, None] * H))


def test_seeds_differ_and_repeat() -> None:
    x = torch.ones(64, dtype=torch.float64)
    assert torch.equal(Rotation(64, 0)(x), Rotation(64, 0)(x))
    assert not torch.equal(Rotation(64, 0)(x), Rotation(64, 1)(x))
