"""The same codes in another format: an artifact folder in, an artifact folder out, nothing rounded on the way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .checkpoint import Checkpoint, copy_companions, merge_parts, write_json, write_part
from .errors import BadInput
from .formats import FORMATS, Format, detect
from .grid import QuantizedLinear
from .recipe import Activations, FormatName, Grid

_PART_BYTES = 500_000_000  # held in memory before it is written


def convert(source: Path, target: Path, to: str) -> None:
    """Write the artifact in `source` to the new folder `target` in format `to`, one linear at a time.

    Raises BadInput, and leaves nothing behind, for a source that is not quantized, formats that are the same, a
    target that exists, and whatever `to` cannot hold exactly.
    """
    checkpoint = Checkpoint(source)
    origin = detect(checkpoint.config)
    if origin is None:
        raise BadInput(f"{source} is not quantized; convert changes the format of an artifact")
    if to not in get_args(FormatName):
        raise BadInput(f"unknown format {to!r}; known: {', '.join(get_args(FormatName))}")
    if to == origin:
        raise BadInput(f"{source} is in format {to} already")
    if target.exists():
        raise BadInput(f"{target} exists; give a new folder")
    reader, writer = FORMATS[origin], FORMATS[to]
    shapes = reader.linears({name: checkpoint.shape(name) for name in checkpoint.names()}, checkpoint.read)
    if not shapes:
        raise BadInput(f"{source}: the config says {origin}, and no linear is quantized")
    schemes = _schemes(checkpoint, reader, shapes)
    heads = ["embed_out"] if "embed_out.weight" in checkpoint else ["lm_head"]
    shuffled = False
    for name, shape in shapes.items():
        grid = schemes[name]
        assert grid is not None
        scattered = reader.scattered(name, checkpoint.read, grid, shape[1])
        shuffled |= scattered
        try:
            writer.check(grid, *shape, shuffled=scattered)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
    source_config = checkpoint.config["quantization_config"]
    activations = reader.activations(source_config)
    quantization = writer.config(
        schemes,
        ignored_extra=heads,
        shuffled=shuffled,
        activations=activations,
        kv_cache=reader.kv_cache(source_config),
    )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(checkpoint, reader, writer, schemes, shapes, activations, partial)
        write_json(partial / "config.json", checkpoint.config | {"quantization_config": quantization})
        for name, content in writer.extra_files(quantization).items():
            write_json(partial / name, content)
        copy_companions(source, partial)
        _write_manifest(source, partial, origin, to, shapes)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _schemes(checkpoint: Checkpoint, reader: Format, shapes: dict[str, tuple[int, int]]) -> dict[str, Grid | None]:
    """The grid of each quantized linear, and None for what the source leaves in 16 bit on purpose."""
    dense = [n.removesuffix(".weight") for n in checkpoint.names() if n.endswith(".weight")]
    dense = [name for name in dense if name not in shapes and len(checkpoint.shape(f"{name}.weight")) == 2]
    grids = reader.grids(checkpoint.config["quantization_config"], [*shapes, *dense])
    for name in shapes:
        if grids.get(name) is None:
            raise BadInput(f"{checkpoint.folder}: {name} is quantized, and the config does not say how")
    return {name: grid for name, grid in grids.items() if name in shapes or grid is None}


def _write_weights(
    checkpoint: Checkpoint,
    reader: Format,
    writer: Format,
    schemes: dict[str, Grid | None],
    shapes: dict[str, tuple[int, int]],
    activations: Activations | None,
    folder: Path,
) -> None:
    packed = {f"{name}.{suffix}": name for name in shapes for suffix in reader.suffixes()}
    parts: list[Path] = []
    held: dict[str, Tensor] = {}
    done: set[str] = set()

    def flush() -> None:
        if held:
            parts.append(folder / f"part-{len(parts):05d}.safetensors")
            write_part(parts[-1], held)
            held.clear()

    for tensor in checkpoint.names():
        linear = packed.get(tensor)
        if linear is None:
            held[tensor] = checkpoint.read(tensor)
        elif linear not in done:
            done.add(linear)
            grid = schemes[linear]
            assert grid is not None
            q = reader.unpack(linear, checkpoint.read, grid, shapes[linear])
            if activations is not None:
                q = replace(q, inputs=reader.inputs(linear, checkpoint.read, activations, grid))
            held |= writer.pack(linear, _in_model_dtype(q, checkpoint.config))
        if sum(t.nbytes for t in held.values()) >= _PART_BYTES:
            flush()
    flush()
    merge_parts(parts, folder)
    for part in parts:
        part.unlink()


def _in_model_dtype(q: QuantizedLinear, config: dict[str, Any]) -> QuantizedLinear:
    """Scales in the model's own dtype when that loses nothing: readers cast them to it anyway."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None or q.scales.element_size() == 1:  # E4M3 and E8M0 scales are part of the number type
        return q
    exact = torch.equal(q.scales.to(dtype).to(torch.float32), q.scales.to(torch.float32))
    return replace(q, scales=q.scales.to(dtype)) if exact else q


def _write_manifest(source: Path, folder: Path, origin: str, to: str, shapes: dict[str, tuple[int, int]]) -> None:
    """The source's manifest, with what has changed."""
    if not (source / "manifest.json").exists():
        return
    manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    written = Checkpoint(folder)
    stored = sum(written.nbytes(n) for n in written.names() if n.rpartition(".")[0] in shapes
                 and n.rpartition(".")[2] in FORMATS[to].suffixes())  # fmt: skip
    weights = sum(rows * columns for rows, columns in shapes.values())
    sizes = manifest.get("artifact") or {}
    sizes |= {"format": to, "bytes": written.total_bytes, "quantized_bits_per_weight": 8 * stored / weights}
    if "parameters" in sizes:
        sizes["bits_per_parameter"] = 8 * written.total_bytes / sizes["parameters"]
    write_json(folder / "manifest.json", manifest | {"artifact": sizes, "converted_from": {"format": origin}})
