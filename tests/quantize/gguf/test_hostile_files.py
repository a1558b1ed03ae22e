"""GGUF files that are damaged, or made to harm: each is converted or refused in one line, at once."""

import random
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.core.errors import BadInput
from quantpress.engine.sources import resolve

from ..originals import tiny, write_gguf

_SECONDS = 30  # of CPU; an honest one takes less than one


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("Llama"), "llama")


def outcome(file: Path, work: Path) -> str:
    """What became of it; whatever is no BadInput fails the test."""
    started = time.process_time()
    try:
        resolve(str(file), cache=work / "cache")
        return "converted"
    except BadInput as error:
        assert len(str(error)) < 1000, error  # noqa: PT017
        return "refused"
    finally:
        shutil.rmtree(work / "cache", ignore_errors=True)
        assert time.process_time() - started < _SECONDS


def set_field(file: Path, key: str, value: Any) -> None:
    """Another number, or bytes of the same length, in place of a field's value."""
    reader = gguf.GGUFReader(file, "r+")
    field = reader.fields[key]
    part = field.parts[field.data[0]]
    if isinstance(value, bytes):
        part[: len(value)] = np.frombuffer(value, np.uint8)
    else:
        part[0] = value
    reader.data.flush()


def rename(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def set_length(file: Path, key: str, length: int) -> None:
    """Another number of elements for an array."""
    content = bytearray(file.read_bytes())
    at = content.index(key.encode()) + len(key) + 8  # after the kinds of the field and of its elements
    content[at : at + 8] = struct.pack("<Q", length)
    file.write_bytes(content)


def set_offset(file: Path, tensor: str, offset: int) -> None:
    content = bytearray(file.read_bytes())
    at = content.index(tensor.encode()) + len(tensor)
    (dimensions,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dimensions + 4
    content[at : at + 8] = struct.pack("<Q", offset)
    file.write_bytes(content)


WRONG: dict[str, Callable[[Path], object]] = {
    "no heads": lambda file: set_field(file, "llama.attention.head_count", 0),
    "heads that divide nothing": lambda file: set_field(file, "llama.attention.head_count", 7),
    "no key-value heads": lambda file: set_field(file, "llama.attention.head_count_kv", 0),
    "no width": lambda file: set_field(file, "llama.embedding_length", 0),
    "a million blocks": lambda file: set_field(file, "llama.block_count", 10**6),
    "four thousand million blocks": lambda file: set_field(file, "llama.block_count", 2**32 - 1),
    "no blocks": lambda file: set_field(file, "llama.block_count", 0),
    "a huge head": lambda file: set_field(file, "llama.attention.key_length", 2**31),
    "an eps that is no number": lambda file: set_field(file, "llama.attention.layer_norm_rms_epsilon", float("nan")),
    "a name that is not UTF-8": lambda file: set_field(file, "general.architecture", b"\xff\xfe"),
    "a key that is not UTF-8": lambda file: rename(file, b"llama.block_count", b"\xff\xfeama.block_count"),
    "a renamed embedding": lambda file: rename(file, b"token_embd.weight", b"tokenXembd.weight"),
    "a template that is not UTF-8": lambda file: set_field(file, "tokenizer.chat_template", b"\xff\xff\xff"),
    "a pad id out of range": lambda file: set_field(file, "tokenizer.ggml.padding_token_id", 2**31),
    "an end id out of range": lambda file: set_field(file, "tokenizer.ggml.eos_token_id", 10**6),
    "a token that is not UTF-8": lambda file: set_field(file, "tokenizer.ggml.tokens", b"\xff"),
    "an array of absurd length": lambda file: set_length(file, "tokenizer.ggml.token_type", 2**60),
    "a list of strings of absurd length": lambda file: set_length(file, "tokenizer.ggml.tokens", 2**40),
    "an empty list of tokens": lambda file: set_length(file, "tokenizer.ggml.tokens", 0),
    "a tensor beyond the file": lambda file: set_offset(file, "blk.0.attn_q.weight", 2**50),
    "a tensor at no multiple": lambda file: set_offset(file, "blk.0.attn_q.weight", 1),
    "a million million tensors": lambda file: rename(file, file.read_bytes()[4:16], struct.pack("<IQ", 3, 10**12)),
    "a version to come": lambda file: rename(file, b"GGUF\x03", b"GGUF\x63"),
    "nothing": lambda file: file.write_bytes(b""),
    "its name alone": lambda file: file.write_bytes(b"GGUF"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_no_file_holds_is_refused(what: str, whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole, file := tmp_path / "tiny.gguf")
    WRONG[what](file)
    assert outcome(file, tmp_path) == "refused"


def fuzzed(whole: Path, work: Path, seeds: range) -> Counter[str]:
    """The header of a file with a few bytes changed, or the file cut."""
    content, header = whole.read_bytes(), gguf.GGUFReader(whole).data_offset
    counts = Counter[str]()
    for seed in seeds:
        chosen, changed = random.Random(seed), bytearray(content)
        for _ in range(chosen.randint(1, 4)):
            at = chosen.randrange(header if chosen.random() < 0.9 else len(content))
            size = chosen.choice((1, 1, 4, 8))
            some = chosen.choice((0, 1, 255, 2**31, 2**63, 2**64 - 1, chosen.randrange(2**64)))
            changed[at : at + size] = (some % 2 ** (8 * size)).to_bytes(size, "little")
        keep = chosen.randrange(len(changed)) if chosen.random() < 0.1 else len(changed)
        (work / "tiny.gguf").write_bytes(changed[:keep])
        counts[outcome(work / "tiny.gguf", work)] += 1
    return counts


def test_damaged_files_are_converted_or_refused(whole: Path, tmp_path: Path) -> None:
    assert fuzzed(whole, tmp_path, range(60))["refused"] > 20


@pytest.mark.slow
def test_many_damaged_files(whole: Path, tmp_path: Path, tell: Callable[[str], None]) -> None:
    counts = fuzzed(whole, tmp_path, range(2000))
    tell(f"damaged GGUF files: {dict(counts)}")
    assert min(counts.values()) > 100
