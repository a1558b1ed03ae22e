"""The weights that the linears of a block have, and those they get."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..models.placed_model import LinearLayer
from ..numbers.grid import QuantizedLinear


def place(block: nn.Module, linear: LinearLayer, rounded: QuantizedLinear) -> None:
    """Put the rounded weight into the block."""
    put(block, linear, rounded.dequantize())


def put(block: nn.Module, linear: LinearLayer, weight: Tensor) -> None:
    """Give a linear of the block a new weight [out, in], in the dtype of the old one."""
    module: Any = block.get_submodule(linear.module)
    new = weight.to(module.weight.dtype)
    module.weight = nn.Parameter(new.T.contiguous() if linear.transposed else new, requires_grad=False)


def with_weights(block: nn.Module, weights: Mapping[LinearLayer, Tensor]) -> nn.Module:
    """A copy of the block with other weights [out, in] in some linears; all other parameters are shared."""
    other = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    for linear, weight in weights.items():
        module: Any = other.get_submodule(linear.module)
        module.weight = nn.Parameter(weight.T if linear.transposed else weight, requires_grad=False)
    return other


def weight_of(block: nn.Module, linear: LinearLayer) -> Tensor:
    """The weight [out, in] that the block now has for a linear."""
    weight: Tensor = block.get_submodule(linear.module).weight  # type: ignore[assignment]
    return weight.T if linear.transposed else weight
