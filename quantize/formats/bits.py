"""Codes of 2 to 8 bits as one dense stream, lowest bits first, in int32 words.

GPTQ and compressed-tensors store codes so. compressed-tensors before 0.19 left 32 % bits of each word unused;
its packer does what the installed version does, and a file must not depend on that.
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad


def n_words(n: int, bits: int) -> int:
    """The int32 words that `n` codes fill."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8 -> int32 [..., n_words(n, bits)]."""
    *rows, n = codes.shape
    if bits in (2, 4, 8) and n * bits % 32 == 0 and sys.byteorder == "little":
        stream = codes.contiguous()
        for width in (w for w in (2, 4) if w >= bits):  # two numbers into one of twice the width
            stream = stream[..., ::2] | stream[..., 1::2] << width
        return _as(stream, torch.int32, *rows, n * bits // 32)
    eights = pad(codes, (0, -n % 8)).reshape(*rows, -1, 8)  # eight codes fill exactly `bits` bytes
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= eights[..., i].to(torch.int64) << (bits * i)
    stream = _as(word, torch.uint8, *word.shape, 8)[..., :bits].reshape(*rows, -1)
    size = 4 * n_words(n, bits)
    return _as(pad(stream, (0, size - stream.shape[-1])), torch.int32, *rows, size // 4)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., n_words(n, bits)] -> codes [..., n] uint8."""
    rows = words.shape[:-1]
    stream = _as(words, torch.uint8, *rows, 4 * words.shape[-1])
    stream = pad(stream, (0, -stream.shape[-1] % bits)).reshape(*rows, -1, bits)
    word = _as(pad(stream, (0, 8 - bits)), torch.int64, *stream.shape[:-1])
    eights = [word >> (bits * i) & ((1 << bits) - 1) for i in range(8)]
    return torch.stack([eight.to(torch.uint8) for eight in eights], dim=-1).reshape(*rows, -1)[..., :n].contiguous()


def _as(tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The same bytes as another dtype; flattened first, because a view needs a last stride of 1."""
    return tensor.reshape(-1).view(dtype).reshape(shape)
