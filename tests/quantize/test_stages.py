"""The sums a stage is made of."""

import pytest
import torch

from quantpress.quantize.stages import add_second_moment, exact_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [96, 300])
def test_products_of_sixteen_bit_values_lose_nothing(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    total = torch.zeros(n, n)
    with exact_products(dtype):
        for part in x.split(700):
            add_second_moment(total, part.float())
    after = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before
    wanted = x.double().T @ x.double()
    torch.testing.assert_close(total.triu().double(), wanted.triu(), rtol=1e-5, atol=2e-3)
