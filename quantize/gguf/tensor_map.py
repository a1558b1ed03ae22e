"""Parameters of a checkpoint as tensors of a GGUF file and back: their names, and how their numbers are arranged."""

import re
from typing import Any

import gguf
import torch
from torch import Tensor

from ..models.family import GgufForm, TensorChange

EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = re.compile(r"\.(\d+)\.")
Changes = tuple[TensorChange, ...]
# After any other change the rows of a tensor are no longer rows of the parameter, with the same columns.
_BY_ROWS = ("query", "key", "by_head", "transposed", "value_rows", "value_tail")


def names_of(form: GgufForm, blocks: int) -> gguf.TensorNameMap:
    """The `gguf` package's map from parameter names, of all families that it knows, to tensor names."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def places_of(form: GgufForm, names: gguf.TensorNameMap, parameter: str) -> list[tuple[str, Changes]]:
    """The tensors of the file that a parameter of the model goes into, mostly one, and how it changes on the way.

    Empty for a parameter that GGUF has no name for.
    """
    merged = EXPERT.sub(".experts.", parameter.replace(".language_model.", "."))  # of a multimodal model
    merged = merged.replace("e_score_correction_bias", "e_score_correction.bias")
    for ending, places in form.named.items():
        if merged.endswith(ending):
            block = _BLOCK.search(merged)
            prefix = f"blk.{block[1]}." if block else ""
            return [(prefix + name, changes) for name, changes in places]
    if ".experts.w" in merged:  # Mixtral: the map knows the names of its first checkpoints
        merged = re.sub(r"^model\.(layers\.\d+)\.(mlp|block_sparse_moe|feed_forward)\.", r"\1.feed_forward.", merged)
    found = names.get_name(merged, try_suffixes=(".weight", ".bias"))
    changes = next((changes for ending, changes in form.changes if parameter.endswith(ending)), ())
    return [] if found is None else [(str(found), changes)]


def by_rows(changes: Changes) -> bool:
    """Whether each row of a changed tensor is a row of the parameter, so that it can be quantized before the change.

    `transposed` is of weights that a linear layer keeps as [in, out].
    """
    return all(change in _BY_ROWS for change in changes)


def to_gguf(changes: Changes, weight: Tensor, config: Any) -> Tensor:
    """An HF parameter as GGUF has it; where the changes are by rows, packed weights may be given too."""
    for change in changes:
        weight = _changed(change, weight, config)
    return weight


def from_gguf(changes: Changes, weights: list[Tensor], config: Any) -> Tensor:
    """The inverse of `to_gguf`, given all the tensors that the parameter went into."""
    if changes and changes[-1] in _JOINED:
        return _JOINED[changes[-1]](weights, config)
    (weight,) = weights
    for change in reversed(changes):
        weight = _restored(change, weight, config)
    return weight


def _changed(change: TensorChange, weight: Tensor, config: Any) -> Tensor:
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
        case "squeezed":
            return weight.squeeze(1)
        case "negative_exp":
            return -torch.exp(weight.to(torch.float32))
        case "key_b" | "value_b":  # halves of kv_b, head by head; the keys' is absorbed into the queries
            sizes = [config.qk_nope_head_dim, config.v_head_dim]
            keys, values = torch.split(_per_head(weight, config), sizes, 1)
            return keys.transpose(1, 2) if change == "key_b" else values
        case "queries_keys_values" | "gates":
            return _of_key_heads(weight, config, gates=change == "gates")
    return _in_turn(change, weight, config, back=False)


def _restored(change: TensorChange, weight: Tensor, config: Any) -> Tensor:
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
        case "squeezed":
            return weight.unsqueeze(1)
        case "negative_exp":
            return torch.log(-weight)
    return _in_turn(change, weight, config, back=True)


def _per_head(weight: Tensor, config: Any) -> Tensor:
    """kv_b [heads * (nope + value), rank] as [heads, nope + value, rank]."""
    return weight.reshape(-1, config.qk_nope_head_dim + config.v_head_dim, weight.shape[-1])


def _of_key_heads(weight: Tensor, config: Any, gates: bool) -> Tensor:
    """Rows of (q, k, v, z), key head by key head: all q, all k, all v, or all z."""
    keys, per_key = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
    values = per_key * config.linear_value_head_dim
    by_head = weight.reshape(config.linear_num_key_heads, -1, *weight.shape[1:])
    parts = torch.split(by_head, [keys, keys, values, values], 1)
    chosen = parts[3:] if gates else parts[:3]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in chosen])


def _in_turn(change: TensorChange, weight: Tensor, config: Any, back: bool) -> Tensor:
    """Value heads of a gated delta net: the first of each key head, the second of each, and so on; or `back`.

    transformers keeps those of a key head together. ggml repeats the key heads as a whole.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    groups = (values // keys, keys) if back else (keys, values // keys)
    if change == "value_columns":
        return weight.reshape(-1, *groups, weight.shape[1] // values).transpose(1, 2).reshape(weight.shape)
    before = 2 * keys * config.linear_key_head_dim if change == "value_tail" else 0  # queries and keys
    rows = weight[before:].reshape(*groups, -1, *weight.shape[1:]).transpose(0, 1)
    return torch.cat([weight[:before], rows.reshape(-1, *weight.shape[1:])])


def _join_kv_b(weights: list[Tensor], config: Any) -> Tensor:
    keys, values = weights
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def _join_qkvz(weights: list[Tensor], config: Any) -> Tensor:
    both, gates = weights
    heads, keys = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    parts = [*torch.split(both, [keys, keys, both.shape[0] - 2 * keys]), gates]
    return torch.cat([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)


_JOINED = {"value_b": _join_kv_b, "gates": _join_qkvz}
_JOINED |= {"key_b": _join_kv_b, "queries_keys_values": _join_qkvz}
