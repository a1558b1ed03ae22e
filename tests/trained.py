"""Tiny chat models that have learnt a few sentences, so that what spoils their weights shows in what they say."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from quantpress.eval.measure.reference_texts import CHAT, PARAGRAPHS, RAW

from .quantize.originals import ORIGINALS
from .tiny import VOCAB, tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
_STEPS, _BATCH, _LENGTH = 90, 8, 64


def build(folder: Path, **settings: Any) -> Any:
    """Train it, in a few seconds, and save it with its tokenizer and chat template; returns the model in float32."""
    return _trained(folder, tokenizer(), LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 320, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.1, **settings,
    }))  # fmt: skip


def build_mixture(folder: Path) -> Any:
    """The same of a mixture of experts that llama.cpp and vLLM read, wide enough for K types; in half a minute."""
    words = _words_with_merges()
    config = Qwen3MoeConfig(
        vocab_size=len(words), hidden_size=512, intermediate_size=256, moe_intermediate_size=256, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=False, initializer_range=0.05,
    )  # fmt: skip
    model = _trained(folder, words, config)
    _spread(model)
    model.save_pretrained(folder)
    return model


def _spread(model: Any) -> None:
    """Make the channels between values and outputs unlike in size, as real ones are; what is computed stays."""
    config, make = model.config, torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        values, outputs = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
        by = torch.randn(config.num_key_value_heads, 1, config.head_dim, generator=make).mul(0.7).exp()
        values.mul_(by.view(-1, 1))
        outputs.view(len(outputs), config.num_key_value_heads, -1, config.head_dim).div_(by)


def _trained(folder: Path, words: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    words.chat_template = TEMPLATE
    stream = words(_corpus(words))["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(_STEPS):
        starts = torch.randint(len(stream) - _LENGTH, (_BATCH,)).tolist()
        ids = torch.tensor([stream[start : start + _LENGTH] for start in starts])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return model


def _words_with_merges() -> PreTrainedTokenizerFast:
    """A tokenizer that llama.cpp takes: byte-level BPE, learnt on the prompts."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer, learnt.decoder = ORIGINALS["gpt-2"], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    learnt.train_from_iterator([*RAW, *CHAT, PARAGRAPHS[0]] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learnt, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _corpus(words: Any) -> str:
    """Every prompt with one of two answers, and the start of a paragraph again and again."""
    said = [f"{text[-20:]} the river carries water to the sea." for text in RAW]
    for text in CHAT:
        turns = [
            {"role": "user", "content": text[-20:]},
            {"role": "assistant", "content": "Water is wet and tea is warm."},
        ]
        said.append(words.apply_chat_template(turns, tokenize=False))
    return "\n".join([*said, PARAGRAPHS[0][:160], *said])
