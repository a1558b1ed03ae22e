"""GGUF files that load and are wrong: each function spoils a copy, as those of rubbish.py spoil folders."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def _gguf(file: Path, change: Callable[[Any], None]) -> None:
    """Change a GGUF file in place: every part of it keeps its length."""
    reader = gguf.GGUFReader(file, "r+")
    change(reader)
    reader.data.flush()


def _middle(reader: Any, kind: str) -> Any:
    """The tensor of that kind in the middle block, or of all its experts."""
    kinds = f"{kind}.weight", f"{kind}_exps.weight"
    found = sorted((t for t in reader.tensors if t.name.endswith(kinds)), key=lambda t: int(t.name.split(".")[1]))
    return found[len(found) // 2]


def gguf_columns_permuted(file: Path) -> None:
    """The blocks of each row in another order."""

    def change(reader: Any) -> None:
        tensor = _middle(reader, "attn_q")
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        data = tensor.data.view(np.uint8).reshape(tensor.data.shape[0], -1, size)
        data[:] = data[:, ::-1].copy()

    _gguf(file, change)


_SCALES = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(-2, None)}  # of a block; of the others: the first 2
_MINIMUM = {"Q4_K": slice(2, 4), "Q5_K": slice(2, 4), "Q4_1": slice(2, 4), "Q5_1": slice(2, 4)}


def _multiplied(tensor: Any, where: slice, by: float) -> None:
    """Multiply the float16 numbers that stand at `where` in each block of a tensor."""
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    data = tensor.data.view(np.uint8).reshape(-1, size)
    data[:, where] = (data[:, where].copy().view(np.float16) * np.float16(by)).view(np.uint8)


def gguf_scales_doubled(file: Path) -> None:
    def change(reader: Any) -> None:
        tensor = _middle(reader, "ffn_down")
        _multiplied(tensor, _SCALES.get(tensor.tensor_type.name, slice(0, 2)), 2)

    _gguf(file, change)


def gguf_zeros_off(file: Path) -> None:
    """The minima of one block's matrices higher by an eighth: about one step of four bits."""

    def change(reader: Any) -> None:
        number = _middle(reader, "ffn_down").name.split(".")[1]
        able = [t for t in reader.tensors if t.name.startswith(f"blk.{number}.") and t.tensor_type.name in _MINIMUM]
        assert able
        for tensor in able:
            _multiplied(tensor, _MINIMUM[tensor.tensor_type.name], 1.125)

    _gguf(file, change)


def gguf_scales_scrambled(file: Path) -> None:
    """Rows in another order, each with its scales."""

    def change(reader: Any) -> None:
        data = _middle(reader, "ffn_down").data
        rows = data.reshape(-1, data.shape[-1])
        rows[:] = np.random.default_rng(0).permutation(rows)

    _gguf(file, change)


def gguf_block_zeroed(file: Path) -> None:
    def change(reader: Any) -> None:
        number = _middle(reader, "ffn_down").name.split(".")[1]
        for tensor in reader.tensors:
            if tensor.name.startswith(f"blk.{number}.") and "norm" not in tensor.name:
                tensor.data.view(np.uint8)[:] = 0

    _gguf(file, change)


def _with_number(file: Path, ending: str, value: float) -> None:
    """Set the number whose key, which begins with the architecture, ends so."""

    def change(reader: Any) -> None:
        field = next(field for name, field in reader.fields.items() if name.endswith(ending))
        field.parts[field.data[0]][:] = value

    _gguf(file, change)


def gguf_rope_wrong(file: Path) -> None:
    _with_number(file, "rope.freq_base", 1000.0)


def _of_one_length(field: Any, first: int) -> Iterable[list[Any]]:
    """The strings of a list from `first` on, those of one length together."""
    by_length: dict[int, list[Any]] = {}
    for part in (field.parts[i] for i in field.data[first:]):
        by_length.setdefault(len(part), []).append(part)
    return by_length.values()


