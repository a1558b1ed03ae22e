"""Choosing a type for each tensor of a GGUF file within a byte budget, so that the predictions change least."""

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from gguf import GGMLQuantizationType
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from ..core.errors import BadInput
from ..methods import ROUNDERS
from ..numbers.types import BlockGrid, GgmlType
from ..recipe import Rtn
from .mixes import TensorType
from .sensitivity import Sensitivity
from .writer import ALIGNMENT, padded_bytes

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
            rounded = w.half().float()
            if kind != "F16":
                grid = BlockGrid(type=kind, scale_search="activation")
                rounded = ROUNDERS["rtn"](w, grid, Rtn(), importance, None).linear.dequantize()
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

    An integer program: one type per tensor, one limit. Raises BadInput when even the smallest types do not fit.
    """
    options = [(name, kind) for name in costs for kind in costs[name]]
    sizes = [bytes_in_file(shapes[name], kind) // ALIGNMENT for name, kind in options]
    smallest = sum(min(bytes_in_file(shapes[name], kind) for kind in costs[name]) for name in costs)
    if smallest > room:
        raise BadInput(
            f"gguf.budget: {room} bytes are left for the tensors and the smallest types take {smallest}; raise it"
        )
    index = {name: i for i, name in enumerate(costs)}
    rows = [index[name] for name, _ in options]
    one = coo_array(([1.0] * len(options), (rows, range(len(options)))), shape=(len(index), len(options)))
    scale = max(sum(min(c.values()) for c in costs.values()), 1e-30)
    found = milp(
        [costs[name][kind] / scale for name, kind in options],
        constraints=[LinearConstraint(one.tocsr(), 1, 1), LinearConstraint([sizes], ub=room // ALIGNMENT)],
        integrality=[1] * len(options),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    assert found.x is not None, found.message
    return {name: kind for (name, kind), x in zip(options, found.x, strict=True) if x > 0.5}
