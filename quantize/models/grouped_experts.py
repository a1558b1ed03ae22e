"""The experts of a mixture in one product for each of their linears: a GPU is slowed down by many small ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def can_group(experts: Sequence[Sequence[nn.Linear]], rows: Tensor) -> bool:
    """Whether the linears of the experts can be applied to rows [tokens, hidden] in groups."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == torch.bfloat16
        and all(linear.bias is None for linears in experts for linear in linears)
        and all(len({linear.weight.shape for linear in alike}) == 1 for alike in zip(*experts, strict=True))
        and all(n % 8 == 0 for linear in experts[0] for n in linear.weight.shape)  # rows of 16 bytes
    )


def grouped(x: Tensor, linears: Sequence[nn.Linear], ends: Tensor) -> Tensor:
    """x [choices, in], by expert, times the weights of each expert's linear; ends int32 [experts]: where each ends."""
    return torch.nn.functional.grouped_mm(x, torch.stack([linear.weight for linear in linears]).mT, offs=ends)


def weighted_sum(results: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum [tokens, hidden] float32 of the results [choices, hidden] at `places`, times `weights` [tokens, chosen].

    In the order of a token's choices, so that it is the same every time.
    """
    out = results.new_zeros(len(weights), results.shape[1], dtype=torch.float32)
    for place, weight in zip(places.unbind(1), weights.unbind(1), strict=True):  # together they would be many times out
        out += results[place] * weight[:, None].to(torch.float32)
    return out
