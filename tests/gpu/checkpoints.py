"""Random checkpoints for the GPU check: small ones of three blocks, and two blocks of the shape of real models."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..quantize.originals import trained

_SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("LlamaConfig", _SMALL),
    "mixture": (
        "Qwen3MoeConfig",
        _SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
    "llama8b": (
        "LlamaConfig",
        _SMALL
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128},
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        _SMALL
        | {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")
_GROUP = 128  # columns that share a scale in the recipes that are timed


def write(folder: Path, shape: str, *, shrink: int = 1, device: torch.device | None = None) -> None:
    """Save a random bfloat16 model; `shrink` divides its widths, which stay whole groups, and its number of experts."""
    name, settings = _SHAPES[shape]
    if shrink > 1:
        settings = settings | {k: max(1, settings[k] // shrink // _GROUP) * _GROUP for k in _WIDTHS if k in settings}
        if "num_experts" in settings:
            settings["num_experts"] = max(settings["num_experts_per_tok"], settings["num_experts"] // shrink)
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    with torch.device(device or "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()  # as large as a trained model's hidden states are beside its weights
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