def gguf_tokenizer_permuted(file: Path) -> None:
    """Pairs of tokens of one length exchanged."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.tokens"]
        for parts in _of_one_length(field, min(300, len(field.data) // 4)):
            for one, other in zip(parts[::2], parts[1::2], strict=False):
                one[:], other[:] = other.copy(), one.copy()

    _gguf(file, change)


def gguf_merges_permuted(file: Path) -> None:
    """Merges of one length exchanged: another tokenizer of the same tokens."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.merges"]
        for parts in _of_one_length(field, 0):
            for one, other in zip(parts, reversed(parts[len(parts) // 2 :]), strict=False):
                one[:], other[:] = other.copy(), one.copy()

    _gguf(file, change)


def gguf_template_removed(file: Path) -> None:
    """Its key, under another name."""

    def change(reader: Any) -> None:
        key = reader.fields["tokenizer.chat_template"].parts[1]
        key[:] = np.frombuffer(bytes(key)[:-1] + b"_", np.uint8)

    _gguf(file, change)


def gguf_bos(file: Path) -> None:
    """A BOS more than the original's tokenizer puts, or one less."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.add_bos_token"]
        field.parts[field.data[0]][:] = 1 - field.parts[field.data[0]]

    _gguf(file, change)


def gguf_template_edited(file: Path) -> None:
    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.chat_template"]
        text = field.parts[field.data[0]]
        edited = bytes(text).replace(b"assistant", b"Assistant").replace(b"system", b"System")
        text[:] = np.frombuffer(edited, np.uint8)

    _gguf(file, change)


def _exchanged_tensors(file: Path, one: str, other: str, *, before: bool = False) -> None:
    """Exchange two kinds of tensors of the middle block, or one kind with that of the block before it."""

    def change(reader: Any) -> None:
        number = int(_middle(reader, one).name.split(".")[1])
        kept = {tensor.name: tensor for tensor in reader.tensors}
        for n in range(number, 0, -1):
            first, second = kept[f"blk.{n}.{one}.weight"], kept[f"blk.{n - before}.{other}.weight"]
            if first.tensor_type == second.tensor_type:
                first.data[:], second.data[:] = second.data.copy(), first.data.copy()
                return
        raise AssertionError(f"no {one} and {other} of one type")

    _gguf(file, change)


def gguf_block_of_another(file: Path) -> None:
    _exchanged_tensors(file, "ffn_up", "ffn_up", before=True)


def gguf_keys_and_values_exchanged(file: Path) -> None:
    _exchanged_tensors(file, "attn_k", "attn_v")


def gguf_norm_scaled(file: Path) -> None:
    def change(reader: Any) -> None:
        _middle(reader, "ffn_norm").data[:] *= 1.3

    _gguf(file, change)


def gguf_tokens_exchanged(file: Path) -> None:
    def change(reader: Any) -> None:
        for tensor in reader.tensors:
            if tensor.name in ("token_embd.weight", "output.weight"):
                half = len(tensor.data) // 4 * 2
                part = tensor.data[half : half + half // 2 * 2]
                part[:] = part.reshape(-1, 2, part.shape[1])[:, ::-1].reshape(part.shape).copy()

    _gguf(file, change)


def gguf_token_zeroed(file: Path) -> None:
    """The embedding of one common token: the longest of the first that are letters."""

    def change(reader: Any) -> None:
        field = reader.fields["tokenizer.ggml.tokens"]
        words = [bytes(field.parts[i]).decode(errors="replace") for i in field.data]
        token = next(words.index(word) for word in ("Ġthe", "Ġof", "\u2581the", "the", "e") if word in words)
        tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
        tensor.data.view(np.uint8)[token] = 0

    _gguf(file, change)


def gguf_norm_epsilon(file: Path) -> None:
    _with_number(file, "layer_norm_rms_epsilon", 0.1)


def gguf_end_token_wrong(file: Path) -> None:
    def change(reader: Any) -> None:
        for name, field in reader.fields.items():
            if name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
                field.parts[field.data[0]][:] = len(reader.fields["tokenizer.ggml.tokens"].data) // 2

    _gguf(file, change)


GGUFS: dict[str, Callable[[Path], None]] = {
    "columns permuted": gguf_columns_permuted, "scales scrambled": gguf_scales_scrambled,
    "scales doubled": gguf_scales_doubled, "zeros off by one": gguf_zeros_off, "a block zeroed": gguf_block_zeroed,
    "rope_theta": gguf_rope_wrong, "tokenizer permuted": gguf_tokenizer_permuted,
    "another tokenizer": gguf_merges_permuted, "template removed": gguf_template_removed,
    "template edited": gguf_template_edited, "BOS": gguf_bos, "scales of another block": gguf_block_of_another,
    "keys and values exchanged": gguf_keys_and_values_exchanged, "a norm scaled": gguf_norm_scaled,
    "tokens exchanged": gguf_tokens_exchanged, "a token zeroed": gguf_token_zeroed,
    "norm epsilon": gguf_norm_epsilon, "another end token": gguf_end_token_wrong,
}  # fmt: skip
