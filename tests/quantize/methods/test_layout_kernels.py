"""Kernels that lay weights out, interpreted on the CPU, against the same in torch: bit for bit but for one sum."""

import pytest
import torch
from torch import Tensor

from quantpress.methods.gptq import column_order
from quantpress.numbers.grid import QuantizedLinear, encode, snap
from quantpress.numbers.types import Grid

pytest.importorskip("triton")
from quantpress.methods import layout_kernels

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/gpu/check_kernels.py runs the kernels"
)
LINEARS, ROWS, COLUMNS = 2, 37, 336


def weights(dtype: torch.dtype) -> Tensor:
    """[linears, out, in], rows of a taller one."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(LINEARS, ROWS + 5, COLUMNS, generator=g).to(dtype)[:, 3 : ROWS + 3]


def orders(name: str, group: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return column_order(torch.rand(LINEARS, COLUMNS, generator=g), group, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("solved_in", [torch.float32, torch.float64])
def test_columns_come_first_in_solving_order(dtype: torch.dtype, solved_in: torch.dtype) -> None:
    weight, order = weights(dtype), orders("activation", 16)
    found = layout_kernels.columns_first(weight, order.argsort(-1), solved_in)
    for ours, theirs, by in zip(found, weight, order, strict=True):
        assert torch.equal(ours, theirs.T.to(solved_in)[by])


GRIDS = [
    Grid(bits=4, group_size=48, symmetric=False), Grid(bits=8, group_size=16), Grid(type="fp8"), Grid(type="mxfp4"),
    Grid(type="nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("order", "dtype"), [("group_aware", torch.bfloat16), ("activation", torch.float32)])
def test_rows_come_first_again_as_codes_and_weights(grid: Grid, order: str, dtype: torch.dtype) -> None:
    """In `activation` order groups are those of the disk, in the other those of the order."""
    weight, columns = weights(dtype), grid.columns(COLUMNS)
    by = orders(order, columns)
    back, groups = by.argsort(-1), -(-COLUMNS // columns)
    g = torch.Generator().manual_seed(2)
    scale = (torch.rand(groups, LINEARS, ROWS, generator=g) * 0.2 + 0.1).bfloat16().float()
    zero = torch.randint(0, 9, scale.shape, generator=g).float() if grid.uniform else torch.zeros_like(scale)
    natural = torch.arange(COLUMNS).expand_as(back)
    group = (natural if order == "activation" else back) // columns
    damping = torch.rand(LINEARS, COLUMNS, generator=g)
    steps, zeros = (torch.stack([x[one, i] for i, one in enumerate(group)]) for x in (scale, zero))
    numbers = snap(weight.float().mT.contiguous(), steps, zeros, grid)  # [linears, in, out]
    numbers[0, :3] = -0.0 if not grid.uniform else 0.0
    solved = torch.stack([mine[one] for mine, one in zip(numbers, by, strict=True)])
    found = layout_kernels.rows_first(solved, back, group, (scale, zero), weight, damping, grid)
    codes, rounded, lost = found
    assert torch.equal(codes, encode(numbers, grid).mT)
    want = ((numbers - zeros if grid.uniform else numbers) * steps).mT
    assert torch.equal(rounded, want.to(dtype))
    squares = ((want - weight.float()).double().square() * damping[:, None].double()).sum(-1)
    torch.testing.assert_close(lost.double(), squares, rtol=1e-6, atol=0)
    if order == "activation" and grid.type == "int":  # what a reader of the record makes of it
        linear = QuantizedLinear(codes[1], scale[:, 1].T.bfloat16(), zero[:, 1].T.to(torch.uint8), grid)
        assert torch.equal(linear.dequantize(), rounded[1])
