"""Parameters of a checkpoint as tensors of a GGUF file and back: their names, and how their numbers are arranged."""

from typing import Any

import gguf
import torch
from torch import Tensor

from ..models.family import GgufForm, TensorChange


def names_of(form: GgufForm, blocks: int) -> gguf.TensorNameMap:
    """The `gguf` package's map from parameter names, of all families that it knows, to tensor names."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def change_of(form: GgufForm, parameter: str) -> TensorChange | None:
    """How a parameter changes on its way into a GGUF file, by its HF name."""
    return next((change for ending, change in form.changes if parameter.endswith(ending)), None)


def to_gguf(change: TensorChange | None, weight: Tensor, config: Any) -> Tensor:
    """An HF parameter as GGUF has it; `query`, `key` and `by_head` reorder rows, so packed weights may be given too."""
    match change:
        case "query" | "key":  # pairs of ggml's RoPE lie side by side, transformers' half a head apart
            heads = config.num_attention_heads if change == "query" else config.num_key_value_heads
            return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        case "by_head":  # (q, k, v) head by head becomes all q, all k, all v
            heads = config.num_attention_heads
            return weight.reshape(heads, 3, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
        case "plus_one":
            return weight.to(torch.float32) + 1
        case "transposed":
            return weight.T
    return weight


def from_gguf(change: TensorChange | None, weight: Tensor, config: Any) -> Tensor:
    """The inverse of `to_gguf`."""
    match change:
        case "query" | "key":
            heads = config.num_attention_heads if change == "query" else config.num_key_value_heads
            return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        case "by_head":
            heads = config.num_attention_heads
            return weight.reshape(3, heads, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
        case "plus_one":
            return weight - 1
        case "transposed":
            return weight.T
    return weight
