"""The same codes in another format, without loss."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .artifact import Artifact, open_artifact
from .checkpoint import copy_companions, merge_parts, write_json, write_part
from .errors import BadInput
from .formats import FORMATS
from .grid import QuantizedLinear

_PART_BYTES = 1_000_000_000


def convert(source: Path, target: Path, to: str) -> None:
    """Write the artifact in `source` as format `to` in the folder `target`.

    Raises BadInput, and leaves no target behind, when the target format cannot hold the same codes, scales and zeros.
    """
    if to not in FORMATS:
        raise BadInput(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}")
    if target.exists():
        raise BadInput(f"{target} exists already; give another folder")
    artifact, skeleton = open_artifact(source, torch.device("cpu"))
    if artifact.format is None:
        raise BadInput(f"{source} is not quantized; `quantpress quantize` does that")
    if artifact.format == to:
        raise BadInput(f"{source} is in format {to} already")
    linears = skeleton.linears()
    schemes = {x.name: artifact.linears.get(x.name) for x in linears}
    for x in linears:
        grid = schemes[x.name]
        if grid is not None:
            FORMATS[to].check(grid, x.out_features, x.in_features, shuffled=False)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shuffled = _write_weights(artifact, partial, to)
        quantization = FORMATS[to].config(schemes, ignored_extra=skeleton.heads(), shuffled=shuffled)
        write_json(partial / "config.json", artifact.config | {"quantization_config": quantization})
        for name, content in FORMATS[to].extra_files(quantization).items():
            write_json(partial / name, content)
        copy_companions(source, partial)
        if (source / "manifest.json").is_file():
            shutil.copyfile(source / "manifest.json", partial / "manifest.json")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(artifact: Artifact, folder: Path, to: str) -> bool:
    """Stream the tensors, a gigabyte at a time, into shards; whether any linear's columns are shuffled."""
    parts: list[Path] = []
    waiting: dict[str, Tensor] = {}
    shuffled = False

    def flush() -> None:
        parts.append(folder / f"part-{len(parts):05d}.tmp")
        write_part(parts[-1], waiting)
        waiting.clear()

    for name, item in _items(artifact):
        if isinstance(item, QuantizedLinear):
            shuffled = shuffled or item.g_idx is not None
            waiting |= FORMATS[to].pack(name, item)
        else:
            waiting[name] = item
        if sum(t.nbytes for t in waiting.values()) > _PART_BYTES:
            flush()
    flush()
    merge_parts(parts, folder)
    for part in parts:
        part.unlink()
    return shuffled


def _items(artifact: Artifact) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    done: set[str] = set()
    for name in artifact.checkpoint.names():
        linear = name.rpartition(".")[0]
        if linear not in artifact.linears or name.endswith(".bias"):
            yield name, artifact.checkpoint.read(name)
        elif linear not in done:
            done.add(linear)
            yield linear, artifact.linear(linear)
