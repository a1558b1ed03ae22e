"""Tokenizers as GGUF metadata: labels found and never guessed, and the ids of llama.cpp those of transformers."""

import json
import unicodedata
import zipfile
from pathlib import Path

import gguf
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from quantpress.artifact.gguf_floats import write_floats
from quantpress.core.errors import BadInput
from quantpress.engine.sources import EMBEDDED, default_cache, resolve
from quantpress.gguf.conversion import Conversion
from quantpress.gguf.source_tokenizer import save_tokenizer
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.hub import fetch_wheel

from ..originals import ORIGINALS, TEXT
from .models import VOCAB, build

MISTRAL = ("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
NASTY = [
    TEXT, "  leading", "trailing  ", "a  b   c    d", " \n\n\t\r\n x", "tabs\t\t\there", "12345 6.78e-9 1,000,000",
    "It's WE'LL don't I'M", "naïve café cafe\u0301 Ünïcödé", "日本語の文章。中文字符 한국어", "🦙🚀👨‍👩‍👧‍👦🏳️‍🌈 ✅",
    "def f(x):\n    return x**2  # ok\n\n\nclass A:\n\tpass", "<s>x</s><|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a" * 500, " " * 300, "!!!???...,,,;;;", "\u200b\u200d\ufeff\u00a0", "مرحبا بالعالم नमस्ते สวัสดี", "x\x00y\x01",
    "\u0301 combining first", "½ ٣ Ⅷ ²", "http://a.b/c?d=e&f=g#h", '{"json": [1, 2, {"k": null}]}', "\r\n\r\n", "ﬁ ﬂ ﷺ",
]  # fmt: skip


def compare(folder: Path, file: Path, nfc: bool = False) -> None:
    """Every text's ids, special tokens in it recognised; nfc: of the composed text, which is what transformers sees."""
    from quantpress.gguf.llama_cpp_library import Loaded

    original = AutoTokenizer.from_pretrained(folder)
    with Loaded(file, vocabulary_only=True) as llama:
        for text in NASTY:
            text = unicodedata.normalize("NFC", text) if nfc else text
            assert llama.tokenize(text, special=True) == original(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("pre", ORIGINALS)
def test_rules_of_tokenizer_json_name_the_label(tmp_path: Path, pre: str) -> None:
    family = {"qwen2": "qwen3", "llama-bpe": "llama"}.get(pre, "gpt2" if pre == "gpt-2" else "llama")
    build(family, tmp_path, pre)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert said["tokenizer.ggml.pre"] == pre
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert len(said["tokenizer.ggml.tokens"]) == VOCAB
    assert said["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]"
    assert said["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    tool = said["tokenizer.ggml.tokens"].index("<tool>")
    assert said["tokenizer.ggml.token_type"][tool] == gguf.TokenType.USER_DEFINED
    assert [said[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding")] == [1, 2, 0]
    assert said["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("pre", ORIGINALS)
def test_llama_cpp_gives_the_ids_of_transformers(tmp_path: Path, pre: str) -> None:
    pytest.importorskip("llama_cpp")
    build("qwen3" if pre == "qwen2" else "llama", tmp_path, pre)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    notes = Conversion(Checkpoint(tmp_path), tmp_path).notes
    assert any("composes characters" in note for note in notes) is (pre == "qwen2")
    compare(tmp_path, tmp_path / "model.gguf", nfc=pre == "qwen2")


def test_sentencepiece_merges_become_scores(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    joined = ["▁t", "he", "▁the", "er", "in", "▁a", "the", "re", "▁there", "ng", "ing", "▁▁", "▁▁▁▁"]
    scores = {piece: -float(i) for i, piece in enumerate([*joined, *"▁abcdefghinorst"])}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores]
    meta = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scores)],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    build("llama", tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    save_tokenizer(meta, Path("t.gguf"), tmp_path, 64)
    write_floats(tmp_path, tmp_path / "model.gguf", "F32")
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.add_bos_token"] is True
    compare(tmp_path, tmp_path / "model.gguf")


def edit(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    file.write_text(Tokenizer.from_str(json.dumps(document | changes)).to_str())


def test_what_is_refused(tmp_path: Path) -> None:
    build("llama", tmp_path)
    pre = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{2}"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    edit(tmp_path, pre_tokenizer=pre)
    refuse(tmp_path, "unknown pre-tokenizer: .* a guess could split text wrongly")
    config = json.loads((tmp_path / "config.json").read_text())
    build("llama", tmp_path, vocab_size=300)
    refuse(tmp_path, "the tokenizer has token id 335 and the model a vocabulary of 300")
    (tmp_path / "config.json").write_text(json.dumps(config))
    build("llama", tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    refuse(tmp_path, "no tokenizer; copy the original")


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        write_floats(folder, folder / "model.gguf")
    assert "\n" not in str(caught.value)
    assert not (folder / "model.gguf").exists()


@pytest.mark.slow
def test_real_models_and_the_nasty_corpus(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = resolve(EMBEDDED, cache=default_cache()).path
    (file,) = write_floats(folder, tmp_path / "model.gguf")
    compare(folder, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_a_real_sentencepiece_vocabulary(name: str, tmp_path: Path) -> None:
    """Mistral's own, as SentencePiece itself reads it: its ids, transformers' and llama.cpp's are one."""
    pytest.importorskip("llama_cpp")
    from quantpress.gguf.llama_cpp_library import Loaded

    try:
        wheel = fetch_wheel(*MISTRAL, default_cache())
    except BadInput as error:
        pytest.skip(f"mistral-common cannot be had from PyPI: {error}")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(zipfile.ZipFile(wheel).read(f"mistral_common/data/{name}"))
    real = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    kinds = [
        gguf.TokenType.BYTE if real.is_byte(i) else gguf.TokenType.UNKNOWN if real.is_unknown(i)
        else gguf.TokenType.CONTROL if real.is_control(i) else gguf.TokenType.NORMAL
        for i in range(real.get_piece_size())
    ]  # fmt: skip
    build("llama", folder, vocab_size=real.get_piece_size())
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [real.id_to_piece(i) for i in range(real.get_piece_size())],
        "tokenizer.ggml.scores": [real.get_score(i) for i in range(real.get_piece_size())],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        **{f"tokenizer.ggml.{n}_token_id": i for n, i in (("unknown", 0), ("bos", 1), ("eos", 2))},
    }
    save_tokenizer(meta, folder / "real", folder, 2048)
    (file,) = write_floats(folder, tmp_path / "model.gguf")
    compare(folder, file)
    said = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    scores = zip(said["tokenizer.ggml.scores"], meta["tokenizer.ggml.scores"], kinds, strict=True)
    assert all(ours == pytest.approx(theirs) for ours, theirs, kind in scores if kind != gguf.TokenType.CONTROL)
    original = AutoTokenizer.from_pretrained(folder)
    with Loaded(file, vocabulary_only=True) as llama:
        for text in NASTY:
            want = real.encode(text)
            assert llama.tokenize(text) == want, text
            if not any(token in text for token in original.all_special_tokens):
                assert original(text, add_special_tokens=False).input_ids == want, text
