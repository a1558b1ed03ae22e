"""Whether transformers loads a model with quantized linears: what in its classes stands in the way."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from .experts import CONTAINERS
from .placed_model import LinearLayer
from .skeleton import Skeleton


def why_no_packed_linears(skeleton: Skeleton, packed: Iterable[LinearLayer]) -> str | None:
    """Why transformers cannot load the model while these linears have no tensor `weight`; None where it can.

    It initialises every module before it fills it, and some classes reach for the weights of their linears there.
    """
    owner: Any = skeleton.model
    for path, module in skeleton.model.named_modules():
        if isinstance(module, PreTrainedModel) and skeleton.blocks_name.startswith(f"{path}."):
            owner = module  # the innermost that holds the blocks
    by_block: dict[int, list[Any]] = {}
    for linear in packed:
        by_block.setdefault(linear.block, []).append(skeleton.block(linear.block).get_submodule(linear.module))
    for k, linears in by_block.items():
        weights = [module._parameters.pop("weight") for module in linears]
        try:
            reached = next((name for name in _outside_experts(skeleton, k) if _reaches_for_weights(owner, name)), None)
        finally:
            for module, weight in zip(linears, weights, strict=True):
                module._parameters["weight"] = weight
        if reached is not None:
            return f"{type(reached).__name__} is initialised through weights that a packed linear does not have"
    return None


def keeps_modules() -> bool:
    """Whether transformers, from 5.24 on, reads files that say `dequantize` into the modules that its class makes."""
    return "get_load_operations" in vars(CompressedTensorsHfQuantizer)


def loads_single_experts(kind: str) -> bool:
    """Whether transformers takes experts of this class apart when it loads compressed-tensors files."""
    return kind in MODULES_TO_PATCH_FOR_QUANTIZATION


def _outside_experts(skeleton: Skeleton, k: int) -> Iterable[torch.nn.Module]:
    block = skeleton.block(k)
    experts = [f"{path}." for path, module in block.named_modules() if isinstance(module, CONTAINERS)]
    return (module for path, module in block.named_modules() if not path.startswith(tuple(experts)))


@torch.no_grad()
def _reaches_for_weights(owner: Any, module: torch.nn.Module) -> bool:
    try:
        owner._init_weights(module)
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False  # for want of values, on the meta device
    return False
