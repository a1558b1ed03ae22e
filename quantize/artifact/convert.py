"""Converting an artifact folder to another format: the same codes, without rounding again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.files import move_whole, write_json
from ..core.text import meant
from ..formats import FORMATS, Format, ModelScheme, detect
from ..gguf.reader import gguf_files
from ..models.architecture import is_multimodal, stated_dtype
from ..models.checkpoint import Checkpoint
from ..models.companions import copy_companions
from ..models.config_forms import readable_by_all
from ..models.shards import merge_parts, write_part
from ..models.skeleton import Skeleton
from ..numbers.grid import QuantizedLinear
from ..numbers.types import Grid
from ..recipe import FILE_FORMATS
from .artifact import Artifact
from .manifest import MANIFEST, read_manifest

_PART_BYTES = 500_000_000  # of tensors held in memory before they are written


def convert(source: Path, target: Path, to: str) -> None:
    """Write the artifact in `source` to the new folder `target` in format `to`, one linear at a time.

    Raises BadInput, and leaves nothing behind, for a source that is not quantized or has this format already, a target
    that exists, and anything that `to` cannot hold exactly.
    """
    known = [name for name, held in FILE_FORMATS.items() if held.convertible]
    if to not in known:
        raise BadInput(f"unknown format {to!r}{meant(to, known)} (known: {', '.join(known)})")
    if gguf_files(source):
        raise BadInput(f"{source} holds a GGUF file, whose numbers no other format has; quantize the original again")
    checkpoint = Checkpoint(source)
    origin = detect(checkpoint.config)
    if origin is None:
        raise BadInput(f"{source} is not quantized; convert changes the format of an artifact")
    if to == origin:
        raise BadInput(f"{source} is in format {to} already")
    if target.exists():
        raise BadInput(f"{target} exists; give a new folder")
    reader, writer = FORMATS[origin], FORMATS[to]
    shapes = reader.linears({name: checkpoint.shape(name) for name in checkpoint.names()}, checkpoint.read)
    if not shapes:
        raise BadInput(f"{source}: the config says {origin}, and no linear is quantized")
    schemes = _schemes(checkpoint, reader, shapes)
    stated = checkpoint.config["quantization_config"]
    activations, kv_cache = reader.activations(stated), reader.kv_cache(stated)
    shuffled = False
    for name, shape in shapes.items():
        grid = _grid(schemes, name)
        scattered = reader.scattered(name, checkpoint.read, grid, shape[1])
        shuffled |= scattered
        try:
            writer.check(grid, *shape, shuffled=scattered)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
    named, outside = _by_all_names(source, schemes, _heads(checkpoint))
    quantization = writer.config(ModelScheme(named, outside, shuffled, activations, kv_cache))

    def repack(name: str) -> dict[str, Tensor]:
        grid = _grid(schemes, name)
        q = reader.unpack(name, checkpoint.read, grid, shapes[name])
        if activations is not None:
            q = replace(q, inputs=reader.inputs(name, checkpoint.read, activations.beside(grid), grid))
        _check_inverse(name, q)
        return writer.pack(name, _in_model_dtype(q, checkpoint.config))

    renamed = {} if kv_cache is None else _caches(checkpoint, reader, writer)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(
            checkpoint, {f"{n}.{suffix}": n for n in shapes for suffix in reader.suffixes}, repack, renamed, partial
        )
        config = readable_by_all(checkpoint.config) | {"quantization_config": quantization}
        write_json(partial / "config.json", config)
        for name, content in writer.extra_files(quantization).items():
            write_json(partial / name, content)
        copy_companions(source, partial)
        _write_manifest(source, partial, origin, to, shapes)
        move_whole(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _schemes(checkpoint: Checkpoint, reader: Format, shapes: dict[str, tuple[int, int]]) -> dict[str, Grid | None]:
    """The grid of each quantized linear, and None for each linear left in 16 bit.

    The latter are those that the source names, and every other matrix in a block: a source that lists only what is
    quantized does not mention routers, for example, and the config to be written may have to.
    """
    dense = [n.removesuffix(".weight") for n in checkpoint.names() if n.endswith(".weight")]
    dense = [name for name in dense if name not in shapes and len(checkpoint.shape(f"{name}.weight")) == 2]
    grids = reader.grids(checkpoint.config["quantization_config"], [*shapes, *dense])
    for name in shapes:
        if grids.get(name) is None:
            raise BadInput(f"{checkpoint.folder}: {name} is quantized, and the config does not say how")
    out: dict[str, Grid | None] = {name: grids[name] for name in shapes}
    for name in dense:
        if (name in grids and grids[name] is None) or any(part.isdigit() for part in name.split(".")):
            out[name] = None
    return {name: out[name] for name in (*grids, *dense) if name in out}


def _grid(schemes: dict[str, Grid | None], name: str) -> Grid:
    grid = schemes[name]
    assert grid is not None
    return grid


def _check_inverse(name: str, q: QuantizedLinear) -> None:
    """Raise BadInput for a global scale of nvfp4 that is no power of two: formats store its inverse, inexact then."""
    scales = [q.global_scale] if q.inputs is None else [q.global_scale, q.inputs.scale]
    for scale in scales:
        if q.grid.type == "nvfp4" and scale is not None and float(torch.frexp(scale).mantissa) != 0.5:
            raise BadInput(
                f"{name}: its global scale {scale.item():.9g} is not a power of two, so its inverse, which the other "
                "format stores, is not exact; quantize the original model in that format"
            )


def _heads(checkpoint: Checkpoint) -> list[str]:
    """The name of the output head, even where it is tied and not stored."""
    return ["embed_out"] if "embed_out.weight" in checkpoint else ["lm_head"]


def _by_all_names(
    source: Path, schemes: dict[str, Grid | None], heads: list[str]
) -> tuple[dict[str, Grid | None], list[str]]:
    """`schemes`, and what else stays in 16 bit, by every name that a reader of a multimodal model may look for."""
    artifact = Artifact(source)
    if not is_multimodal(artifact.config):
        return schemes, heads
    skeleton = Skeleton(artifact, device=torch.device("meta"))
    outside = skeleton.unquantized_modules(but=[name for name, grid in schemes.items() if grid is not None])
    return skeleton.by_all_names(schemes), [*heads, *outside]


def _caches(checkpoint: Checkpoint, reader: Format, writer: Format) -> dict[str, str]:
    """The new name of each key-value cache scale."""
    return {
        name: f"{name.removesuffix(old)}{new}"
        for name in checkpoint.names()
        for old, new in zip(reader.cache_suffixes, writer.cache_suffixes, strict=True)
        if name.endswith(f".{old}")
    }


def _write_weights(
    checkpoint: Checkpoint,
    packed: dict[str, str],
    repack: Callable[[str], dict[str, Tensor]],
    renamed: dict[str, str],
    folder: Path,
) -> None:
    """Write the shards. packed: the linear of each packed tensor of the source. repack: a linear's new tensors."""
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
            held[renamed.get(tensor, tensor)] = checkpoint.read(tensor)
        elif linear not in done:
            done.add(linear)
            held |= repack(linear)
        if sum(t.nbytes for t in held.values()) >= _PART_BYTES:
            flush()
    flush()
    merge_parts(parts, folder)
    for part in parts:
        part.unlink()


