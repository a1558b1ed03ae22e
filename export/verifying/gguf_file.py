"""A GGUF file by itself and against the config.json and tokenizer beside it. Tensors are scanned where they are mapped.

Only the scales of blocks are read, at their places in llama.cpp's ggml-common.h: a NaN in any other byte is no number.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantpress.artifact.manifest import own_manifest
from quantpress.core.errors import BadInput
from quantpress.core.text import shortened
from quantpress.gguf.conversion import Conversion
from quantpress.gguf.hyperparameters import form_of, hyperparameters
from quantpress.gguf.reader import LAYOUT, GgufCheckpoint, gguf_files, open_gguf
from quantpress.gguf.writer import ARCHITECTURE
from quantpress.models.architecture import decoder_config, model_config

from .beside import companions_of
from .listing import broken_json
from .statement import model_statement
from .tensors import at_once

_SCALES: dict[str, tuple[int, ...]] = {  # bytes in a block at which its float16 scales begin
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
_NOT_OF_THE_MODEL = ("general.file_type", "general.quantization_version", "general.name")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_CODES = 8  # different bytes in a block: blocks of zeros, whose scale is zero too, have fewer


def problems(folder: Path) -> list[str]:
    """One line for each way in which a GGUF file is damaged or contradicts what lies beside it."""
    files = gguf_files(folder)
    readers = [(file, open_gguf(file)) for file in files]  # raises BadInput for one that is not whole
    found = [line for file, reader in readers for line in _ends(file, reader)]
    tensors = [tensor for _, reader in readers for tensor in reader.tensors]
    found += filter(None, at_once(_damage, tensors))
    said = {key: field.contents() for key, field in readers[0][1].fields.items()}
    known = set(gguf.MODEL_ARCH_NAMES.values())
    architecture = said.get(ARCHITECTURE)
    if architecture not in known:
        return [*found, f"{files[0]}: {ARCHITECTURE} {architecture!r} is none that llama.cpp has"]
    found += _itself(files[0], str(architecture), said, {t.name: tuple(map(int, reversed(t.shape))) for t in tensors})
    if not (folder / "config.json").is_file():
        return found
    try:
        artifact = GgufCheckpoint(folder)
    except BadInput as error:  # a tensor that is missing or has another shape, a config of which no model is built
        return [*found, str(error)]
    tokenizer = any(folder.glob("tokenizer*"))  # the file holds one of its own
    found += companions_of(folder, None) if tokenizer else broken_json(folder)
    rows = said.get("tokenizer.ggml.tokens")
    found += model_statement(folder, None if rows is None else len(rows), None)
    found += _against_config(folder, artifact, said, tokenizer)
    return found


def _ends(file: Path, reader: gguf.GGUFReader) -> Iterator[str]:
    """The file ends with its last tensor, padding aside, and tensors follow each other."""
    ends = [(int(t.data_offset), int(t.data_offset) + int(t.n_bytes), t.name) for t in reader.tensors]
    at = None
    for start, stop, name in sorted(ends):
        if at is not None and start != at:
            yield f"{file}: tensor {name} does not begin where the last one ends"
        at = -(-stop // reader.alignment) * reader.alignment
    if at is not None and file.stat().st_size > at:
        yield f"{file}: {file.stat().st_size - at} bytes after the last tensor, which belong to none"


def _damage(tensor: Any) -> str | None:
    """What cannot be of a weight in a tensor of the `gguf` package's reader; None when nothing is found."""
    kind, data = tensor.tensor_type.name, tensor.data
    if kind in ("F32", "F16", "F64", "BF16"):
        if kind == "BF16":
            bits = data.view(np.uint16) & 0x7F80
            finite, zero = bool((bits != 0x7F80).all()), not bool((data.view(np.uint16) & 0x7FFF).any())
        else:
            finite, zero = bool(np.isfinite(data).all()), not bool(data.any())
        if not finite:
            return f"{tensor.name} holds NaN or inf"
        if zero and tensor.name.endswith(".weight"):
            return f"{tensor.name} is zero in all {data.size} places"
        return None
    if kind not in _SCALES and kind != "MXFP4":
        return None
    blocks = data.reshape(-1).view(np.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
    if kind == "MXFP4":
        bad = int((blocks[:, 0] == 255).sum())
        return f"{tensor.name}: {bad} of its {len(blocks)} block scales are NaN" if bad else None
    scales = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.uint16)[:, 0] for at in _SCALES[kind]]
    bad = sum(int((scale & 0x7C00 == 0x7C00).sum()) for scale in scales)
    if bad:
        return f"{tensor.name}: {bad} of its {len(blocks)} block scales are NaN or inf"
    if not any((scale & 0x7FFF).any() for scale in scales):
        return f"{tensor.name}: all its weights are zero"
    empty = np.flatnonzero(scales[0] & 0x7FFF == 0)
    lost = sum(len(np.unique(blocks[i])) > _CODES for i in empty[:1000])
    return f"{tensor.name}: {lost} of its {len(blocks)} block scales are zero over codes that are not" if lost else None


