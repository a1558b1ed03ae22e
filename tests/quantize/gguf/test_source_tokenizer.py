"""Tokenizers out of GGUF files split text as the models' own do."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quantpress.engine.sources import resolve
from quantpress.gguf.source_tokenizer import save_tokenizer

from ..originals import ORIGINALS, TEXT, tiny, trained, write_gguf


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_tokenizers_split_like_the_originals(tmp_path: Path, pre: str) -> None:
    original = trained(pre)
    model = "Qwen3" if pre == "qwen2" else "Llama"
    path = resolve(str(write_gguf(tmp_path / "t.gguf", tiny(model), model.lower(), pre)), cache=tmp_path).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(f"<s>{TEXT}<tool></s>", add_special_tokens=False).input_ids
    assert ids == [1, *original.encode(TEXT, add_special_tokens=False).ids, original.token_to_id("<tool>"), 2]
    assert tokenizer(TEXT).input_ids[0] == (1 if pre == "llama-bpe" else ids[1])  # Llama 3 alone puts BOS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids[1:-1])
    assert "<tool>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_file_decides_about_bos_and_eos(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = resolve(str(write_gguf(tmp_path / "t.gguf", tiny("Qwen2"), "qwen2", extra=extra)), cache=tmp_path).path
    ids = AutoTokenizer.from_pretrained(path)("it").input_ids
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE by its rule: the adjacent pair that makes the best-scored piece is joined, the first first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    out: list[str] = []
    for piece in pieces:
        out += [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    joined = ["▁t", "he", "▁the", "er", "in", "▁a", "the", "re", "▁there", "ng", "ing", "▁▁"]
    scores = {piece: -float(i) for i, piece in enumerate([*joined, *"▁abcdefghinorst"])}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scores)],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    save_tokenizer(meta, Path("t.gguf"), tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("there the thing  a tether", "in é 🦙 being", "a"):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *sentencepiece(text, scores)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
