"""What is done to weights and matrices between products, as Triton kernels that read and write each number once.

Import this module only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPLIT = 1024  # numbers of a program that splits a row's


def split_in_halves(x: Tensor) -> Tensor:
    """Float32 x [matrices, rows, n] as a + b, both of which TF32 holds exactly: [a a b a], [matrices, rows, 4 n].

    The first three times the last three of another, transposed, is x y^T to about 20 bits: a c + a d + b c. a has the
    10 bits of the fraction that TF32 has; of b they leave out at most a 2^21st of x.
    """
    matrices, rows, n = x.shape
    assert x.stride(-1) == 1
    out = torch.empty(matrices, rows, 4 * n, dtype=x.dtype, device=x.device)
    _split_in_halves[(rows, triton.cdiv(n, _SPLIT), matrices)](
        x, out, rows, n, *x.stride()[:2], BLOCK=_SPLIT, num_warps=4
    )
    return out


@triton.jit
def _split_in_halves(x, out, rows, n, x_matrix, x_row, BLOCK: tl.constexpr):
    row, matrix = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < n
    value = tl.load(x + matrix * x_matrix + row * x_row + column, mask=here, other=0.0)
    high = (value.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    out += (matrix * rows + row) * 4 * n + column
    tl.store(out, high, mask=here)
    tl.store(out + n, high, mask=here)
    tl.store(out + 2 * n, value - high, mask=here)
    tl.store(out + 3 * n, high, mask=here)
