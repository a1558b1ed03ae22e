"""What a decoder block is called with beside the hidden states, and whether that is the same for all texts."""

from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def check_same(kind: str, one: Arguments, other: Arguments) -> None:
    """Raise BadInput unless a block that is given `one` for a sequence may be given it for those of `other`, too."""
    named = [(f"argument {i + 2}", pair) for i, pair in enumerate(zip(one[0], other[0], strict=True))]
    named += [(name, (value, other[1].get(name))) for name, value in one[1].items()]
    for name, pair in named:
        if not _alike(*pair):
            raise BadInput(
                f"model_type {kind!r} is not supported: its blocks are given {name}, which depends on the tokens or on "
                "other blocks, and here a block is run by itself"
            )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        fits = one.shape[1:] == other.shape[1:] and one.shape[:1] in ((), (1,), other.shape[:1])
        return fits and one.dim() == other.dim() and torch.equal(one.expand_as(other), other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, dict) and type(one) is type(other)  # a dict is where blocks leave things for later ones
