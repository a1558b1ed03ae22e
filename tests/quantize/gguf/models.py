"""Tiny models of every family that llama.cpp runs, with a tokenizer it knows."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from ... import tiny
from ..originals import trained

VOCAB = 352  # more rows than the tokenizer has tokens
# What llama.cpp takes for granted of a family, and what of `tiny` is otherwise.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
}
_WIDE = {k: v for k, v in tiny._LLAMA.items() if k != "head_dim"} | {"hidden_size": 64}
_MOE = tiny._LLAMA | {"num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_GROUPED = {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
_SLIDING = ["sliding_attention", "full_attention"]
_FULL = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
]
_GEMMA4 = tiny._LLAMA | {
    "num_hidden_layers": 6, "layer_types": _SLIDING * 3, "sliding_window": 16, "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
# Families that only GGUF has a row for, and kinds of them.
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("GraniteConfig", _WIDE | {"logits_scaling": 1.25, "residual_multiplier": 0.5, "attention_bias": True}),
    "olmo2": ("Olmo2Config", _WIDE),
    "olmo3": ("Olmo3Config", _WIDE | {"num_hidden_layers": 4, "sliding_window": 16}),
    "smollm3": ("SmolLM3Config", _WIDE | {"num_hidden_layers": 4}),
    "seed_oss": ("SeedOssConfig", tiny._LLAMA),
    "ministral3": ("Ministral3Config", tiny._LLAMA),
    "ernie4_5": ("Ernie4_5Config", tiny._LLAMA),
    "glm4": ("Glm4Config", tiny._LLAMA),
    "glm4_moe": ("Glm4MoeConfig", _MOE | _GROUPED | {"use_qk_norm": True}),
    "deepseek_v3": ("DeepseekV3Config", _WIDE | _LATENT | _GROUPED | {"num_key_value_heads": 4, "n_group": 2}
                    | {"topk_group": 1, "num_experts_per_tok": 2, "rope_parameters": _YARN | _MSCALE}),
    "gpt_oss": ("GptOssConfig", _MOE | {"num_local_experts": 4, "sliding_window": 16, "layer_types": _SLIDING}
                | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama4_text": ("Llama4TextConfig", _MOE | {"num_local_experts": 4, "intermediate_size_mlp": 96}
                    | {"num_experts_per_tok": 1, "num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    "qwen3_next": ("Qwen3NextConfig", _MOE | _DELTA | _SHARED | {"num_hidden_layers": 4}),
    "qwen3_5_text": ("Qwen3_5TextConfig", tiny._LLAMA | _DELTA | {"num_hidden_layers": 4, "head_dim": 32}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", _MOE | _DELTA | _SHARED | {"num_hidden_layers": 4, "head_dim": 32}),
    "lfm2": ("Lfm2Config", _WIDE | _HYBRID | {"block_multiple_of": 32}),
    "lfm2_moe": ("Lfm2MoeConfig", _WIDE | _HYBRID | {"num_experts": 4, "num_experts_per_tok": 2}
                 | {"moe_intermediate_size": 32, "num_dense_layers": 1}),
    "gemma4_text": ("Gemma4TextConfig", _GEMMA4 | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16}
                    | {"use_double_wide_mlp": True}),
    "gemma4_moe": ("Gemma4TextConfig", _GEMMA4 | {"hidden_size_per_layer_input": 0, "enable_moe_block": True}
                   | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True}
                   | {"num_global_key_value_heads": 1, "final_logit_softcapping": 30.0}),
}  # fmt: skip
FAMILIES = tuple(tiny.FAMILIES)


def build(family: str, folder: Path, pre: str = "gpt-2", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Save a tiny random model in `folder`; returns it. Its norms are not ones and its biases not zeros."""
    name, usual = (tiny.FAMILIES | WRITTEN)[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(usual | {"vocab_size": VOCAB} | SETTINGS.get(family, {}) | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "layer_scalar")):
                buffer.add_(torch.rand_like(buffer) * 0.2)
    model.save_pretrained(folder)
    tokenizer(pre).save_pretrained(folder)
    return model


def tokenizer(pre: str = "gpt-2") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=trained(pre), bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits [tokens, vocabulary] of transformers."""
    with torch.no_grad():
        out: torch.Tensor = model(ids[None]).logits[0].float()
    return out


IDS = torch.arange(40) * 7 % 340
