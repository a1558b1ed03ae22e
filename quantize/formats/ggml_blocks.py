"""ggml's block types, the number formats of GGUF files: a row of a weight as bytes, block after block.

A block is 32 columns, in the K types 256. Layouts as in llama.cpp's ggml-common.h (bytes of one block, in this order):

    Q4_0  d, 16 nibbles              Q4_1  d, m, 16 nibbles        d: float16, the scale (K: the super scale)
    Q5_0  d, 4 high, 16 nibbles      Q5_1  d, m, 4 high, 16        m: float16, what is added (K: the super offset)
    Q8_0  d, 32 int8
    Q2_K  16 scale and offset nibbles, 64 codes, d, m              nibbles: code i low, code i + 16 (K: i + 32) high
    Q3_K  32 high bits, 64 low bits, 12 scales, d                  high: the fifth (Q3_K: third, Q6_K: both upper) bits
    Q4_K  d, m, 12 scales and offsets, 128 nibbles
    Q5_K  d, m, 12 scales and offsets, 32 high, 128 nibbles
    Q6_K  128 nibbles, 64 high, 16 int8 scales, d

In Q2_K, Q3_K and Q6_K the codes are laid out by halves of 128 columns, of four runs of 32: a byte holds the same place
of each run, or of two of them.
"""

import torch
from torch import Tensor

from ..numbers.ggml_scales import BLOCK_BYTES, zero_of
from ..numbers.grid import QuantizedLinear
from ..numbers.types import SUPER_BLOCK, BlockGrid

__all__ = ["pack", "row_bytes", "unpack"]


def row_bytes(grid: BlockGrid, in_features: int) -> int:
    """Bytes of one row."""
    return in_features // grid.span(in_features) * BLOCK_BYTES[grid.type]


def pack(q: QuantizedLinear) -> Tensor:
    """The rows of a weight as a GGUF file holds them, uint8 [out, row bytes]."""
    assert isinstance(q.grid, BlockGrid)
    kind, blocks = q.grid.type, q.codes.numel() // q.grid.span(q.in_features)
    codes = q.codes.reshape(blocks, -1)
    parts: list[Tensor]
    if q.supers is not None:
        supers = [_bytes(part.reshape(blocks, 1)) for part in q.supers]
        scales = q.scales.reshape(blocks, -1)
        offsets = None if q.offsets is None else q.offsets.reshape(blocks, -1).to(torch.uint8)
        match kind, offsets:
            case "Q2_K", Tensor():
                parts = [scales.to(torch.uint8) | offsets << 4, _merge(codes, 2), *supers]
            case "Q3_K", None:
                high = _gather_bits(codes >> 2, 32)
                parts = [high, _merge(codes & 3, 2), _pack_signed((scales + 32).to(torch.uint8)), *supers]
            case "Q4_K", Tensor():
                parts = [*supers, _pack_pairs(scales.to(torch.uint8), offsets), _nibbles(codes, 32)]
            case "Q5_K", Tensor():
                high = _gather_bits(codes >> 4, 32)
                parts = [*supers, _pack_pairs(scales.to(torch.uint8), offsets), high, _nibbles(codes & 15, 32)]
            case _:
                signed = scales.to(torch.int8).view(torch.uint8)
                parts = [_nibbles(codes & 15, 64), _merge(codes >> 4, 2), signed, *supers]
    else:
        parts = [_bytes(q.scales.reshape(blocks, 1))]
        if q.offsets is not None:
            parts.append(_bytes(_negated(q.offsets.reshape(blocks, 1))))
        if q.grid.bits == 8:
            parts.append(codes ^ 128)
        if q.grid.bits == 5:
            parts.append(_bits(codes >> 4))
        if q.grid.bits < 8:
            parts.append(_nibbles(codes & 15, 16))
    return torch.cat(parts, 1).reshape(q.out_features, -1)


