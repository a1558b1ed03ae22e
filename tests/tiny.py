"""Tiny random models of every supported family, made from their config classes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 256
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_MOE = _LLAMA | {"num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 128}
_GEMMA = _LLAMA | {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", _LLAMA),
    "gemma": ("GemmaConfig", _LLAMA),  # tied; its norms scale by 1 + weight
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": (
        "Gemma3TextConfig",
        _GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}),
    "gpt2": ("GPT2Config", _GPT2 | {"bos_token_id": 0, "eos_token_id": 1}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {k: v for k, v in _MOE.items() if k != "head_dim"}
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
        | {"mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE | {"num_experts": 4, "moe_intermediate_size": 32}),
    "mixtral": ("MixtralConfig", _MOE | {"num_local_experts": 4}),
}
# Families that the transforms know and that are otherwise like those above.
_BIASES = {"attention_bias": True, "mlp_bias": True}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("GraniteConfig", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | _BIASES
                | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 0.5}),
    "smollm3": ("SmolLM3Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"num_hidden_layers": 4}),
    "seed_oss": ("SeedOssConfig", _LLAMA),
    "ministral": ("MinistralConfig", _LLAMA | {"sliding_window": 8}),
    "ministral3": ("Ministral3Config", _LLAMA),
    "ernie4_5": ("Ernie4_5Config", _LLAMA | {"use_bias": True}),
    "olmo2": ("Olmo2Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "olmo3": ("Olmo3Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"sliding_window": 8}),
    "glm": ("GlmConfig", _LLAMA | {"attention_bias": True}),
    "glm4": ("Glm4Config", _LLAMA),
}  # fmt: skip


def build(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Save a tiny random model of `family` with a byte tokenizer in `folder`; returns the model."""
    name, settings = (FAMILIES | SCALED)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # norms of ones and biases of zeros would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `<s>` 0 and `</s>` 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet[: VOCAB - 2]]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def text(words: int = 4000) -> str:
    """Text with some structure, the same each time."""
    g = torch.Generator().manual_seed(1)
    stems = ["quant", "press", "the", "of", "block", "scale", "zero", "and", "group", "model", "in", "a"]
    picks = torch.randint(len(stems), (words,), generator=g).tolist()
    return " ".join(stems[i] + ("." if n % 9 == 8 else "") for n, i in enumerate(picks))


def model_and_text(folder: Path) -> Path:
    """`folder` with a tiny Llama, `model`, and `text.txt`."""
    build("llama", folder / "model", torch.bfloat16)
    (folder / "text.txt").write_text(text())
    return folder
