"""A tiny chat model that has learnt a few sentences, so that what spoils its weights shows in what it says."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantpress.eval.measure.reference_texts import CHAT, PARAGRAPHS, RAW

from .tiny import VOCAB, tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
_STEPS, _BATCH, _LENGTH = 90, 8, 64


def build(folder: Path, **settings: Any) -> Any:
    """Train it, in a few seconds, and save it with its tokenizer and chat template; returns the model in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 320, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.1, **settings,
    })  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    words = tokenizer()
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
