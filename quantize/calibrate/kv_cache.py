"""An 8-bit key-value cache: its scales, measured in calibration, and its rounding, as servers do it.

Each layer has one static scale for its keys and one for its values, amax / 448 (E4M3) or amax / 127 (int8). Keys are
cached after the rotary embedding, so both are intercepted as they enter transformers' attention function.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..core.errors import BadInput
from ..core.ranks import ALONE, Ranks
from ..models.skeleton import Skeleton
from ..numbers.grid import E4M3_MAX, Grid, round_numbers_

# Maps keys and values [batch, kv_heads, tokens, head_dim] to the ones that attention computes with.
CacheFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_LARGEST = {"fp8": E4M3_MAX, "int8": 127.0}
_E4M3 = Grid(type="fp8")
_SMALLEST = 1e-10
_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"  # where a transformers module looks up its attention function
_PREFIX = "quantpress_"
# By module, so that the copy of a block, the original run beside, is not tapped.
_taps: WeakKeyDictionary[nn.Module, CacheFunction] = WeakKeyDictionary()


def attentions(skeleton: Skeleton) -> list[tuple[str, nn.Module]]:
    """The on-disk name and the attention module of each block, prepared for `tap`.

    Raises BadInput for a model that caches anything but one tensor of keys and one of values in each block.
    """
    family = skeleton.config.model_type
    if getattr(skeleton.config, "kv_lora_rank", None) is not None:
        raise BadInput(f"{family} caches latents, not keys and values; leave kv_cache out")
    out = []
    for k in range(skeleton.n_blocks):
        found = [(name, module) for name, module in skeleton.block(k).named_modules() if _is_attention(module)]
        if len(found) != 1:
            raise BadInput(
                f"{family}: block {k} has {len(found)} attentions that call transformers' attention function, and "
                "kv_cache needs exactly one; leave kv_cache out"
            )
        (path, module), names = found[0], skeleton.block_names(k)
        inside = next(name for name, _ in module.named_parameters())
        disk = names[f"{path}.{inside}"].rsplit(".", inside.count(".") + 1)[0]
        if not disk.endswith(".self_attn"):
            raise BadInput(f"{family}: servers look for cache scales in self_attn, not in {disk}; leave kv_cache out")
        out.append((disk, module))
    _intercept(skeleton.model.config)
    return out


def scale_bytes(kind: str | None, skeleton: Skeleton) -> int:
    """What the scales of a cache of `kind` take in the artifact: float32, for the keys and the values of each block."""
    return 0 if kind is None else 8 * skeleton.n_blocks


def tap(attention: nn.Module, function: CacheFunction) -> None:
    """Apply `function` to the keys and values of `attention` from now on."""
    _taps[attention] = function


class Largest:
    """The largest |k| and |v| that enter `attention` after `start`."""

    def __init__(self, name: str, attention: nn.Module) -> None:
        self.name, self._attention = name, attention
        # Of each call, keys and values, float32 [2]; read in the end, as a GPU waits for it.
        self._largest: list[Tensor] = []

    def start(self) -> None:
        tap(self._attention, self._note)

    def scales(self, kind: str, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """The key and value scales of a cache of `kind`, float32 [], by what all ranks saw. Ends the measurement.

        Raises BadInput when all keys or all values were 0.
        """
        _taps.pop(self._attention, None)
        own = torch.stack(self._largest).amax(0).tolist() if self._largest else (0.0, 0.0)
        keys, values = map(max, zip(*ranks.gather(own), strict=True))
        if not keys or not values:
            raise BadInput(f"{self.name}: all keys or all values were 0 in calibration; leave kv_cache out")
        largest = _LARGEST[kind]
        return torch.tensor(keys / largest), torch.tensor(values / largest)

    def _note(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._largest.append(torch.stack([keys.abs().amax(), values.abs().amax()]).to(torch.float32))
        return keys, values


def rounding(kind: str, key_scale: Tensor, value_scale: Tensor) -> CacheFunction:
    """What keys and values become when written to a cache of `kind` and read back; scales float32 []."""

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _through(keys, kind, key_scale), _through(values, kind, value_scale)

    return change


def _through(x: Tensor, kind: str, scale: Tensor) -> Tensor:
    """x rounded to multiples of `scale`, in x's dtype; values out of range saturate."""
    scale = scale.to(x.device).clamp(min=_SMALLEST)
    numbers = x.to(torch.float32) / scale
    rounded = round_numbers_(numbers, _E4M3) if kind == "fp8" else numbers.round_().clamp_(-128, 127)
    return (rounded * scale).to(x.dtype)


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and _FUNCTIONS in _home(module)


def _home(module: nn.Module) -> dict[str, Any]:
    """The namespace of the Python module that defines this module's class."""
    return vars(sys.modules[type(module).__module__])


def _intercept(config: Any) -> None:
    """Make the model with this config call its attention function through `_attend`."""
    base = config._attn_implementation
    if base.startswith(_PREFIX):
        return
    AttentionInterface.register(f"{_PREFIX}{base}", partial(_attend, base))
    AttentionMaskInterface.register(f"{_PREFIX}{base}", ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = f"{_PREFIX}{base}"


def _attend(base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call the attention function named `base` on the tapped keys and values."""
    if module in _taps:
        key, value = _taps[module](key, value)
    home = _home(module)
    function = home[_FUNCTIONS].get_interface(base, home.get("eager_attention_forward"))
    return function(module, query, key, value, *args, **kwargs)