def unpack(data: Tensor, grid: BlockGrid, in_features: int) -> QuantizedLinear:
    """The record behind the rows `data`, uint8 [out, row bytes]; any bytes of that shape are a weight."""
    kind, out_features = grid.type, data.shape[0]
    block = data.reshape(-1, BLOCK_BYTES[kind])
    zeros = torch.full((out_features, in_features // grid.group_size), zero_of(grid), dtype=torch.uint8)
    if grid.nested:
        codes, scales, offsets, halves = _unpack_nested(block, kind)
        supers = halves.T.reshape(-1, out_features, in_features // SUPER_BLOCK).contiguous()
        wide = scales.to(torch.int16).reshape(zeros.shape)
        shifts = None if offsets is None else offsets.to(torch.int16).reshape(zeros.shape)
        return QuantizedLinear(codes.reshape(out_features, -1), wide, zeros, grid, offsets=shifts, supers=supers)
    at = 2
    shifts = None
    if not grid.symmetric:
        shifts, at = _negated(_halves(block[:, 2:4])).reshape(zeros.shape), 4
    if grid.bits == 8:
        codes = block[:, at:] ^ 128
    else:
        codes = _from_nibbles(block[:, -16:], 16)
        if grid.bits == 5:
            codes |= _from_bits(block[:, at : at + 4]) << 4
    scales = _halves(block[:, :2]).reshape(zeros.shape)
    return QuantizedLinear(codes.reshape(out_features, -1), scales, zeros, grid, offsets=shifts)


def _unpack_nested(block: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scales, offsets, and super scale and offset side by side, of blocks [blocks, bytes] of a K type."""
    match kind:
        case "Q2_K":
            head, codes = block[:, :16], _split(block[:, 16:80], 2)
            return codes, head & 15, head >> 4, _halves(block[:, 80:84])
        case "Q3_K":
            codes = _split(block[:, 32:96], 2) | _scatter_bits(block[:, :32]) << 2
            scales = _unpack_signed(block[:, 96:108]).to(torch.int16) - 32
            return codes, scales, None, _halves(block[:, 108:110])
        case "Q6_K":
            codes = _from_nibbles(block[:, :128], 64) | _split(block[:, 128:192], 2) << 4
            return codes, block[:, 192:208].view(torch.int8), None, _halves(block[:, 208:210])
    codes = _from_nibbles(block[:, -128:], 32)
    if kind == "Q5_K":
        codes |= _scatter_bits(block[:, 16:48]) << 4
    scales, offsets = _unpack_pairs(block[:, 4:16])
    return codes, scales, offsets, _halves(block[:, :4])


def _bytes(values: Tensor) -> Tensor:
    """float16 [blocks, n] -> uint8 [blocks, 2 n], the lower byte first."""
    return values.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _negated(values: Tensor) -> Tensor:
    """-values by the sign bit alone: a NaN keeps its other bits."""
    return (values.contiguous().view(torch.int16) ^ -0x8000).view(torch.float16)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """[blocks, n] codes below 16 -> [blocks, n / 2]: each run of bytes holds one run of codes below, the next above."""
    low, high = codes.reshape(len(codes), -1, 2, run).unbind(2)
    return (low | high << 4).reshape(len(codes), -1)


def _from_nibbles(data: Tensor, run: int) -> Tensor:
    runs = data.reshape(len(data), -1, run)
    return torch.stack([runs & 15, runs >> 4], 2).reshape(len(data), -1)


def _merge(codes: Tensor, bits: int) -> Tensor:
    """[blocks, 256] codes of 2 bits -> [blocks, 64]: in each half the same place of four runs of 32 in one byte."""
    runs = codes.reshape(len(codes), 2, 4, 32)
    out = runs[:, :, 0].clone()
    for i in range(1, 4):
        out |= runs[:, :, i] << bits * i
    return out.reshape(len(codes), -1)


def _split(data: Tensor, bits: int) -> Tensor:
    runs = data.reshape(len(data), 2, 1, 32)
    shifts = torch.arange(4, dtype=torch.uint8).mul_(bits).reshape(4, 1)
    return (runs >> shifts & (1 << bits) - 1).reshape(len(data), -1)


def _gather_bits(bits: Tensor, run: int) -> Tensor:
    """[blocks, 256] of one bit -> [blocks, 32]: byte i holds place i of each of the eight runs of 32."""
    runs = bits.reshape(len(bits), -1, run)
    out = runs[:, 0].clone()
    for i in range(1, runs.shape[1]):
        out |= runs[:, i] << i
    return out


def _scatter_bits(data: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    return (data[:, None] >> shifts & 1).reshape(len(data), -1)


def _bits(bits: Tensor) -> Tensor:
    """[blocks, 32] of one bit -> [blocks, 4], the first bit lowest."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(len(bits), 4, 8) * weights).sum(2, dtype=torch.uint8)


def _from_bits(data: Tensor) -> Tensor:
    return (data[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(len(data), -1)


def _pack_pairs(scales: Tensor, offsets: Tensor) -> Tensor:
    """Eight scales and eight offsets of 6 bits [blocks, 8] -> [blocks, 12]: the first four of each below 64 of a byte,
    the lower nibbles of the others together, their upper two bits in the free ones of the first eight bytes."""
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, offsets)]
    return torch.cat([*first, scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4], 1)


def _unpack_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    scales, offsets, both = data[:, :4], data[:, 4:8], data[:, 8:]
    more = torch.cat([scales & 63, both & 15 | scales >> 6 << 4], 1)
    return more, torch.cat([offsets & 63, both >> 4 | offsets >> 6 << 4], 1)


def _pack_signed(scales: Tensor) -> Tensor:
    """Sixteen scales of 6 bits [blocks, 16] -> [blocks, 12]: lower nibbles of i and i + 8, then upper pairs."""
    high = scales.reshape(-1, 4, 4) >> 4
    tops = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4, tops], 1)


def _unpack_signed(data: Tensor) -> Tensor:
    low = torch.cat([data[:, :8] & 15, data[:, :8] >> 4], 1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(4, 1)
    high = (data[:, None, 8:] >> shifts & 3).reshape(-1, 16)
    return low | high << 4
