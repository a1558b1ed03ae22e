"""Checkpoint folders of safetensors, of which tensors are read one at a time; shards.py writes them.

Files are read, not memory-mapped: a reader holds only the tensor it asked for, whatever the size of the model.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.files import file_sha256
from ..core.untrusted import check_content, read_json
from .companions import check_checkpoint_files, companions

INDEX = "model.safetensors.index.json"
FORMAT_FILES = ("quantize_config.json", "hf_quant_config.json")  # where some readers look for a format's settings

_PICKLES = ("*.bin", "*.pt", "*.pth")
# What training tools put before every tensor's name: DataParallel, PEFT; and a multimodal model, before those of its
# text model. And what torch.compile, FSDP and activation checkpointing put into names, wherever a module was wrapped.
_WRAPPERS = ("module.", "base_model.model.", "language_model.")
_WRAPPED = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEADS, _EMBEDDINGS = ("lm_head.weight", "embed_out.weight"), ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_HEADER_BYTES = 100_000_000  # the most that the safetensors library reads
_CHUNK = 1 << 22  # bytes compared at a time
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes from `start` on in the file `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint:
    """A folder of safetensors with its config.json; opening it reads only headers.

    What a training tool put before all names (`_WRAPPERS`) or into some (`_WRAPPED`) is taken off; `wrapper` holds it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises BadInput for a folder, config or weights that are missing, incomplete or corrupt."""
        self.folder = Path(folder)
        self.config: dict[str, Any]
        self._entries: dict[str, Stored]
        self.config, self._entries = self._opened()
        self.wrapper = self._unwrap()
        self._untie()

    def _opened(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """config.json, and where each tensor lies."""
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: no such folder")
        check_checkpoint_files(self.folder)
        config = read_json(self.folder / "config.json", "a checkpoint folder needs one")
        sharded = (self.folder / INDEX).exists()
        return config, self._open_shards() if sharded else read_header(self._single_file())

    def _unwrap(self) -> str:
        """Take off what training tools put into names; returns it. Raises BadInput for unmerged adapters."""
        adapters = [name for name in self._entries if ".lora_A." in name or ".lora_B." in name]
        if adapters:
            raise BadInput(
                f"{self.folder}: LoRA weights that are not merged ({adapters[0]}); merge them into the model first "
                "(PEFT's merge_and_unload) and give the merged folder"
            )
        inside = sorted({part for name in self._entries for part in _WRAPPED.findall(name)})
        taken = "".join(f"{part}." for part in inside)
        if inside:
            self._entries = {_WRAPPED.sub("", name): entry for name, entry in self._entries.items()}
        while found := [w for w in _WRAPPERS if self._entries and all(name.startswith(w) for name in self._entries)]:
            self._entries = {name.removeprefix(found[0]): entry for name, entry in self._entries.items()}
            taken += found[0]
        return taken

    def _untie(self) -> None:
        """Where config.json ties the head to the embedding and the file has another head, that head counts.

        So does transformers read it; config says so from here on, for servers that would believe config.json.
        """
        if self.config.get("tie_word_embeddings") is not True:
            return
        heads = [name for name in self._entries if name.endswith(_HEADS)]
        embeddings = [name for name in self._entries if name.endswith(_EMBEDDINGS)]
        for head in heads:
            like = [name for name in embeddings if self._entries[name].shape == self._entries[head].shape]
            if like and not any(self._same(head, name) for name in like):
                self.config["tie_word_embeddings"] = False
                if "tie_word_embeddings" in (inner := self.config.get("text_config") or {}):
                    self.config["text_config"] = inner | {"tie_word_embeddings": False}

    def _same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values."""
        a, b = self._entry(one), self._entry(other)
        if a.dtype != b.dtype:
            return torch.equal(Checkpoint.read(self, one).float(), Checkpoint.read(self, other).float())
        return _alike(a, b)

    def _single_file(self) -> Path:
        found = sorted(self.folder.glob("*.safetensors"))
        if self.folder / "model.safetensors" in found:
            return self.folder / "model.safetensors"
        if len(found) == 1:
            return found[0]
        if found:
            raise BadInput(f"{self.folder}: {len(found)} safetensors files and no {INDEX} to say which belong together")
        pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
        if pickles:
            raise BadInput(
                f"{self.folder}: only pickle weights ({pickles[0]}), which can run code when they are loaded; "
                "convert them to safetensors, or pass --allow-pickle if you trust where they come from"
            )
        raise BadInput(f"{self.folder}: no weights (*.safetensors)")

    def _open_shards(self) -> dict[str, Stored]:
        where = self.folder / INDEX
        shard_of = read_json(where).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of:
            raise BadInput(f"{where}: no weight_map")
        entries: dict[str, Stored] = {}
        shards: dict[str, dict[str, Stored]] = {}
        for name, shard in shard_of.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise BadInput(f"{where}: {name} is in {shard!r}, which is not a file name")
            if shard not in shards:
                if not (self.folder / shard).is_file():
                    raise BadInput(f"{self.folder}: shard {shard} is listed in {INDEX} but missing; download it again")
                shards[shard] = read_header(self.folder / shard)
            if name not in shards[shard]:
                raise BadInput(f"{where}: tensor {name} is not in {shard}")
            entries[name] = shards[shard][name]
        for shard, header in shards.items():  # readers take all that is in a shard, whatever the index says
            for name, entry in header.items():
                if not _alike(entries.setdefault(name, entry), entry):
                    raise BadInput(
                        f"{self.folder}: {name} is in {shard_of[name]} and, with other values, in {shard}: readers "
                        "differ in which they take; download the files of one version"
                    )
        return entries

    def names(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self._entry(name).size

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, by its name in the folder."""
        return self._entry(name).path.name

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.size for entry in self._entries.values())

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises BadInput for an unknown name, and a file truncated since opening."""
        return self._read(self._entry(name))

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """The part `rows` of the tensor along its first dimension; the rest is not read."""
        entry = self._entry(name)
        start, stop, _ = rows.indices(entry.shape[0])
        each = entry.size // max(1, entry.shape[0])
        part = (stop - start, *entry.shape[1:])
        return self._read(replace(entry, shape=part, start=entry.start + start * each, size=(stop - start) * each))

    def _read(self, entry: Stored) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.size:
            with open(entry.path, "rb", buffering=0) as file:
                file.seek(entry.start)
                fill(file, tensor.reshape(-1).view(torch.uint8).numpy().data, entry.path)
        return tensor

    def layout(self) -> dict[Path, list[tuple[str, Stored]]]:
        """The tensors of each file, in byte order."""
        files: dict[Path, list[tuple[str, Stored]]] = {}
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].start):
            files.setdefault(entry.path, []).append((name, entry))
        return files

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is made from others as it is read."""
        return name not in self._entries

    def file_hashes(self, known: Mapping[Path, str] = MappingProxyType({})) -> dict[str, str]:
        """SHA-256 by file name: weights, index, config.json, companions, and `FORMAT_FILES` of a quantized checkpoint.

        known: of files that need not be read again. Manifests of earlier versions do not list the `FORMAT_FILES`.
        """
        files = {entry.path for entry in self._entries.values()} | {self.folder / "config.json"}
        quantized = self.config.get("quantization_config") is not None  # they say nothing of a 16-bit one
        names = (INDEX, *(FORMAT_FILES if quantized else ()))
        files |= {self.folder / name for name in names if (self.folder / name).is_file()}
        files |= set(companions(self.folder))
        return {
            file.relative_to(self.folder).as_posix(): known.get(file) or file_sha256(file) for file in sorted(files)
        }

    def _entry(self, name: str) -> Stored:
        if name not in self._entries:
            raise BadInput(f"{self.folder}: no tensor {name}")
        return self._entries[name]


def _alike(a: Stored, b: Stored) -> bool:
    """Whether two tensors have the same bytes; reads only as far as they agree."""
    if a == b or (a.dtype, a.shape) != (b.dtype, b.shape):
        return a == b
    with open(a.path, "rb") as first, open(b.path, "rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        steps = [min(_CHUNK, a.size - at) for at in range(0, a.size, _CHUNK)]
        return all(first.read(n) == second.read(n) for n in steps)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in byte order; raises BadInput for an incomplete or corrupt file."""
    try:
        check_content(path)
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(file_bytes, _HEADER_BYTES) else b""
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    if len(raw) < max(length, 2):
        raise BadInput(f"{path}: truncated or not a safetensors file ({file_bytes} bytes)")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise BadInput(f"{path}: corrupt safetensors header: not a JSON object")
    about = header.get("__metadata__") or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise BadInput(f"{path}: corrupt safetensors header: __metadata__ has to be texts by name, not {about}"[:300])
    data = 8 + length
    entries = {name: _stored_of(path, name, value, data) for name, value in header.items() if name != "__metadata__"}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise BadInput(f"{path}: corrupt safetensors header: tensor {name} does not start where the last one ends")
        end += entry.size
    if end != file_bytes:
        kind = "truncated" if file_bytes < end else "too long"
        raise BadInput(f"{path}: {kind}: {file_bytes} bytes where the header says {end}; download it again")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _stored_of(path: Path, name: str, value: Any, data: int) -> Stored:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(int(n) for n in value["shape"]), value["data_offsets"]
        size = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize if dtype in SAFETENSORS_DTYPES else 0
        broken = begin < 0 or min(shape, default=0) < 0 or size != end - begin
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: corrupt safetensors header: tensor {name}: {value}") from None
    if dtype not in SAFETENSORS_DTYPES:
        raise BadInput(f"{path}: tensor {name} has dtype {dtype!r}, which is not supported")
    if broken:
        raise BadInput(f"{path}: corrupt safetensors header: tensor {name}: shape and bytes disagree: {value}")
    return Stored(path, SAFETENSORS_DTYPES[dtype], shape, data + begin, end - begin)


def fill(file: Any, buffer: memoryview, path: Path) -> None:
    """Read until `buffer` is full; a single read returns at most 2 GiB."""
    while buffer:
        n = file.readinto(buffer)
        if not n:
            raise BadInput(f"{path}: the file ended early; it was truncated after it was opened")
        buffer = buffer[n:]
