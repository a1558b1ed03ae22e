"""As damage.py, of GGUF files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .damage import Damage, config, document, file

Array = np.ndarray[Any, Any]


def opened(change: Callable[[gguf.GGUFReader], bool | None]) -> Damage:
    """Damage in place, in the mapped file."""

    def damage(folder: Path) -> bool | None:
        reader = gguf.GGUFReader(folder / "model.gguf", "r+")
        done = change(reader)
        reader.data.flush()
        return done

    return damage


def tensor(name: str, change: Callable[[Array], None]) -> Damage:
    """Damage to the bytes or floats of a tensor."""

    def edit(reader: gguf.GGUFReader) -> bool | None:
        found = next((t for t in reader.tensors if t.name == name), None)
        if found is None:
            return False
        change(found.data)
        return True

    return opened(edit)


def value(key: str, new: Any) -> Damage:
    """Another value, of the same size, for a key."""

    def edit(reader: gguf.GGUFReader) -> bool | None:
        field = reader.fields.get(key)
        if field is None:
            return False
        part = field.parts[field.data[0]]
        part[:] = np.frombuffer(new, np.uint8) if isinstance(new, bytes) else new
        return True

    return opened(edit)


def block_scales(change: Callable[[Array], None], name: str = "blk.1.attn_q.weight") -> Damage:
    """Damage to the float16 scales of a tensor's blocks, uint16 [blocks]."""
    at = {"Q4_K": 0, "Q8_0": 0, "Q4_0": 0, "Q6_K": 208, "Q5_K": 0, "Q3_K": 108, "Q2_K": 80, "Q5_0": 0}

    def edit(reader: gguf.GGUFReader) -> bool | None:
        found = next(t for t in reader.tensors if t.name == name)
        kind = found.tensor_type
        if kind.name not in at:
            return False
        blocks = found.data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        scales = np.ascontiguousarray(blocks[:, at[kind.name] : at[kind.name] + 2]).view(np.uint16)[:, 0].copy()
        change(scales)
        blocks[:, at[kind.name] : at[kind.name] + 2] = scales.view(np.uint8).reshape(-1, 2)
        return True

    return opened(edit)


def swapped(one: str, other: str) -> Damage:
    def edit(reader: gguf.GGUFReader) -> bool | None:
        a, b = (next(t for t in reader.tensors if t.name == name) for name in (one, other))
        if a.tensor_type != b.tensor_type:
            return False
        kept = a.data.copy()
        a.data[:] = b.data
        b.data[:] = kept
        return True

    return opened(edit)


def doubled(scales: Array) -> None:
    scales[:] = (scales.view(np.float16) * np.float16(2)).view(np.uint16)


