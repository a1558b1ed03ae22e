"""The model families, one row each.

A decoder stack whose blocks are one ModuleList of `num_hidden_layers` entries can be quantized without a row. Needed is
one for the transforms, which scale or rotate the output of a module and undo it in the linears that read it, and for
GGUF.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import BadInput
from .family import LLAMA_SIZES, Family, Feed, GgufForm, GgufMetadata, TensorChange

_SANDWICH = "norms after attention and MLP scale, channel by channel, what is added to the residual stream"
_LAYER_NORM = "LayerNorm subtracts the mean over channels, which a rotation does not keep"

# ---- what feeds what ---------------------------------------------------------------------------------------------

_ATTENTION = (
    Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Feed("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
)
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = Feed("mlp.up_proj", ("mlp.down_proj",))
_LLAMA_FEEDS = (*_ATTENTION, Feed("post_attention_layernorm", _MLP), _DOWN)
_PHI3_FEEDS = (
    Feed("input_layernorm", ("self_attn.qkv_proj",)),
    Feed("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True, last=True),
    Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Feed("mlp.gate_up_proj", ("mlp.down_proj",), last=True),
)
_GEMMA_FEEDS = tuple(replace(feed, plus_one=feed.source.endswith("layernorm")) for feed in _LLAMA_FEEDS)
_SANDWICH_FEEDS = tuple(
    replace(feed, source="pre_feedforward_layernorm") if feed.source == "post_attention_layernorm" else feed
    for feed in _GEMMA_FEEDS
)
_QWEN_MOE_FEEDS = (
    *_ATTENTION,
    Feed(
        "post_attention_layernorm",
        (
            "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj",
            "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", *_MLP,
        ),
    ),
    Feed("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    Feed("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    _DOWN,
)  # fmt: skip
_MIXTRAL_FEEDS = (
    *_ATTENTION,
    Feed("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
    Feed("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
)
# GPT-NeoX fuses q, k and v head by head, so that the values are not the last rows. Here and in GPT-2 a GELU comes
# before the second linear of the feed-forward: no scale can be moved through it.
_GPT_NEOX_FEEDS = (
    Feed("input_layernorm", ("attention.query_key_value",)),
    Feed("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
_GPT2_FEEDS = (
    Feed("ln_1", ("attn.c_attn",)),
    Feed("attn.c_attn", ("attn.c_proj",), heads=True, last=True),
    Feed("ln_2", ("mlp.c_fc",)),
)

# ---- how GGUF holds it -------------------------------------------------------------------------------------------

_Changes = tuple[tuple[str, tuple[TensorChange, ...]], ...]
_PERMUTED: _Changes = (
    ("q_proj.weight", ("query",)), ("q_proj.bias", ("query",)),
    ("k_proj.weight", ("key",)), ("k_proj.bias", ("key",)),
)  # fmt: skip
_PLUS_ONE: _Changes = (("norm.weight", ("plus_one",)),)
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_ALL_SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}  # experts in every block
_QWEN_MOE_COUNTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_GPT_NEOX_SIZES = {k: v for k, v in LLAMA_SIZES.items() if k not in ("num_key_value_heads", "head_dim", "rms_norm_eps")}


def _sliding_window_metadata(config: Any, blocks_of_27b: int) -> dict[str, Any]:
    """Gemma's sliding window and the layers that have it, written out so that no reader falls back on its defaults."""
    wanted = _attention_scalar(config.to_dict(), blocks_of_27b)
    if config.query_pre_attn_scalar != wanted:
        raise BadInput(
            f"query_pre_attn_scalar {config.query_pre_attn_scalar}: llama.cpp computes with {wanted} for this "
            f"{config.model_type}; no GGUF file can hold the model"
        )
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def _sliding_window_settings(
    meta: GgufMetadata, settings: Mapping[str, Any], blocks_of_27b: int, every: int
) -> dict[str, Any]:
    """The inverse of `_sliding_window_metadata`; a file without a pattern has no window in every `every`-th layer."""
    blocks = settings["num_hidden_layers"]
    pattern = meta.optional("attention.sliding_window_pattern", [(i + 1) % every != 0 for i in range(blocks)])
    return {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "sliding_window": meta.hparam("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _attention_scalar(settings, blocks_of_27b),
    }


def _attention_scalar(settings: Mapping[str, Any], blocks_of_27b: int) -> int:
    """query_pre_attn_scalar in llama.cpp, which has another one for 27B models and knows them by their blocks."""
    if settings["num_hidden_layers"] == blocks_of_27b:
        return int(settings["hidden_size"] // settings["num_attention_heads"])
    return int(settings["head_dim"])


def _gemma2_metadata(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise BadInput(
            "gemma2 without logit soft-capping: llama.cpp always applies it; no GGUF file can hold this model"
        )
    return _sliding_window_metadata(config, 46) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma2_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    return _sliding_window_settings(meta, settings, 46, every=2) | {
        "attn_logit_softcapping": float(meta.hparam("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(meta.hparam("final_logit_softcapping", 30.0)),
    }


def _gemma3_metadata(config: Any) -> dict[str, Any]:
    local = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    final = config.final_logit_softcapping
    capped = {} if final is None else {"final_logit_softcapping": float(final)}
    return _sliding_window_metadata(config, 62) | {"rope.freq_base_swa": local} | capped


def _gemma3_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": float(meta.hparam("rope.freq_base_swa", 10000.0))}
    return _sliding_window_settings(meta, settings, 62, every=6) | {
        "final_logit_softcapping": meta.optional("final_logit_softcapping", None),
        "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": local},
    }


def _phi3_metadata(config: Any) -> dict[str, Any]:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": config.sliding_window or 0,
    }


def _phi3_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    original = meta.hparam("rope.scaling.original_context_length", settings["max_position_embeddings"])
    window = meta.hparam("attention.sliding_window", 0) or None
    return {"original_max_position_embeddings": original, "sliding_window": window}


# ---- the table ---------------------------------------------------------------------------------------------------

_LLAMA = Family(feeds=_LLAMA_FEEDS, no_hadamard=None, gguf=GgufForm("llama", _PERMUTED, switches=_BIASES))
_QWEN_MOE = Family(feeds=_QWEN_MOE_FEEDS, no_hadamard=None)

FAMILIES: dict[str, Family] = {  # by the model_type of config.json; a GGUF file is read as the first row it fits
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(
        feeds=_MIXTRAL_FEEDS,
        no_hadamard=None,
        gguf=GgufForm(
            "llama",
            _PERMUTED,
            counts={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
            switches=_BIASES,
        ),
    ),
    "qwen2": replace(_LLAMA, gguf=GgufForm("qwen2")),
    "qwen3": replace(_LLAMA, gguf=GgufForm("qwen3")),
    "qwen2_moe": replace(
        _QWEN_MOE,
        gguf=GgufForm(
            "qwen2moe",
            fixed=_ALL_SPARSE | {"norm_topk_prob": False},
            untied=True,
            counts=_QWEN_MOE_COUNTS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        ),
    ),
    "qwen3_moe": replace(
        _QWEN_MOE,
        gguf=GgufForm("qwen3moe", fixed=_ALL_SPARSE | {"norm_topk_prob": True}, counts=_QWEN_MOE_COUNTS),
    ),
    "gemma": Family(feeds=_GEMMA_FEEDS, no_hadamard=None),
    "gemma2": Family(
        feeds=_SANDWICH_FEEDS,
        no_hadamard=_SANDWICH,
        gguf=GgufForm(
            "gemma2",
            _PLUS_ONE,
            _TANH,
            sliding_window=True,
            metadata=_gemma2_metadata,
            settings=_gemma2_settings,
        ),
    ),
    "gemma3_text": Family(
        feeds=_SANDWICH_FEEDS,
        no_hadamard=_SANDWICH,
        gguf=GgufForm(
            "gemma3",
            _PLUS_ONE,
            _TANH,
            fixed={"attn_logit_softcapping": None},
            sliding_window=True,
            metadata=_gemma3_metadata,
            settings=_gemma3_settings,
        ),
    ),
    "phi3": Family(
        feeds=_PHI3_FEEDS,
        no_hadamard=None,
        gguf=GgufForm("phi3", rope="partial", metadata=_phi3_metadata, settings=_phi3_settings),
    ),
    "gpt2": Family(
        feeds=_GPT2_FEEDS,
        no_hadamard=_LAYER_NORM,
        gguf=GgufForm(
            "gpt2",
            tuple((f"{name}.weight", ("transposed",)) for name in ("c_attn", "c_proj", "c_fc")),
            _TANH,
            fixed={
                "scale_attn_by_inverse_layer_idx": False,
                "scale_attn_weights": True,
                "add_cross_attention": False,
            },
            rope="none",
            sizes={
                "n_embd": "embedding_length",
                "n_inner": "feed_forward_length",
                "n_layer": "block_count",
                "n_head": "attention.head_count",
                "n_positions": "context_length",
                "layer_norm_epsilon": "attention.layer_norm_epsilon",
            },
        ),
    ),
    # llama.cpp computes GPT-NeoX's gelu by the tanh formula, up to 5e-4 from the exact one.
    "gpt_neox": Family(
        feeds=_GPT_NEOX_FEEDS,
        no_hadamard=_LAYER_NORM,
        gguf=GgufForm(
            "gptneox",
            (("query_key_value.weight", ("by_head",)), ("query_key_value.bias", ("by_head",))),
            (*_TANH, "gelu"),
            fixed={"attention_bias": True},
            untied=True,
            rope="partial",
            sizes=_GPT_NEOX_SIZES | {"layer_norm_eps": "attention.layer_norm_epsilon"},
            counts={"use_parallel_residual": "use_parallel_residual"},
        ),
    ),
}
UNLISTED = Family()


def family_of(model_type: str) -> Family:
    """The row of a model type; `UNLISTED`, which says nothing, where there is none."""
    return FAMILIES.get(model_type, UNLISTED)
