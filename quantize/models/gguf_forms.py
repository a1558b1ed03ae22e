"""How GGUF files hold each model family: a row each, by the model_type of config.json."""

from dataclasses import replace
from functools import partial

from .family import LLAMA_SIZES, GgufForm, TensorChange
from .gguf_metadata import (
    SIGMOID,
    SOFTMAX,
    deepseek_metadata,
    delta_net_metadata,
    gemma2_metadata,
    gemma2_settings,
    gemma3_metadata,
    gemma3_settings,
    gemma4_metadata,
    glm4_moe_metadata,
    gpt_oss_metadata,
    groups_by_their_best,
    lfm2_metadata,
    llama4_metadata,
    ministral3_metadata,
    phi3_metadata,
    phi3_settings,
    plain_softmax,
    rounded_bounds,
    smollm3_metadata,
    window,
)

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
    metadata=delta_net_metadata,
    reads_back=False,
)
_QWEN3_5 = replace(_DELTA_NET, changes=_TILED, named={"linear_attn.dt_bias": (("ssm_dt.bias", ("value_rows",)),)})
_CONVOLVED: _Changes = (("conv.conv.weight", ("squeezed",)),)

FORMS: dict[str, GgufForm] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(
        _LLAMA, counts={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    ),
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
        "gemma2", _PLUS_ONE, _TANH, sliding_window=True, metadata=gemma2_metadata, settings=gemma2_settings
    ),
    "gemma3_text": GgufForm(
        "gemma3",
        _PLUS_ONE,
        _TANH,
        fixed={"attn_logit_softcapping": None},
        sliding_window=True,
        metadata=gemma3_metadata,
        settings=gemma3_settings,
    ),
    "phi3": GgufForm("phi3", rope="partial", metadata=phi3_metadata, settings=phi3_settings),
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
    "olmo3": GgufForm("olmo2", fixed={"attention_bias": False}, sliding_window=True, metadata=window, reads_back=False),
    "smollm3": GgufForm("smollm3", _PERMUTED, fixed=_NO_BIASES, metadata=smollm3_metadata),
    "seed_oss": GgufForm("seed_oss", fixed={"attention_out_bias": False, "mlp_bias": False}, reads_back=False),
    "ministral3": GgufForm("mistral3", _PERMUTED, mscale=1.0, metadata=ministral3_metadata, reads_back=False),
    "ernie4_5": GgufForm("ernie4_5", fixed={"use_bias": False}),
    "glm4": GgufForm("glm4", rope="partial", reads_back=False),
    "glm4_moe": GgufForm(
        "glm4moe",
        rope="partial",
        counts=_GROUPED_COUNTS,
        scales={"routed_scaling_factor": "expert_weights_scale"},
        metadata=glm4_moe_metadata,
        reads_back=False,
    ),
    "deepseek_v2": replace(
        _DEEPSEEK, metadata=partial(deepseek_metadata, gating=SOFTMAX), caveats=groups_by_their_best
    ),
    "deepseek_v3": replace(
        _DEEPSEEK, fixed={"rope_interleave": True}, metadata=partial(deepseek_metadata, gating=SIGMOID)
    ),
    "gpt_oss": GgufForm(
        "gpt-oss",
        sliding_window=True,
        counts=_LOCAL_COUNTS | {"intermediate_size": "expert_feed_forward_length"},
        named={"self_attn.sinks": (("attn_sinks.weight", ()),)},
        truncates=True,
        metadata=gpt_oss_metadata,
        caveats=rounded_bounds,
        reads_back=False,
    ),
    "phimoe": GgufForm(
        "phimoe",
        rope="partial",
        fixed={"lm_head_bias": True, "attention_bias": True},
        counts=_LOCAL_COUNTS,
        metadata=phi3_metadata,
        caveats=plain_softmax,
        reads_back=False,
    ),
    "llama4_text": GgufForm(
        "llama4",
        fixed={
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "attention_bias": False,
        },
        counts=_LOCAL_COUNTS
        | {"intermediate_size": "expert_feed_forward_length", "interleave_moe_layer_step": "interleave_moe_layer_step"},
        metadata=llama4_metadata,
        reads_back=False,
    ),
    "qwen3_next": replace(_DELTA_NET, architecture="qwen3next", fixed=_ALL_SPARSE | {"norm_topk_prob": True}),
    "qwen3_5_text": replace(_QWEN3_5, counts={}),
    "qwen3_5_moe_text": replace(_QWEN3_5, architecture="qwen35moe"),
    "lfm2": GgufForm("lfm2", _CONVOLVED, (), fixed={"conv_bias": False}, metadata=lfm2_metadata, reads_back=False),
    "lfm2_moe": GgufForm(
        "lfm2moe",
        _CONVOLVED,
        (),
        fixed={"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        counts=_QWEN_MOE_COUNTS | {"num_dense_layers": "leading_dense_block_count"},
        named={"expert_bias": (("exp_probs_b.bias", ()),)},
        metadata=lambda config: lfm2_metadata(config) | {"expert_gating_func": SIGMOID},
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
        metadata=gemma4_metadata,
        reads_back=False,
    ),
}
