"""Config fields as the metadata of GGUF files and back, where a table does not say it all; `GgufForm` names these."""

from collections.abc import Mapping
from typing import Any

from ..core.errors import BadInput
from .family import GgufMetadata, setting

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


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


def gemma2_metadata(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise BadInput(
            "gemma2 without logit soft-capping: llama.cpp always applies it; no GGUF file can hold this model"
        )
    return _sliding_window_metadata(config, 46) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def gemma2_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    return _sliding_window_settings(meta, settings, 46, every=2) | {
        "attn_logit_softcapping": float(meta.hparam("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(meta.hparam("final_logit_softcapping", 30.0)),
    }


def gemma3_metadata(config: Any) -> dict[str, Any]:
    local = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    final = config.final_logit_softcapping
    capped = {} if final is None else {"final_logit_softcapping": float(final)}
    return _sliding_window_metadata(config, 62) | {"rope.freq_base_swa": local} | capped


def gemma3_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": float(meta.hparam("rope.freq_base_swa", 10000.0))}
    return _sliding_window_settings(meta, settings, 62, every=6) | {
        "final_logit_softcapping": meta.optional("final_logit_softcapping", None),
        "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": local},
    }


def phi3_metadata(config: Any) -> dict[str, Any]:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": config.sliding_window or 0,
    }


def phi3_settings(meta: GgufMetadata, settings: Mapping[str, Any]) -> dict[str, Any]:
    original = meta.hparam("rope.scaling.original_context_length", settings["max_position_embeddings"])
    window = meta.hparam("attention.sliding_window", 0) or None
    return {"original_max_position_embeddings": original, "sliding_window": window}


def window(config: Any) -> dict[str, Any]:
    """The sliding window and the layers that have it, with their own base of RoPE."""
    local = config.rope_parameters.get("sliding_attention")
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    } | ({"rope.freq_base_swa": float(local["rope_theta"])} if local else {})


def smollm3_metadata(config: Any) -> dict[str, Any]:
    if config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        raise BadInput(
            f"config.json: no_rope_layers is {config.no_rope_layers} and llama.cpp leaves RoPE out of every fourth "
            "layer of smollm3; no GGUF file can hold this model"
        )
    return {}


def ministral3_metadata(config: Any) -> dict[str, Any]:
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    return {} if beta is None else {"attention.temperature_scale": float(beta)}


def _refuse(config: Any, what: str, instead: str) -> BadInput:
    return BadInput(
        f"config.json: {what}, and llama.cpp runs {config.model_type} {instead}; no GGUF file can hold this model"
    )


def glm4_moe_metadata(config: Any) -> dict[str, Any]:
    return {"expert_gating_func": SIGMOID, "expert_weights_norm": bool(config.norm_topk_prob)}


def deepseek_metadata(config: Any, gating: int) -> dict[str, Any]:
    """Latent attention, which llama.cpp runs as one key-value head whose keys and values are the latent states."""
    rank, rope = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        raise _refuse(config, f"no q_lora_rank with {config.num_hidden_layers} layers", "so with 26 or 27 layers alone")
    return {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": int(config.qk_nope_head_dim) + rope,
        "attention.value_length_mla": int(config.v_head_dim),
        "rope.dimension_count": rope,
        "expert_gating_func": gating,
        "expert_weights_norm": True if config.norm_topk_prob else None,
    }


def gpt_oss_metadata(config: Any) -> dict[str, Any]:
    if config.layer_types != _kinds(config, "sliding_attention", 2):
        raise _refuse(config, f"layer_types is {config.layer_types}", "with a sliding window in every other layer")
    return {"attention.sliding_window": int(config.sliding_window)}


def llama4_metadata(config: Any) -> dict[str, Any]:
    if config.layer_types != _kinds(config, "chunked_attention", 4):
        raise _refuse(config, f"layer_types is {config.layer_types}", "with full attention in every fourth layer")
    if config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        raise _refuse(config, f"no_rope_layers is {config.no_rope_layers}", "without RoPE in every fourth layer")
    if config.use_qk_norm is (config.num_local_experts == 128):
        raise _refuse(config, f"use_qk_norm is {config.use_qk_norm}", "with it unless there are 128 experts")
    return {"feed_forward_length": int(config.intermediate_size_mlp)}


