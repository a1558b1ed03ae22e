"""What decoder blocks compute between their products, as Triton kernels that read and write each number once.

Import this module only where Triton is installed. They round where the models' own code does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program that normalises rows, or one row where that is wider
_GATED = 1024  # of a program that reads two tensors and writes one
_TURNED = 2048  # pairs of numbers of a program that turns them


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] over its root mean square in float32, rounded, times weight [width], rounded again; bfloat16."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    step = max(1, _ELEMENTS // padded)
    _rms_norm[(triton.cdiv(len(rows), step),)](
        rows, weight, out, len(rows), rows.stride(0), eps,
        WIDTH=width, PADDED=padded, ROWS=step, num_warps=4 if padded < 8192 else 8,
    )  # fmt: skip
    return out.view(x.shape)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate), computed in float32 and rounded, times up; bfloat16."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    count = gate.numel()
    _silu_times[(triton.cdiv(count, _GATED),)](gate, up, out, count, BLOCK=_GATED, num_warps=4)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv:2104.09864): x cos + rotate_half(x) sin, each product and the sum
    rounded; bfloat16.

    x [samples, heads, seq_len, size], with any strides but of the last dimension; cos, sin [samples or 1, seq_len,
    size].
    """
    samples, heads, seq_len, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    # As it lies: heads of one token next to each other.
    out = torch.empty(samples, seq_len, heads, size, dtype=x.dtype, device=x.device).transpose(1, 2)
    half = triton.next_power_of_2(size // 2)
    step = max(1, min(triton.next_power_of_2(heads), _TURNED // half))
    _rotate[(samples * seq_len, triton.cdiv(heads, step))](
        x, cos, sin, out, heads, seq_len, *x.stride()[:3], *out.stride()[:3], cos.stride(0) if len(cos) > 1 else 0,
        SIZE=size, HALF=half, HEADS=step, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _rounded(x):
    """x rounded to bfloat16 and back, by hand: the interpreter's cast does not round."""
    bits = x.to(tl.uint32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def _rms_norm(
    x, weight, out, rows, row_stride, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    here = (row < rows) & (column < WIDTH)
    wide = tl.load(x + row * row_stride + column, mask=here, other=0.0).to(tl.float32)
    mean = tl.sum(wide * wide, axis=1)[:, None] / WIDTH
    normal = _rounded(wide * tl.rsqrt(mean + eps))
    by = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, _rounded(normal * by).to(tl.bfloat16), mask=here)


@triton.jit
def _silu_times(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    activated = _rounded(tl.div_rn(g, 1.0 + tl.exp(-g)))
    tl.store(out + at, _rounded(activated * u).to(tl.bfloat16), mask=here)


@triton.jit
def _rotate(
    x, cos, sin, out, heads, seq_len,
    x_sample, x_head, x_token, out_sample, out_head, out_token, turn_sample,
    SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample, token = token // seq_len, token % seq_len
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    known = column < SIZE // 2
    here = (head < heads) & known
    x += sample * x_sample + head * x_head + token * x_token + column
    out += sample * out_sample + head * out_head + token * out_token + column
    turn = sample * turn_sample + token * SIZE + column
    first = tl.load(x, mask=here, other=0.0).to(tl.float32)
    second = tl.load(x + SIZE // 2, mask=here, other=0.0).to(tl.float32)
    c = tl.load(cos + turn, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=known, other=0.0).to(tl.float32)
    tl.store(out, _rounded(_rounded(first * c) + _rounded(-second * s)).to(tl.bfloat16), mask=here)
    c = tl.load(cos + turn + SIZE // 2, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + turn + SIZE // 2, mask=known, other=0.0).to(tl.float32)
    tl.store(out + SIZE // 2, _rounded(_rounded(second * c) + _rounded(first * s)).to(tl.bfloat16), mask=here)
