"""Tiny models to start from, as transformers holds them and as GGUF files, and what a refused one must look like."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from quantpress.core.errors import BadInput
from quantpress.engine.sources import resolve

TEXT = (
    "It's 12345 o'clock,  isn't it?\n\n\tWE'LL SEE café cafe\u0301 日本語 ½ ١٢٣ "
    "def f(x):\n    return x**2  \r\n🦙 HelloWorld"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ORIGINALS: dict[str, Any] = {  # how the models' own tokenizer.json files split text
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
}


def trained(pre: str = "qwen2") -> Tokenizer:
    """A small byte-level BPE tokenizer with three control tokens and one user-defined."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = ORIGINALS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = document["model"]["merges"][:-20]  # tokens that only ignore_merges can reach
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str, template: str = PLAIN_TEMPLATE) -> None:
    document = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 4 if token == "<tool>" else 1 for i, token in enumerate(tokens)])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(template)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of Q and K of a Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tiny(name: str, noise: float = 0.2, **settings: Any) -> Any:
    """A random model of two blocks whose weights are bf16 numbers, so that the conversion loses nothing."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "GPT2":
        size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64}
    else:
        size |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = getattr(transformers, f"{name}Config")(vocab_size=trained().get_vocab_size(), **(size | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, or a swap of two of them would not show
            parameter.copy_((parameter + noise * torch.randn_like(parameter)).to(torch.bfloat16))
    return model


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    pre: str = "qwen2",
    extra: dict[str, Any] | None = None,
    blocks: int | None = None,
    context: int = 64,
    template: str = PLAIN_TEMPLATE,
) -> Path:
    """`model` the way llama.cpp's converter writes it, in float32; `blocks`: a false number of blocks."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(context)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(96)
    writer.add_block_count(blocks or c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_key_length(c.head_dim if getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    write_tokenizer(writer, trained(pre), pre, template)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and "q_proj" in name:
            tensor = permuted(tensor, c.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            tensor = permuted(tensor, c.num_key_value_heads)
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().contiguous().numpy())
    if c.to_dict().get("rope_parameters", {}).get("rope_type") == "llama3":
        default = 1 / c.rope_parameters["rope_theta"] ** (np.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (default / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(model: str | Path, words: str, cache: Path, **flags: bool) -> None:
    """One line that says `words`, and nothing under a final name in the cache."""
    with pytest.raises(BadInput, match=words) as caught:
        resolve(str(model), cache=cache, **flags)
    assert "\n" not in str(caught.value)
    assert not [p for p in cache.rglob("*") if p.is_file()]
