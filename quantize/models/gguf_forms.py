"""How GGUF files hold each model family: a row each, by the model_type of config.json."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..core.errors import BadInput
from .family import LLAMA_SIZES, GgufForm, GgufMetadata, TensorChange, setting

# ---- how GGUF holds it -------------------------------------------------------------------------------------------

_Changes = tuple[tuple[str, tuple[TensorChange, ...]], ...]
_PERMUTED: _Changes = (
    ("q_proj.weight", ("query",)), ("q_proj.bias", ("query",)),
    ("k_proj.weight", ("key",)), ("k_proj.bias", ("key",)),
)  # fmt: skip
_PLUS_ONE: _Changes = (("norm.weight", ("plus_one",)),)
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func
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




def _window(config: Any) -> dict[str, Any]:
    """The sliding window and the layers that have it, with their own base of RoPE."""
    local = config.rope_parameters.get("sliding_attention")
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    } | ({"rope.freq_base_swa": float(local["rope_theta"])} if local else {})


def _smollm3_metadata(config: Any) -> dict[str, Any]:
    if config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        raise BadInput(
            f"config.json: no_rope_layers is {config.no_rope_layers} and llama.cpp leaves RoPE out of every fourth "
            "layer of smollm3; no GGUF file can hold this model"
        )
    return {}


def _ministral3_metadata(config: Any) -> dict[str, Any]:
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    return {} if beta is None else {"attention.temperature_scale": float(beta)}


def _refuse(config: Any, what: str, instead: str) -> BadInput:
    return BadInput(
        f"config.json: {what}, and llama.cpp runs {config.model_type} {instead}; no GGUF file can hold this model"
    )


def _glm4_moe_metadata(config: Any) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID, "expert_weights_norm": bool(config.norm_topk_prob)}


def _deepseek_metadata(config: Any, gating: int) -> dict[str, Any]:
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


def _gpt_oss_metadata(config: Any) -> dict[str, Any]:
    if config.layer_types != _kinds(config, "sliding_attention", 2):
        raise _refuse(config, f"layer_types is {config.layer_types}", "with a sliding window in every other layer")
    return {"attention.sliding_window": int(config.sliding_window)}


def _llama4_metadata(config: Any) -> dict[str, Any]:
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


def _delta_net_metadata(config: Any) -> dict[str, Any]:
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


def _lfm2_metadata(config: Any) -> dict[str, Any]:
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


def _gemma4_metadata(config: Any) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    own = config.to_dict().get("per_layer_config") or {}
    layer = slides.index(False) if False in slides else -1
    full = own.get(layer) or own.get(str(layer)) or {}
    usual, kv = int(setting(config, "head_dim")), int(setting(config, "num_key_value_heads"))
    head = int(full.get("head_dim", usual))
    first, inner = config.num_hidden_layers - config.num_kv_shared_layers, int(config.intermediate_size)
    wide = [inner if i < first else 2 * inner for i in range(config.num_hidden_layers)]
    values = _window(config) | {
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


# ---- the table ---------------------------------------------------------------------------------------------------

_LLAMA = GgufForm("llama", _PERMUTED, switches=_BIASES)
_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_LOCAL_COUNTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_GROUPED_COUNTS = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
}
_DEEPSEEK = GgufForm(
    "deepseek2",
    fixed={"attention_bias": False},
    counts=_GROUPED_COUNTS,
    scales={"routed_scaling_factor": "expert_weights_scale"},
    mscale=0.1,
    named={"kv_b_proj.weight": (("attn_k_b.weight", ("key_b",)), ("attn_v_b.weight", ("value_b",)))},
    reads_back=False,
)
_DELTA: _Changes = (
    ("A_log", ("negative_exp",)), ("conv1d.weight", ("squeezed",)), ("linear_attn.norm.weight", ()),
    ("norm.weight", ("plus_one",)),
)  # fmt: skip
_TILED: _Changes = (
    ("A_log", ("negative_exp", "value_rows")), ("conv1d.weight", ("squeezed", "value_tail")),
    ("in_proj_qkv.weight", ("value_tail",)), ("in_proj_z.weight", ("value_rows",)),
    ("in_proj_a.weight", ("value_rows",)), ("in_proj_b.weight", ("value_rows",)),
    ("linear_attn.out_proj.weight", ("value_columns",)), ("linear_attn.norm.weight", ()),
    ("norm.weight", ("plus_one",)),
)  # fmt: skip
_DELTA_NET = GgufForm(
    "qwen35",
    _DELTA,
    fixed={"attention_bias": False},
    rope="partial",
    counts=_QWEN_MOE_COUNTS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    named={
        "in_proj_qkvz.weight": (("attn_qkv.weight", ("queries_keys_values",)), ("attn_gate.weight", ("gates",))),
        "linear_attn.dt_bias": (("ssm_dt.bias", ()),),
    },
    metadata=_delta_net_metadata,
    reads_back=False,
)
_QWEN3_5 = replace(_DELTA_NET, changes=_TILED, named={"linear_attn.dt_bias": (("ssm_dt.bias", ("value_rows",)),)})
_CONVOLVED: _Changes = (("conv.conv.weight", ("squeezed",)),)

FORMS: dict[str, GgufForm] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, counts={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}),
    "qwen2": GgufForm("qwen2"),
    "qwen3": GgufForm("qwen3"),
    "qwen2_moe": GgufForm(
        "qwen2moe",
        fixed=_ALL_SPARSE | {"norm_topk_prob": False},
        untied=True,
        counts=_QWEN_MOE_COUNTS | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    ),
    "qwen3_moe": GgufForm("qwen3moe", fixed=_ALL_SPARSE | {"norm_topk_prob": True}, counts=_QWEN_MOE_COUNTS),
    "gemma2": GgufForm(
        "gemma2", _PLUS_ONE, _TANH, sliding_window=True, metadata=_gemma2_metadata, settings=_gemma2_settings
    ),
    "gemma3_text": GgufForm(
        "gemma3",
        _PLUS_ONE,
        _TANH,
        fixed={"attn_logit_softcapping": None},
        sliding_window=True,
        metadata=_gemma3_metadata,
        settings=_gemma3_settings,
    ),
    "phi3": GgufForm("phi3", rope="partial", metadata=_phi3_metadata, settings=_phi3_settings),
    "gpt2": GgufForm(
        "gpt2",
        tuple((f"{name}.weight", ("transposed",)) for name in ("c_attn", "c_proj", "c_fc")),
        _TANH,
        fixed={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
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
    # llama.cpp computes GPT-NeoX's gelu by the tanh formula, up to 5e-4 from the exact one.
    "gpt_neox": GgufForm(
        "gptneox",
        (("query_key_value.weight", ("by_head",)), ("query_key_value.bias", ("by_head",))),
        (*_TANH, "gelu"),
        fixed={"attention_bias": True},
        untied=True,
        rope="partial",
        sizes=_GPT_NEOX_SIZES | {"layer_norm_eps": "attention.layer_norm_epsilon"},
        counts={"use_parallel_residual": "use_parallel_residual"},
    ),
    "gemma": GgufForm("gemma", _PLUS_ONE, _TANH),
    "granite": GgufForm(
        "granite",
        _PERMUTED,
        switches=_BIASES,
        scales={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "olmo2": GgufForm("olmo2", fixed={"attention_bias": False}),
    "olmo3": GgufForm(
        "olmo2", fixed={"attention_bias": False}, sliding_window=True, metadata=_window, reads_back=False
    ),
    "smollm3": GgufForm("smollm3", _PERMUTED, fixed=_NO_BIASES, metadata=_smollm3_metadata),
    "seed_oss": GgufForm("seed_oss", fixed={"attention_out_bias": False, "mlp_bias": False}, reads_back=False),
    "ministral3": GgufForm("mistral3", _PERMUTED, mscale=1.0, metadata=_ministral3_metadata, reads_back=False),
    "ernie4_5": GgufForm("ernie4_5", fixed={"use_bias": False}),
    "glm4": GgufForm("glm4", rope="partial", reads_back=False),
    "glm4_moe": GgufForm(
        "glm4moe",
        rope="partial",
        counts=_GROUPED_COUNTS,
        scales={"routed_scaling_factor": "expert_weights_scale"},
        metadata=_glm4_moe_metadata,
        reads_back=False,
    ),
    "deepseek_v2": replace(_DEEPSEEK, metadata=partial(_deepseek_metadata, gating=_SOFTMAX)),
    "deepseek_v3": replace(
        _DEEPSEEK, fixed={"rope_interleave": True}, metadata=partial(_deepseek_metadata, gating=_SIGMOID)
    ),
    "gpt_oss": GgufForm(
        "gpt-oss",
        sliding_window=True,
        counts=_LOCAL_COUNTS | {"intermediate_size": "expert_feed_forward_length"},
        named={"self_attn.sinks": (("attn_sinks.weight", ()),)},
        truncates=True,
        metadata=_gpt_oss_metadata,
        reads_back=False,
    ),
    "phimoe": GgufForm(
        "phimoe", rope="partial", fixed={"lm_head_bias": True, "attention_bias": True}, counts=_LOCAL_COUNTS, metadata=_phi3_metadata,
        reads_back=False,
    ),  # fmt: skip
    "llama4_text": GgufForm(
        "llama4",
        fixed={
            "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
            "attention_bias": False,
        },
        counts=_LOCAL_COUNTS
        | {"intermediate_size": "expert_feed_forward_length", "interleave_moe_layer_step": "interleave_moe_layer_step"},
        metadata=_llama4_metadata,
        reads_back=False,
    ),  # fmt: skip
    "qwen3_next": replace(_DELTA_NET, architecture="qwen3next", fixed=_ALL_SPARSE | {"norm_topk_prob": True}),
    "qwen3_5_text": replace(_QWEN3_5, counts={}),
    "qwen3_5_moe_text": replace(_QWEN3_5, architecture="qwen35moe"),
    "lfm2": GgufForm("lfm2", _CONVOLVED, (), fixed={"conv_bias": False}, metadata=_lfm2_metadata, reads_back=False),
    "lfm2_moe": GgufForm(
        "lfm2moe",
        _CONVOLVED,
        (),
        fixed={"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        counts=_QWEN_MOE_COUNTS | {"num_dense_layers": "leading_dense_block_count"},
        named={"expert_bias": (("exp_probs_b.bias", ()),)},
        metadata=lambda config: _lfm2_metadata(config) | {"expert_gating_func": _SIGMOID},
        reads_back=False,
    ),
    "gemma4_text": GgufForm(
        "gemma4",
        (),
        _TANH,
        fixed={"attention_bias": False},
        sliding_window=True,
        named={
            "layer_scalar": (("layer_output_scale.weight", ()),),
            "router.scale": (("ffn_gate_inp.scale", ()),),
            "router.per_expert_scale": (("ffn_down_exps.scale", ()),),
            "experts.gate_proj.weight": (("ffn_gate_exps.weight", ()),),
            "experts.up_proj.weight": (("ffn_up_exps.weight", ()),),
        },
        metadata=_gemma4_metadata,
        reads_back=False,
    ),
}
