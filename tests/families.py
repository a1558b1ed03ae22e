"""Tiny random checkpoints of the model families that transformers has, and what of them is proved.

Sizes are the same for all where a config class has the field. What a family needs besides is in its row.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .tiny import VOCAB, tokenizer

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {"num_key_value_heads": 4}  # attention over latents has as many heads for keys
_ALTERNATE = ["sliding_attention", "full_attention"] * 3
_SHARING = {  # keys and values of the last blocks are those of earlier ones; embeddings for each block
    "layer_types": _ALTERNATE,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}
_PLAIN = """
    afmoe apertus arcee bamba biogpt bitnet bloom cohere cohere2 cohere2_moe cwm deepseek_v4
    doge diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2
    gemma3_text gemma4_unified_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hy_v4 hyperclovax jais2 jetmoe kimi_linear laguna llama llama4_text mamba mellum mimo_v2_flash minimax
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next rwkv seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma xglm xlstm
"""
_LATENTS = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu"
# What a family needs besides the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in _PLAIN.split()},
    **dict.fromkeys(_LATENTS.split(), _LATENT),
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": _SHARING | {"laurel_rank": 8, "activation_sparsity_pattern": [0.5] + 5 * [0.0]},
    "gemma4_text": _SHARING | {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
    }
    | _LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [2],
        "ngram_vocab_size_base": 1000,
        "split_ngram_parts": 4,
        "hc_lowrank": 16,
        "hc_count": 2,
    },
    "recurrent_gemma": {"intermediate_size": 128},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "mamba_dt_rank": 8},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(family: str, **more: Any) -> Any:
    """The transformers config of a tiny model of `family`, with these fields."""
    kind = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters)
    return kind(**{name: value for name, value in _SMALL.items() if name in fields} | FAMILIES[family] | more)


def build(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Save a tiny random model of `family` with a byte tokenizer in `folder`; returns the model.

    Weights are drawn so wide, and all saved values differ so much, that whatever is lost or misread shows.
    """
    return save(config_of(family), folder, dtype)


def save(config: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """As `build`, for the config of a model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.float().std() < 0.05:
                parameter.normal_(0, 0.1)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and "balancing_biases" not in name:  # reset on loading
                buffer.add_(torch.rand_like(buffer) * 0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model
