"""Rows for the model families that llama.cpp runs: what their GGUF files say and do otherwise than the HF checkpoint.

After llama.cpp's converter (its conversion/ folder, as vendored by llama-cpp-python 0.3.36) and the loaders under its
src/models/. A row also says what llama.cpp takes for granted, so that a checkpoint that has it otherwise is refused
rather than run wrongly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gguf
import torch
from torch import Tensor

from ..core.errors import BadInput

Change = Literal["query", "key", "plus_one", "transposed", "by_head"]


@dataclass(frozen=True)
class Architecture:
    """How one HF model type becomes a GGUF architecture.

    name: GGUF's. changes: (end of a parameter's name, what is done to it). acts: the activation functions llama.cpp
    has for it. fixed: config fields, and the value llama.cpp computes with whatever the file says. extra: metadata of
    this family alone, without the architecture's prefix. untied: the head is wanted as a tensor of its own even when
    it is tied to the embedding.
    """

    name: str
    changes: tuple[tuple[str, Change], ...] = ()
    acts: tuple[str, ...] = ("silu",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    untied: bool = False


def _soft_capped(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise BadInput(
            "gemma2 without logit soft-capping: llama.cpp always applies it; no GGUF file can hold this model"
        )
    return _windowed(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _windowed(config: Any) -> dict[str, Any]:
    """Sliding windows of Gemma, and which layers have one: written out, so that no reader's default matters."""
    _check_scale(config)
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def _check_scale(config: Any) -> None:
    """llama.cpp derives the scale of attention scores from the size: 27B models by hidden size, others by head."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    heads = config.hidden_size // config.num_attention_heads
    wanted = heads if config.num_hidden_layers == largest else config.head_dim
    if config.query_pre_attn_scalar != wanted:
        raise BadInput(
            f"query_pre_attn_scalar {config.query_pre_attn_scalar}: llama.cpp computes with {wanted} for this "
            f"{config.model_type}; no GGUF file can hold the model"
        )


def _gemma3(config: Any) -> dict[str, Any]:
    out = _windowed(config) | {"rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}
    if config.final_logit_softcapping is not None:
        out["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return out


def _phi3(config: Any) -> dict[str, Any]:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": config.sliding_window or 0,
    }


def _mixtral(config: Any) -> dict[str, Any]:
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


def _qwen_moe(config: Any) -> dict[str, Any]:
    out = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        out["expert_shared_feed_forward_length"] = shared
    return out


_PERMUTED: tuple[tuple[str, Change], ...] = (
    ("q_proj.weight", "query"), ("q_proj.bias", "query"), ("k_proj.weight", "key"), ("k_proj.bias", "key"),
)  # fmt: skip
_SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_PLUS_ONE: tuple[tuple[str, Change], ...] = (("norm.weight", "plus_one"),)

ARCHITECTURES: dict[str, Architecture] = {  # by the HF model_type
    "llama": Architecture("llama", _PERMUTED),
    "mistral": Architecture("llama", _PERMUTED),
    "mixtral": Architecture("llama", _PERMUTED, extra=_mixtral),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", fixed=_SPARSE | {"norm_topk_prob": False}, extra=_qwen_moe, untied=True),
    "qwen3_moe": Architecture("qwen3moe", fixed=_SPARSE | {"norm_topk_prob": True}, extra=_qwen_moe),
    "gemma2": Architecture("gemma2", _PLUS_ONE, _TANH, extra=_soft_capped),
    "gemma3_text": Architecture("gemma3", _PLUS_ONE, _TANH, {"attn_logit_softcapping": None}, _gemma3),
    "phi3": Architecture("phi3", extra=_phi3),
    "gpt2": Architecture(
        "gpt2",
        tuple((f"{name}.weight", "transposed") for name in ("c_attn", "c_proj", "c_fc")),
        _TANH,
        {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
    ),
    # llama.cpp computes GPT-NeoX's gelu by the tanh formula, up to 5e-4 from the exact one.
    "gpt_neox": Architecture(
        "gptneox",
        (("query_key_value.weight", "by_head"), ("query_key_value.bias", "by_head")),
        (*_TANH, "gelu"),
        {"attention_bias": True},
        lambda config: {"use_parallel_residual": bool(config.use_parallel_residual)},
        untied=True,
    ),
}


def architecture(config: Any) -> Architecture:
    """The row of a transformers config; raises BadInput, naming what it is, for one that no GGUF file would hold."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise BadInput(f"architecture {config.model_type!r} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can")
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    act = getattr(config, "activation_function", act)
    if act not in row.acts:
        raise BadInput(f"{config.model_type} with activation {act!r}: llama.cpp has {', '.join(row.acts)} for it")
    for key, value in row.fixed.items():
        if getattr(config, key, value) != value:
            raise BadInput(
                f"config.json: {key} is {getattr(config, key)!r} and llama.cpp runs {row.name} with {value!r}; "
                "no GGUF file can hold this model"
            )
    return row