def bytes_of(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> bool | None:
        path = folder / "model.gguf"
        path.write_bytes(change(path.read_bytes()))
        return True

    return damage


def _fill(at: Any, number: float) -> Callable[[Array], None]:
    def change(data: Array) -> None:
        data[at] = number

    return change


def rope(content: dict[str, Any]) -> None:
    content["rope_parameters"]["rope_theta"] = 1e6


BY_ITSELF: dict[str, tuple[Damage, str]] = {
    "NaN in a norm": (tensor("output_norm.weight", _fill(3, np.nan)), "holds NaN or inf"),
    "inf in a norm": (tensor("blk.0.attn_norm.weight", _fill(0, np.inf)), "holds NaN or inf"),
    "a norm of zeros": (tensor("blk.1.ffn_norm.weight", _fill(slice(None), 0)), "is zero in all"),
    "a block scale of NaN": (block_scales(lambda s: s.__setitem__(2, 0x7E01)), "block scales are NaN or inf"),
    "a block scale of inf": (block_scales(lambda s: s.__setitem__(0, 0x7C00)), "block scales are NaN or inf"),
    "all block scales zero": (block_scales(lambda s: s.fill(0)), "zero"),
    "some block scales zero": (block_scales(lambda s: s.__setitem__(slice(0, 8), 0)), "zero"),
    "an embedding scale of NaN": (block_scales(lambda s: s.__setitem__(2, 0x7E01), "token_embd.weight"), "NaN or inf"),
    "bytes after the file": (bytes_of(lambda b: b + b"x" * 64), "after the last tensor"),
    "a file cut short": (bytes_of(lambda b: b[:-64]), "not a whole GGUF file"),
    "a file cut in its header": (bytes_of(lambda b: b[:200]), "not a whole GGUF file"),
    "another magic": (bytes_of(lambda b: b"GGML" + b[4:]), "not a whole GGUF file"),
    "an unknown architecture": (value("general.architecture", b"llamb"), "none that llama.cpp has"),
    "more blocks": (value("llama.block_count", 3), "block_count 3"),
    "fewer blocks": (value("llama.block_count", 1), "block_count 1"),
    "another width": (value("llama.embedding_length", 128), "embedding_length"),
    "other head counts": (value("llama.attention.head_count", 8), "head"),
    "other key-value heads": (value("llama.attention.head_count_kv", 1), "head"),
    "another feed-forward length": (value("llama.feed_forward_length", 64), "feed_forward_length"),
    "another RoPE base": (value("llama.rope.freq_base", 5e5), "rope.freq_base"),
    "another eps": (value("llama.attention.layer_norm_rms_epsilon", 1e-1), "epsilon"),
    "another context": (value("llama.context_length", 64), "context_length"),
    "another vocabulary": (value("llama.vocab_size", 99), "vocab_size"),
    "eos beyond": (value("tokenizer.ggml.eos_token_id", 60000), "eos_token_id"),
    "another bos": (value("tokenizer.ggml.bos_token_id", 4), "bos_token_id"),
    "another tokenizer": (value("tokenizer.ggml.model", b"gpt3"), "tokenizer.ggml.model"),
    "another pre-tokenizer": (value("tokenizer.ggml.pre", b"gpt-9"), "tokenizer.ggml.pre"),
    "config: another RoPE base": (document("config.json", rope), "freq_base"),
    "config: another eps": (config(rms_norm_eps=1e-2), "epsilon"),
    "config: another width": (config(hidden_size=128), "config.json wants"),
    "config: other heads": (config(num_attention_heads=8, head_dim=32, num_key_value_heads=4), "head"),
    "config: more layers": (config(num_hidden_layers=3), "absent|wants"),
    "config: an unknown activation": (config(hidden_act="swoosh"), "swoosh|activation"),
    "config: unknown architectures": (config(architectures=["LlamaForCausalLMX"]), "no class of that name"),
    "config of no JSON": (file("config.json", b"{"), "not readable as JSON"),
    "another template beside it": (file("chat_template.jinja", b"{% for m in messages %}{{ m.content }}!{% endfor %}"),
                                   "chat_template"),
    "a tokenizer.json of no JSON": (file("tokenizer.json", b"{"), "not readable as JSON"),
}  # fmt: skip
BY_MANIFEST: dict[str, tuple[Damage, str]] = {}
BY_ORIGINAL: dict[str, tuple[Damage, str]] = {
    "scales doubled": (block_scales(doubled), "off the original's"),
    "one tensor for another": (swapped("blk.0.attn_q.weight", "blk.1.attn_q.weight"), "off the original's"),
    "gate and up swapped": (swapped("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"), "off the original's"),
    "rows rolled": (
        tensor("blk.1.ffn_up.weight", lambda d: d.__setitem__(slice(None), np.roll(d, 1, 0))), "original's",
    ),
    "a norm doubled": (tensor("output_norm.weight", lambda d: d.__imul__(2) is None), "is not the original's"),
    "norms swapped": (swapped("blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"), "is not the original's"),
    "sampling": (document("generation_config.json", lambda c: c.update(temperature=9.0)), "temperature"),
}  # fmt: skip
