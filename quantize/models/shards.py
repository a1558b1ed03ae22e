"""Safetensors files written, the same bytes for the same tensors; they appear complete or not at all."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import whole_file, write_json
from .checkpoint import INDEX, SAFETENSORS_DTYPES, Stored, fill, read_header

JOINED = 1_000_000_000  # bytes of tensors up to which the weights of an artifact are one file
_CHUNK = 1 << 22  # bytes copied at a time
_WRITERS = 4  # shards written at once
_PIECE = 1 << 26  # bytes of a device's tensor that are brought to the host at a time
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_part(path: Path, tensors: Mapping[str, Tensor], *, sync: bool = True) -> str:
    """Write one safetensors file, the same bytes for the same tensors; returns its SHA-256.

    The file appears under `path` only once it is complete and, with `sync`, on disk. Tensors of a device are copied to
    the host in pieces.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names)
    digest = hashlib.sha256(header)
    with whole_file(path, sync=sync) as file:
        file.write(header)
        for name in names:
            for piece in _pieces(tensors[name].detach()):
                tensor = piece.cpu().contiguous()
                # A single element is contiguous whatever its stride; viewing it as bytes needs a stride of 1.
                data = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor of the host as it is; one of a device in rows of about _PIECE bytes."""
    if tensor.device.type == "cpu" or tensor.dim() == 0 or not tensor.numel():
        return [tensor]
    rows = max(1, _PIECE * tensor.shape[0] // (tensor.numel() * tensor.element_size()))
    return torch.split(tensor, rows)


def merge_parts(parts: Sequence[Path], folder: Path, max_shard_bytes: int = 5_000_000_000) -> dict[str, str]:
    """Join safetensors files, in order, into model.safetensors or numbered shards with an index; returns their SHA-256.

    Tensors are copied in small pieces, so memory stays constant; the parts are not changed.
    """
    shards: list[dict[str, Stored]] = [{}]
    seen: set[str] = set()
    filled = total = 0
    for part in parts:
        header = read_header(part)
        _check_new(part, header, seen)
        seen |= header.keys()
        for name, entry in header.items():
            if shards[-1] and filled + entry.size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = entry
            filled += entry.size
            total += entry.size
    if len(shards) == 1:
        return {"model.safetensors": _write_shard(folder / "model.safetensors", shards[0])}
    names = _shard_names(len(shards))
    with ThreadPoolExecutor(_WRITERS) as pool:
        digests = list(pool.map(_write_shard, [folder / name for name in names], shards))
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dict(zip(names, digests, strict=True))


def gather_parts(parts: Mapping[Path, str], folder: Path) -> dict[str, str]:
    """Make safetensors files {path: SHA-256} the weights of `folder`; returns the SHA-256 of what lies there, by name.

    Up to `JOINED` bytes in all they are joined into one. Of more, each is a shard as it is: nothing is copied, and both
    places keep the file, unless the file system has no hard links.
    """
    headers = {part: header for part in parts if (header := read_header(part))}
    total = sum(entry.size for header in headers.values() for entry in header.values())
    if total <= JOINED or len(headers) == 1:
        return merge_parts(list(headers), folder)
    names = _shard_names(len(headers))
    weight_map: dict[str, str] = {}
    for name, (part, header) in zip(names, headers.items(), strict=True):
        _check_new(part, header, weight_map)
        weight_map |= dict.fromkeys(header, name)
        try:
            os.link(part, folder / name)
        except OSError:
            part.replace(folder / name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {name: parts[part] for name, part in zip(names, headers, strict=True)}


def _check_new(part: Path, header: Iterable[str], seen: Container[str]) -> None:
    """Raise ValueError for a tensor that is in an earlier part."""
    for name in header:
        if name in seen:
            raise ValueError(f"{part}: tensor {name} is also in an earlier part")


def _shard_names(count: int) -> list[str]:
    return [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]


def _header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds these tensors in this order; with wider dtypes first, all are aligned."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, tensors: dict[str, Stored]) -> str:
    """Write a safetensors file of tensors that lie in others; returns its SHA-256."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    buffer = memoryview(bytearray(_CHUNK))
    header = _header((name, entry.dtype, entry.shape) for name, entry in ordered)
    digest = hashlib.sha256(header)
    with whole_file(path) as file:
        file.write(header)
        for _, entry in ordered:
            with open(entry.path, "rb", buffering=0) as source:
                source.seek(entry.start)
                for left in range(entry.size, 0, -_CHUNK):
                    piece = buffer[: min(left, _CHUNK)]
                    fill(source, piece, entry.path)
                    digest.update(piece)
                    file.write(piece)
    return digest.hexdigest()
