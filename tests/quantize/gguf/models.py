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
FAMILIES = tuple(family for family in tiny.FAMILIES if family != "gemma")  # which no row says how to write


def build(family: str, folder: Path, pre: str = "gpt-2", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Save a tiny random model in `folder`; returns it. Its norms are not ones and its biases not zeros."""
    name, usual = tiny.FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(usual | {"vocab_size": VOCAB} | SETTINGS.get(family, {}) | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
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
