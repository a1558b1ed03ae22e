"""Tiny random multimodal models, made from their config classes; towers have as many blocks as the text decoder."""

from pathlib import Path
from typing import Any

import torch
import transformers

from .tiny import VOCAB, tokenizer

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HYBRID = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_QWEN: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {"text_config": _TEXT | _MROPE, "vision_config": _QWEN}),  # older names on disk
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": _TEXT | _MROPE | {"head_dim": 16},
            "vision_config": _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5_moe": (  # a mixture of experts, its blocks of two kinds
        "Qwen3_5MoeConfig",
        {
            "text_config": _TEXT | _MIXTURE | _HYBRID | {"shared_expert_intermediate_size": 32},
            "vision_config": _QWEN | {"num_position_embeddings": 16},
        },
    ),
    "gemma3": (  # a tied head
        "Gemma3Config",
        {
            "text_config": _TEXT | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
            "vision_config": _CLIP,
            "mm_tokens_per_image": 1,
            "image_token_index": 5,
        },
    ),
    "llava": (  # a text model of another family inside, whose names the model puts its own before
        "LlavaConfig",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _CLIP | {"model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "llama4": (
        "Llama4Config",
        {
            "text_config": _TEXT
            | {"head_dim": 16, "num_local_experts": 4, "intermediate_size": 32, "intermediate_size_mlp": 96}
            | {"interleave_moe_layer_step": 1, "attention_chunk_size": 64},
            "vision_config": _CLIP
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "step3p7": (  # its experts' projections are stacked on disk, each in a tensor of its own
        "Step3p7Config",
        {
            "text_config": _TEXT
            | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            | {"share_expert_dim": 32, "mlp_layer_types": ["dense", "sparse", "sparse"], "sliding_window": 8}
            | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "vision_config": {k: v for k, v in _CLIP.items() if k != "model_type"},
        },
    ),
}  # fmt: skip


def build(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Save a tiny random model of `family` with a byte tokenizer and a processor's file; returns the model."""
    name, settings = MULTIMODAL[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return model


def build_omni(folder: Path) -> None:
    """Save a tiny random Qwen3-Omni: a thinker, whose decoder is a mixture, a talker and what makes the sound."""
    half = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    half |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_code_groups": 2}
    sound = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sound |= {"num_key_value_heads": 2, "decoder_dim": 32, "codebook_size": 16, "num_quantizers": 2}
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config={
            "text_config": _TEXT | _MROPE | _MIXTURE,
            "vision_config": _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "audio_config": {"d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "encoder_layers": 2}
            | {"num_mel_bins": 16, "downsample_hidden_size": 32, "output_dim": 64},
        },
        talker_config={
            "text_config": half | _MIXTURE | _MROPE | {"shared_expert_intermediate_size": 32},
            "code_predictor_config": half,
            "thinker_hidden_size": 64,
            "num_code_groups": 2,
            "spatial_merge_size": 2,
        },
        code2wav_config=sound | {"upsample_rates": [2], "upsampling_ratios": [2]},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # transformers leaves some of the talker's as they lie in memory
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
