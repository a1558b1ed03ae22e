"""Importance matrices: the mean square of each input of a weight, and llama.cpp's files of them.

A file is a GGUF with two tensors per weight: its name with `.in_sum2`, the sums of squares [experts, in], and with
`.counts`, the token counts [experts] (llama.cpp's tools/imatrix). Older .dat files (before August 2025) are read too.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import nn

from ..calibrate.block_pass import BATCH_TOKENS
from ..calibrate.tokens import Tokens
from ..core.errors import BadInput
from ..models.skeleton import Skeleton, run_block
from .layout import Entry
from .reader import GgufTensors
from .writer import FileTensor, write

Array = np.ndarray[Any, np.dtype[np.float32]]
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Of one tensor: sums [experts, in] of squared inputs and counts [experts] of tokens; one row without experts."""

    sums: Array
    counts: Array

    @property
    def mean(self) -> Array:
        """Mean squares [experts, in]; ones for an expert that no token reached, as in llama.cpp, or zeros alone."""
        reached = (self.counts[:, None] > 0) & (self.sums > 0).any(1, keepdims=True)
        return np.where(reached, self.sums / np.maximum(self.counts[:, None], 1), np.float32(1)).astype(np.float32)


def measure(
    skeleton: Skeleton, entries: Sequence[Entry], tokens: Tokens, on_block: Callable[[int], None] = lambda done: None
) -> dict[str, Importance]:
    """The importance matrix of a model on these tokens, by GGUF tensor, in one pass block by block.

    The head's entry is named after the embedding where the two are tied.
    """
    device = skeleton.device
    place = {p.removesuffix(".weight"): (entry, i) for entry in entries for i, p in enumerate(entry.parameters)}
    skeleton.open_shell()
    hidden = skeleton.embed(tokens.ids)
    arguments = skeleton.block_arguments(tokens.ids)
    skeleton.close_shell()
    batch = max(1, BATCH_TOKENS // tokens.ids.shape[1])
    out: dict[str, Importance] = {}
    for k, block in skeleton.blocks():
        squares = {x.module: _Squares(x.in_features) for x in skeleton.linears() if x.block == k}
        handles = [block.get_submodule(n).register_forward_pre_hook(s.note) for n, s in squares.items()]
        run_block(block, hidden, arguments[k], device=device, batch=batch)
        for handle in handles:
            handle.remove()
        for linear in skeleton.linears():
            if linear.block == k:
                entry, expert = place[linear.name]
                rows = len(entry.parameters)
                zeros = Importance(np.zeros((rows, linear.in_features), np.float32), np.zeros(rows, np.float32))
                found = out.setdefault(entry.name, zeros)
                found.sums[expert] = squares[linear.module].total.cpu().numpy()
                found.counts[expert] = squares[linear.module].count
        on_block(k + 1)
    count = tokens.ids.numel()
    sums = count * of_head(skeleton, hidden).numpy()
    out[head_of(entries)] = Importance(sums[None], np.array([count], np.float32))
    return out


def of_head(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """Mean squares [hidden] float32 of the head's inputs, from the last block's outputs [samples, seq_len, hidden]."""
    skeleton.open_shell()
    head = _Squares(hidden.shape[-1])
    for states in hidden:
        head.add(skeleton.final_norm(states))
    skeleton.close_shell()
    return (head.total / max(head.count, 1)).float()


def head_of(entries: Sequence[Entry]) -> str:
    """The name of the head's tensor; the embedding's where they are tied."""
    return next(n for n in ("output.weight", "token_embd.weight") if any(entry.name == n for entry in entries))


class _Squares:
    """Sums of squares [in] of a linear's inputs."""

    def __init__(self, columns: int) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.count = 0

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.add(args[0].reshape(-1, args[0].shape[-1]))

    def add(self, x: torch.Tensor) -> None:
        """Add rows x [tokens, in]."""
        self.total += x.to(torch.float32).square().sum(0, dtype=torch.float64).cpu()
        self.count += len(x)


def save(path: Path, importance: Mapping[str, Importance], text: str, chunk: int) -> None:
    """Write a file in llama.cpp's format; text: name of the calibration text; chunk: tokens per sequence."""
    tensors = []
    for name, found in importance.items():
        for suffix, values in ((_SUMS, found.sums), (_COUNTS, found.counts[:, None])):
            tensors.append(_tensor(name + suffix, values))
    tokens = max((int(found.counts.sum()) for found in importance.values()), default=0)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [text],
        "imatrix.chunk_count": max(1, tokens // chunk),
        "imatrix.chunk_size": chunk,
    }
    write(path, metadata, tensors)


def _tensor(name: str, values: Array) -> FileTensor:
    return FileTensor(name, GGMLQuantizationType.F32, values.shape, lambda: values)


def load(path: Path) -> dict[str, Importance]:
    """Read a file of either format, by GGUF tensor name. Raises BadInput for one of neither format, or damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise BadInput(f"imatrix {path}: cannot be read: {error.strerror or error}") from error
    found = _load_gguf(path) if head == b"GGUF" else _load_legacy(path)
    for name, importance in found.items():
        if not (np.isfinite(importance.sums).all() and (importance.sums >= 0).all()):
            raise BadInput(f"imatrix {path}: {name} holds a negative, infinite or NaN value")
    return found


def _load_gguf(path: Path) -> dict[str, Importance]:
    tensors = GgufTensors([path])
    out = {}
    for name in tensors.names():
        if name.endswith(_SUMS):
            weight = name.removesuffix(_SUMS)
            if weight + _COUNTS not in tensors:
                raise BadInput(f"imatrix {path}: {weight} has sums and no counts")
            counts = tensors.dequantized(weight + _COUNTS).reshape(-1).numpy()
            out[weight] = Importance(tensors.dequantized(name).numpy().reshape(len(counts), -1), counts)
    if not out:
        raise BadInput(f"imatrix {path}: a GGUF file without *{_SUMS}: not an importance matrix")
    return out


def _load_legacy(path: Path) -> dict[str, Importance]:
    """int32 n; then n times: int32 length, name, int32 calls, int32 count, float32s (mean squares times calls)."""
    data, at = path.read_bytes(), 0

    def take(kind: str, size: int) -> Any:
        nonlocal at
        if size < 0 or at + size > len(data):
            raise BadInput(f"imatrix {path}: neither a GGUF file nor llama.cpp's older .dat form, or cut short")
        piece = data[at : at + size]
        at += size
        return piece if kind == "bytes" else struct.unpack(kind, piece)[0]

    out: dict[str, Importance] = {}
    for _ in range(take("<i", 4)):
        name = bytes(take("bytes", take("<i", 4))).decode(errors="replace")
        calls, size = take("<i", 4), take("<i", 4)
        values = np.frombuffer(take("bytes", 4 * size), np.float32)
        out[name] = Importance(values[None].copy(), np.array([max(calls, 1)], np.float32))
    if not out:
        raise BadInput(f"imatrix {path}: no entries")
    return out


def fitted(importance: Mapping[str, Importance], entries: Sequence[Entry], where: str) -> dict[str, Array]:
    """Mean squares [experts, in] by tensor of the file; raises BadInput when the matrix is of another model."""
    known = {entry.name: entry for entry in entries if entry.matrix}
    out = {}
    for name, found in importance.items():
        if name not in known:
            continue
        entry, mean = known[name], found.mean
        wanted = (entry.shape[0] if entry.stacked else 1) * entry.shape[-1]
        if mean.size != wanted:
            raise BadInput(f"imatrix {where}: {name} has {mean.size} values and the model {wanted}: another model's")
        out[name] = mean.reshape(-1, entry.shape[-1])
    if not out:
        raise BadInput(f"imatrix {where}: none of its tensors is in the model")
    return out


def of_linears(importance: Mapping[str, Array], entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """Mean squares [in] by on-disk name of each linear whose tensor is in `importance`."""
    out = {}
    for entry in entries:
        for i, parameter in enumerate(entry.parameters if entry.name in importance else ()):
            out[parameter.removesuffix(".weight")] = torch.from_numpy(importance[entry.name][i])
    return out
