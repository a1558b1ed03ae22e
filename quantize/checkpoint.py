"""Checkpoints on disk: shards read tensor by tensor, parts written whole, shards merged without holding them."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from .errors import BadInput

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_COMPANIONS = (
    "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*processor_config.json", "*.tiktoken", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class _Entry:
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte of the file
    stop: int


class Checkpoint:
    """A folder of safetensors: headers are read and checked at once, tensors only by `read`.

    Raises BadInput for a folder, config, shard or tensor that is absent and for a truncated or corrupt file.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / "config.json", f"{folder} has no config.json")
        self._entries: dict[str, _Entry] = {}
        self._files: list[str] = []
        for file in _shards(folder):
            self._files.append(file)
            for name, entry in _header(folder / file):
                self._entries[name] = entry
        index = folder / "model.safetensors.index.json"
        if index.exists():
            for name, file in _read_json(index, "")["weight_map"].items():
                if name not in self._entries or self._entries[name].file != file:
                    raise BadInput(f"{index.name} places {name} in {file}, which does not hold it")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entries[name].dtype]

    def nbytes(self, name: str) -> int:
        return self._entries[name].stop - self._entries[name].start

    def file_of(self, name: str) -> str:
        return self._entries[name].file

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes(name) for name in self._entries)

    def read(self, name: str) -> Tensor:
        """A tensor of one's own, read without mapping the file, so that resident memory is the tensor's alone."""
        entry = self._entries[name]
        data = bytearray(entry.stop - entry.start)
        with open(self.folder / entry.file, "rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != len(data):
                raise BadInput(f"{entry.file}: ends inside {name}; the file is truncated")
        if not data:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def file_hashes(self) -> dict[str, str]:
        """sha256 of the weights, config and tokenizer files by name."""
        names = {*self._files, "config.json", "model.safetensors.index.json", "generation_config.json"}
        names |= {path.name for path in self.folder.glob("*token*")} | {"chat_template.jinja", "merges.txt"}
        return {name: file_sha256(self.folder / name) for name in sorted(names) if (self.folder / name).is_file()}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to one safetensors file, beside its place and renamed when whole; returns its sha256."""
    # Tensors are sorted by name and the metadata fixed, so that equal tensors give equal bytes.
    data = save({n: tensors[n].contiguous() for n in sorted(tensors)}, metadata={"format": "pt"})
    _write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its place and rename it when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def merge_parts(parts: Sequence[Path], folder: Path, max_shard_bytes: int = 5_000_000_000) -> list[str]:
    """Copy the tensors of `parts`, in order, into model.safetensors or numbered shards with their index.

    Bytes are streamed: memory does not depend on the size of the parts, which are left alone. Returns file names.
    """
    entries = [(part, name, entry) for part in parts for name, entry in _header(part)]
    shards: list[list[tuple[Path, str, _Entry]]] = [[]]
    room = max_shard_bytes
    for item in entries:
        size = item[2].stop - item[2].start
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(item)
        room -= size
    total = len(shards)
    names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    if total == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    if total > 1:
        weight_map = {n: file for file, shard in zip(names, shards, strict=True) for _, n, _ in shard}
        size = sum(e.stop - e.start for _, _, e in entries)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return names


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what belongs to a model beside weights and config: tokenizer, chat template, generation config, licence."""
    found = sorted({path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = _read_json(index, "")
        files = sorted(set(content.get("weight_map", {}).values()))
        for file in files:
            if not (folder / file).is_file():
                raise BadInput(f"{folder}: shard {file} is named in {index.name} and absent; download it again")
        if files:
            return files
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        hint = f"only pickle ({pickled[0]}): pass --allow-pickle if you trust it" if pickled else "no *.safetensors"
        raise BadInput(f"{folder} has no weights to read: {hint}")
    return files


def _header(path: Path) -> Iterator[tuple[str, _Entry]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size or length > 1 << 30:
            raise BadInput(f"{path.name}: not a whole safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
            entries = {
                name: _Entry(path.name, e["dtype"], tuple(e["shape"]), *(8 + length + o for o in e["data_offsets"]))
                for name, e in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path.name}: its safetensors header is corrupt; download it again") from None
    if max((e.stop for e in entries.values()), default=size) != size:
        raise BadInput(f"{path.name}: truncated or overlong, {size} bytes where its header says otherwise")
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise BadInput(f"{path.name}: {name} has dtype {entry.dtype}, which is not supported")
        expected = torch.empty(0, dtype=_DTYPES[entry.dtype]).element_size()
        for n in entry.shape:
            expected *= n
        if expected != entry.stop - entry.start:
            raise BadInput(f"{path.name}: the size of {name} does not fit its shape; the file is corrupt")
    yield from sorted(entries.items(), key=lambda item: item[1].start)


def _write_shard(path: Path, items: Sequence[tuple[Path, str, _Entry]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, name, e in items:
        size = e.stop - e.start
        header[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts on a multiple of eight
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for part, _, e in items:
            with open(part, "rb") as source:
                _copy(source, out, e.start, e.stop)
        out.flush()
        os.fsync(out.fileno())
    beside.rename(path)


def _copy(source: BinaryIO, out: BinaryIO, start: int, stop: int) -> None:
    source.seek(start)
    while start < stop:
        chunk = source.read(min(_COPY_BYTES, stop - start))
        out.write(chunk)
        start += len(chunk)


def _write_whole(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(missing) from None
    except ValueError:
        raise BadInput(f"{path}: not valid JSON") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return content