def _itself(
    file: Path, architecture: str, said: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """The file's metadata against its own tensors. shapes: columns last."""
    value = {key.removeprefix(f"{architecture}."): v for key, v in said.items() if key.startswith(f"{architecture}.")}
    blocks = value.get("block_count")
    there = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    if isinstance(blocks, int) and there != set(range(blocks)):
        odd = min(there ^ set(range(blocks)))
        yield f"{file}: block_count {blocks}, and block {odd} is {'there' if odd in there else 'missing'}"
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in shapes and architecture not in ("clip", "t5encoder"):
            yield f"{file}: tensor {name} is missing"
    embedding = shapes.get("token_embd.weight", ())
    if embedding and value.get("embedding_length") not in (None, embedding[-1]):
        yield f"{file}: embedding_length {value['embedding_length']}, and token_embd.weight has {embedding[-1]} columns"
    heads, width = value.get("attention.head_count"), value.get("attention.key_length")
    for name, count in (("attn_q", heads), ("attn_k", value.get("attention.head_count_kv"))):
        rows = {shape[0] for n, shape in shapes.items() if n.endswith(f".{name}.weight") and len(shape) == 2}
        wide = width if width is not None or not isinstance(heads, int) or not embedding else embedding[-1] // heads
        if isinstance(count, int) and isinstance(wide, int) and rows and not rows & {count * wide, 2 * count * wide}:
            yield f"{file}: {count} heads of {wide} for {name}.weight, which has {min(rows)} rows"
    if embedding and (tokens := said.get("tokenizer.ggml.tokens")) is not None:
        yield from _vocabulary(file, said, len(tokens), embedding[0])


def _vocabulary(file: Path, said: Mapping[str, Any], tokens: int, rows: int) -> Iterator[str]:
    """What the file says of its tokens, against how many there are and the rows of the embedding."""
    if tokens != rows:
        yield f"{file}: {tokens} tokens, and the embedding has {rows} rows"
    for key, held in said.items():
        if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key) and not 0 <= held < rows:
            yield f"{file}: {key} {held}, and the embedding has {rows} rows"
        if key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type") and len(held) != tokens:
            yield f"{file}: {len(held)} {key} for {tokens} tokens"


def _against_config(folder: Path, artifact: GgufCheckpoint, said: Mapping[str, Any], tokenizer: bool) -> Iterator[str]:
    """The metadata are those that the config, and the tokenizer where one is beside the file, make."""
    if (folder / LAYOUT).is_file():
        return  # by llama.cpp's converter, which has rules of its own
    try:
        if tokenizer:
            wanted = Conversion(artifact, folder).metadata
        else:
            config = decoder_config(model_config(artifact.config))
            form = form_of(config)
            wanted = {ARCHITECTURE: form.architecture} | hyperparameters(config, form)
    except BadInput as error:
        yield f"{folder}: its config and tokenizer make no GGUF file: {error}"
        return
    yield from unlike_metadata(folder, wanted, said, strict=own_manifest(folder) is not None)


def unlike_metadata(
    folder: Path, wanted: Mapping[str, Any], said: Mapping[str, Any], strict: bool, whose: str = "config and tokenizer"
) -> Iterator[str]:
    """A line for each key of a model's metadata that a file has otherwise; strict: or lacks, or has beyond them.

    whose: where the wanted ones are from.
    """
    kinds = [f"{said[ARCHITECTURE]}.", ARCHITECTURE]
    kinds += ["tokenizer."] if any(key.startswith("tokenizer.") for key in wanted) else []
    prefixes = tuple(kinds)
    ours = {key: v for key, v in wanted.items() if key.startswith(prefixes) and key not in _NOT_OF_THE_MODEL}
    for key, value in ours.items():
        if key not in said:
            if strict:
                yield f"{folder}: the GGUF file lacks {key}, {_said(value)} by {whose}"
        elif not _equal(value, said[key]):
            at = _first_unlike(value, said[key])
            yield f"{folder}: the GGUF file says {key} {at[1]}, and {whose} {at[0]}"
    for key in said if strict else ():
        if key.startswith(prefixes) and key not in ours:
            yield f"{folder}: the GGUF file says {key} {_said(said[key])}, which {whose} does not say"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) or isinstance(other, list):
        same_length = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
        return same_length and all(map(_equal, one, other))
    if isinstance(one, float | np.floating) or isinstance(other, float | np.floating):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _first_unlike(one: Any, other: Any) -> tuple[str, str]:
    if isinstance(one, list) and isinstance(other, list):
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            if not _equal(a, b):
                return f"{_said(a)} at place {i}", _said(b)
        return f"{len(one)} values", f"{len(other)} values"
    return _said(one), _said(other)


def _said(value: Any) -> str:
    return shortened(repr(value), 60)
