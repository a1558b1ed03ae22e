"""Choosing a type for each tensor of a GGUF file within a byte budget, so that the predictions change least."""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ..calibrate import budget
from ..calibrate.sensitivity import Sensitivity
from ..core.errors import BadInput
from ..numbers.ggml_scales import nearest
from ..numbers.types import BlockGrid, GgmlType
from .mixes import TensorType
from .writer import padded_bytes

_ROWS = 64  # sampled from a tensor to estimate its error
_FEWEST_ROWS = 8  # sampled from each expert
_F16: TensorType = "F16"


def costs(weights: Sequence[Tensor], uses: Sequence[Sequence[Sensitivity]]) -> dict[TensorType, float]:
    """The KL divergence, in nats per token, that each possible type of a tensor would cause, from a sample of rows.

    weights [out, in]: one, or one for each expert of the tensor. uses: the sensitivities of each, one per use.
    """
    found: dict[TensorType, float] = dict.fromkeys(candidates(weights[0].shape[1]), 0.0)
    few = max(_FEWEST_ROWS, _ROWS // len(weights))
    for weight, sensitive in zip(weights, uses, strict=True):
        rows = torch.arange(0, len(weight), max(1, len(weight) // few))
        w = weight[rows].float()
        importance = torch.stack([use.columns for use in sensitive]).sum(0)
        for kind in found:
            rounded = w.half().float() if kind == "F16" else nearest(w, BlockGrid(type=kind), importance)
            found[kind] += sum(use.cost(rounded - w, rows) for use in sensitive)
    return found


def candidates(columns: int) -> tuple[TensorType, ...]:
    """The types whose blocks divide rows of `columns`; F16 where there are none."""
    fitting = tuple(kind for kind in get_args(GgmlType) if columns % BlockGrid(type=kind).span(columns) == 0)
    return fitting or (_F16,)


def bytes_in_file(shape: tuple[int, ...], kind: TensorType) -> int:
    """Bytes of a tensor of this type, the columns last in `shape`, with the padding behind it."""
    return padded_bytes(shape, GGMLQuantizationType[kind])


def assign(
    shapes: Mapping[str, tuple[int, ...]], costs: Mapping[str, Mapping[TensorType, float]], room: int
) -> dict[str, TensorType]:
    """The types with the least total cost that take at most `room` bytes, padding included.

    Raises BadInput when even the smallest types do not fit.
    """
    sizes = {name: {kind: bytes_in_file(shapes[name], kind) for kind in costs[name]} for name in costs}
    try:
        return budget.assign(costs, sizes, room)
    except ValueError:
        smallest = sum(min(kinds.values()) for kinds in sizes.values())
        raise BadInput(
            f"gguf.budget: {room} bytes are left for the tensors and the smallest types take {smallest}; raise it"
        ) from None
