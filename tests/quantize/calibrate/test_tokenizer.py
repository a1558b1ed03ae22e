"""Tokenizers that cannot be read, or are not the model's, are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.calibrate.tokens import check_chat_template, check_ids, check_vocabulary, end_tokens, open_tokenizer
from quantpress.core.errors import BadInput

from ...tiny import VOCAB, tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        open_tokenizer(folder)
    assert "\n" not in str(caught.value)


def settings(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_config_that_cannot_be_read_is_not_the_tokenizers_fault(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": "3"}))
    refused(tmp_path, r"config\.json: transformers cannot read it: .*num_hidden_layers")


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no tokenizer; copy the original's")
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    for content, words in (
        (whole[:500], "not readable as JSON"),
        ("{}", "no tokenizer that can be read"),
        (POINTER, "tokenizer.json: a Git LFS pointer"),
    ):
        file.write_text(content)
        refused(tmp_path, words)
    file.write_text(whole)
    assert open_tokenizer(tmp_path)("abc")["input_ids"]
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused(tmp_path, "expected a JSON object")


def test_a_tokenizer_of_sentencepiece_only_needs_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "sp.model").rename(tmp_path / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    with monkeypatch.context() as without:
        without.setattr("quantpress.calibrate.tokens._has_protobuf", lambda: False)
        refused(tmp_path, "SentencePiece model only, which needs `pip install protobuf`")
    pytest.importorskip("google.protobuf")
    found = open_tokenizer(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert found("the lazy fox", add_special_tokens=False)["input_ids"] == expected.encode("the lazy fox")
    (tmp_path / "tokenizer.model").write_bytes(b"garbage" * 50)
    refused(tmp_path, "its SentencePiece model cannot be parsed")


def test_ids_beyond_the_embedding_are_refused() -> None:
    byte = tokenizer()
    check_vocabulary(byte, VOCAB)
    last = max(byte.get_vocab().values())
    with pytest.raises(BadInput, match=f"ids up to {last} and the model's embedding {last} rows"):
        check_vocabulary(byte, last)
    byte.add_tokens(["<added>"])
    check_vocabulary(byte, last + 1)  # a text need not hold it
    ids = torch.tensor([[1, byte.convert_tokens_to_ids("<added>")]])
    with pytest.raises(BadInput, match=f"text.txt holds token {last + 1} and the model's embedding has"):
        check_ids(ids, last + 1, "text.txt")
    check_ids(ids, last + 2, "text.txt")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ([{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}], "multiple chat templates"),
        ("{{ raise_exception('system first') }}", "system first"),
        ("{% for m in %}", "Expected an expression"),
        (None, "has no chat template"),
    ],
)
def test_a_chat_template_that_fails_is_refused(template: Any, words: str, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    settings(tmp_path, chat_template=template)
    with pytest.raises(BadInput, match=words) as caught:
        check_chat_template(open_tokenizer(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_chat_template_of_the_processor_is_found(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    check_chat_template(open_tokenizer(tmp_path))


def test_what_ends_an_answer(tmp_path: Path) -> None:
    words = tokenizer()
    own = [] if words.eos_token_id is None else [words.eos_token_id]
    assert end_tokens(tmp_path, words) == own
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert end_tokens(tmp_path, words) == [7, *own]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert end_tokens(tmp_path, words) == [9, 8, *own]