def change_of(row: Architecture, parameter: str) -> Change | None:
    """What is done to a parameter, by its HF name."""
    return next((change for ending, change in row.changes if parameter.endswith(ending)), None)


def to_gguf(change: Change | None, weight: Tensor, config: Any) -> Tensor:
    """An HF parameter the way GGUF has it; `query`, `key` and `by_head` reorder rows, so packed ones too."""
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


def from_gguf(change: Change | None, weight: Tensor, config: Any) -> Tensor:
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


def hyperparameters(config: Any, row: Architecture) -> dict[str, Any]:
    """The metadata that describe the model, by their full keys; RoPE among them."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    values: dict[str, Any] = {
        "vocab_size": int(config.vocab_size),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": hidden,
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(inner),
        "attention.head_count": heads,
        "attention.head_count_kv": int(getattr(config, "num_key_value_heads", None) or heads),
        "attention.key_length": int(head_dim),
        "attention.value_length": int(head_dim),
    }
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        values["attention.layer_norm_rms_epsilon"] = float(eps)
    eps = getattr(config, "layer_norm_eps", getattr(config, "layer_norm_epsilon", None))
    if eps is not None:
        values["attention.layer_norm_epsilon"] = float(eps)
    values |= _rope(config, int(head_dim)) | row.extra(config)
    return {f"{row.name}.{key}": value for key, value in values.items()}


def notes(config: Any, row: Architecture) -> list[str]:
    """What a GGUF file of this model loses."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if not window or "sliding_attention" not in layers or row.name.startswith("gemma"):
        return []
    if window >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        return []
    return [f"llama.cpp has no sliding window for {row.name}: beyond {window} tokens it attends to all of them"]


def _rope(config: Any, head_dim: int) -> dict[str, Any]:
    """RoPE's base, dimensions and scaling; raises BadInput for a scaling that GGUF cannot express."""
    if config.model_type == "gpt2":
        return {}
    rope = rope_parameters(config)
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    values = {"rope.dimension_count": int(head_dim * partial), "rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.get("factor") or 1.0)}
    match kind:
        case "default" | "llama3":  # llama3's factors are a tensor
            return values
        case "linear":
            return values | scaling
        case "yarn":
            return values | scaling | _yarn(rope)
        case "longrope":
            return values | {"rope.scaling.type": kind, "rope.scaling.attn_factor": _attention_factor(config, rope)}
    raise BadInput(f"RoPE scaling {kind!r} cannot be written as GGUF; linear, yarn, llama3 and longrope can")


def rope_parameters(config: Any) -> dict[str, Any]:
    """Those of full attention, where kinds of layers differ."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN beyond its factor; llama.cpp scales attention by 1 + 0.1 ln(factor) itself, and by attn_factor besides."""
    if rope.get("mscale") or rope.get("mscale_all_dim") or not rope.get("truncate", True):
        raise BadInput("YaRN with mscale or truncate: false cannot be written as GGUF for this family")
    out: dict[str, Any] = {
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if (factor := rope.get("attention_factor")) is not None:
        usual = 1 + 0.1 * math.log(rope["factor"])
        out["rope.scaling.attn_factor"] = float(factor) / usual
    return out


def _attention_factor(config: Any, rope: Mapping[str, Any]) -> float:
    """What LongRoPE multiplies attention by."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Factors that frequencies are divided by, float32 [rotated / 2], by their GGUF names."""
    if config.model_type == "gpt2":
        return {}
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        both = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{n}.weight": torch.tensor(v, dtype=torch.float32) for n, v in both.items()}
    if kind != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    original, low, high = (
        float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).to(torch.float32)}


def names_of(row: Architecture, blocks: int) -> gguf.TensorNameMap:
    """The `gguf` package's map from names of many families to GGUF's."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
    return gguf.get_tensor_name_map(arch, blocks)