def _in_model_dtype(q: QuantizedLinear, config: dict[str, Any]) -> QuantizedLinear:
    """Scales in the model's dtype if that is exact, since readers cast them to it anyway."""
    name = str(stated_dtype(config) or "").removeprefix("torch.")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None or (q.grid.type != "int" and dtype == torch.float16) or q.scales.element_size() == 1:
        return q  # fp8 weights' scales need float32's range; E4M3 and E8M0 scales are part of the number type
    if not torch.equal(q.scales.to(dtype).to(torch.float32), q.scales.to(torch.float32)):
        return q
    return replace(q, scales=q.scales.to(dtype))


def _write_manifest(source: Path, folder: Path, origin: str, to: str, shapes: dict[str, tuple[int, int]]) -> None:
    """Write the source's manifest with the new sizes and the format it was converted from."""
    if not (source / MANIFEST).exists():
        return
    manifest = read_manifest(source)
    written = Checkpoint(folder)
    stored = sum(written.nbytes(n) for n in written.names() if n.rpartition(".")[0] in shapes
                 and n.rpartition(".")[2] in FORMATS[to].suffixes)  # fmt: skip
    weights = sum(rows * columns for rows, columns in shapes.values())
    sizes = manifest.artifact.changed(
        format=to, bytes=written.total_bytes, quantized_bits_per_weight=8 * stored / weights
    )
    if sizes.files:
        sizes = sizes.changed(files=written.file_hashes())
    if sizes.parameters:
        sizes = sizes.changed(bits_per_parameter=8 * written.total_bytes / sizes.parameters)
    manifest.changed(artifact=sizes, converted_from={"format": origin}).write(folder)