def _kinds(config: Any, usual: str, every: int) -> list[str]:
    """The kinds of layers where every `every`-th has full attention."""
    return ["full_attention" if (i + 1) % every == 0 else usual for i in range(config.num_hidden_layers)]


def delta_net_metadata(config: Any) -> dict[str, Any]:
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise _refuse(config, "linear_key_head_dim is not linear_value_head_dim", "with heads of one size")
    sections = [*config.rope_parameters.get("mrope_section", [11, 11, 10]), 0, 0][:4]
    return {
        "ssm.conv_kernel": int(config.linear_conv_kernel_dim),
        "ssm.state_size": int(config.linear_key_head_dim),
        "ssm.group_count": int(config.linear_num_key_heads),
        "ssm.time_step_rank": int(config.linear_num_value_heads),
        "ssm.inner_size": int(config.linear_value_head_dim * config.linear_num_value_heads),
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        "full_attention_interval": int(getattr(config, "full_attention_interval", None) or 4),
        "rope.dimension_sections": None if config.model_type == "qwen3_next" else sections,
    }


def lfm2_metadata(config: Any) -> dict[str, Any]:
    values = {
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.head_count_kv": [
            int(config.num_key_value_heads) if kind == "full_attention" else 0 for kind in config.layer_types
        ],
        "shortconv.l_cache": int(config.conv_L_cache),
    }
    if config.model_type == "lfm2" and config.block_auto_adjust_ff_dim:
        inner = int(2 * config.intermediate_size / 3)
        if config.block_ffn_dim_multiplier is not None:
            inner = int(config.block_ffn_dim_multiplier * inner)
        values["feed_forward_length"] = -(-inner // config.block_multiple_of) * config.block_multiple_of
    return values


def gemma4_metadata(config: Any) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    own = config.to_dict().get("per_layer_config") or {}
    layer = slides.index(False) if False in slides else -1
    full = own.get(layer) or own.get(str(layer)) or {}
    usual, kv = int(setting(config, "head_dim")), int(setting(config, "num_key_value_heads"))
    head = int(full.get("head_dim", usual))
    first, inner = config.num_hidden_layers - config.num_kv_shared_layers, int(config.intermediate_size)
    wide = [inner if i < first else 2 * inner for i in range(config.num_hidden_layers)]
    values = window(config) | {
        "attention.shared_kv_layers": int(config.num_kv_shared_layers),
        "embedding_length_per_layer_input": int(config.hidden_size_per_layer_input or 0),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.key_length_swa": usual,
        "attention.value_length_swa": usual,
        "attention.head_count_kv": kv,
        "rope.dimension_count": head,
        "rope.dimension_count_swa": usual,
        "feed_forward_length": wide if config.use_double_wide_mlp else inner,
    }
    if "num_key_value_heads" in full:
        values["attention.head_count_kv"] = [kv if slide else int(full["num_key_value_heads"]) for slide in slides]
    if config.enable_moe_block:
        values |= {
            "expert_count": int(config.num_experts),
            "expert_used_count": int(config.top_k_experts),
            "expert_feed_forward_length": int(config.moe_intermediate_size),
        }
    final = config.final_logit_softcapping
    return values | ({} if final is None else {"final_logit_softcapping": float(final)})


# ---- what llama.cpp computes otherwise, a line each ----------------------------------------------------------------


def rounded_bounds(config: Any) -> list[str]:
    """Of gpt-oss, whose YaRN goes over from one kind of frequency to the other between bounds that are not whole."""
    if config.rope_parameters.get("truncate", True):
        return []
    return ["llama.cpp rounds the bounds of YaRN (truncate: false), which changes a few frequencies a little"]


def plain_softmax(config: Any) -> list[str]:
    """Of Phi-MoE, which weighs each expert against those with a similar score."""
    return ["llama.cpp weighs the experts of phimoe by a plain softmax, not by their model's sparsemixer"]


def groups_by_their_best(config: Any) -> list[str]:
    """Of DeepSeek-V2, which ranks groups of experts by their best one."""
    if config.topk_method != "group_limited_greedy" or config.n_group == 1:
        return []
    return ["llama.cpp ranks the groups of experts by their two best ones, the model by the best"]
