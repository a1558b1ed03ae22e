"""Whether transformers loads a model with quantized linears: what in its classes stands in the way."""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from .experts import CONTAINERS
from .placed_model import LinearLayer
from .skeleton import Skeleton

# {model: {(block, its packed linears): the class}}: `fit` asks the same of many recipes.
_REACHING: WeakKeyDictionary[Skeleton, dict[tuple[object, ...], str | None]] = WeakKeyDictionary()


def why_no_packed_linears(skeleton: Skeleton, packed: Iterable[LinearLayer]) -> str | None:
    """Why transformers cannot load the model while these linears have no tensor `weight`; None where it can.

    It initialises every module before it fills it, and some classes reach for the weights of their linears there.
    """
    owner, by_block = _owner(skeleton), dict[int, list[LinearLayer]]()
    for linear in packed:
        by_block.setdefault(linear.block, []).append(linear)
    for linears in by_block.values():
        if (reaching := _reaching(owner, skeleton, linears)) is not None:
            return f"{reaching} is initialised through weights that a packed linear does not have"
    return None


def reached(skeleton: Skeleton, packed: Iterable[LinearLayer]) -> dict[str, str]:
    """The linears that transformers cannot load without a tensor `weight`, by on-disk name: what reaches for it."""
    owner, outside = _owner(skeleton), (linear for linear in packed if linear.experts is None)
    found = ((linear.name, _reaching(owner, skeleton, [linear])) for linear in outside)
    return {name: reaching for name, reaching in found if reaching is not None}


def _owner(skeleton: Skeleton) -> Any:
    """The model that initialises the blocks: the innermost that holds them."""
    owner: Any = skeleton.model
    *outer, _ = skeleton.blocks_name.split(".")
    for i in range(1, len(outer) + 1):
        module = skeleton.model.get_submodule(".".join(outer[:i]))
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner


def _reaching(owner: Any, skeleton: Skeleton, packed: Sequence[LinearLayer]) -> str | None:
    """The class of the module that is initialised through the weights of these linears of a block; None without."""
    k, known = packed[0].block, _REACHING.setdefault(skeleton, {})
    if (key := (k, *(linear.module for linear in packed))) not in known:
        known[key] = _reaching_of_block(owner, skeleton, k, packed)
    return known[key]


def _reaching_of_block(owner: Any, skeleton: Skeleton, k: int, packed: Sequence[LinearLayer]) -> str | None:
    modules: list[Any] = [skeleton.block(k).get_submodule(linear.module) for linear in packed]
    weights = [module._parameters.pop("weight") for module in modules]
    try:
        reaching = next((one for one in _outside_experts(skeleton, k) if _reaches_for_weights(owner, one)), None)
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module._parameters["weight"] = weight
    return None if reaching is None else type(reaching).__name__


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
