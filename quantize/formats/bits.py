"""Codes of 2, 3, 4 or 8 bits as one dense stream, lowest bits first, in int32 words.

Both formats here store codes so. compressed-tensors before 0.19 left two bits of each word unused at 3 bits; the
library's own packer follows the version installed, and a file must not.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def n_words(n: int, bits: int) -> int:
    """The int32 words that `n` codes fill."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8 -> int32 [..., n_words(n, bits)]."""
    *rows, n = codes.shape
    eights = pad(codes, (0, -n % 8)).reshape(*rows, -1, 8)  # eight codes fill exactly `bits` bytes
    word = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= eights[..., i].to(torch.int64) << (bits * i)
    stream = word.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(*rows, -1)
    size = 4 * n_words(n, bits)
    return pad(stream, (0, max(0, size - stream.shape[-1])))[..., :size].contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., n_words(n, bits)] -> codes [..., n] uint8."""
    rows = words.shape[:-1]
    stream = words.contiguous().view(torch.uint8)
    stream = pad(stream, (0, -stream.shape[-1] % bits)).reshape(*rows, -1, bits)
    word = pad(stream, (0, 8 - bits)).contiguous().view(torch.int64)
    eights = [word.squeeze(-1) >> (bits * i) & ((1 << bits) - 1) for i in range(8)]
    return torch.stack([eight.to(torch.uint8) for eight in eights], dim=-1).reshape(*rows, -1)[..., :n].contiguous()
