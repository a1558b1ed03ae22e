"""What a model passes a decoder block besides the hidden states, which must not depend on the text."""

from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput

BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


def check_same(kind: str, one: BlockArguments, other: BlockArguments) -> None:
    """Raise BadInput unless `one`, which a block got for one sequence, also serves the sequences that got `other`."""
    named = [(f"argument {i + 2}", pair) for i, pair in enumerate(zip(one[0], other[0], strict=True))]
    named += [(name, (value, other[1].get(name))) for name, value in one[1].items()]
    for name, pair in named:
        if not _alike(*pair):
            raise BadInput(
                f"model_type {kind!r} is not supported: its blocks are given {name}, which depends on the tokens or on "
                "other blocks, and quantpress runs each block alone"
            )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        fits = one.shape[1:] == other.shape[1:] and one.shape[:1] in ((), (1,), other.shape[:1])
        return fits and one.dim() == other.dim() and torch.equal(one.expand_as(other), other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, dict) and type(one) is type(other)  # a dict carries results from block to block
