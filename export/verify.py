"""Whether an artifact is whole: its files against the manifest, and its tensors against its config and its model.

A check by what the formats themselves say: each linear is unpacked, and packed again it has to give tensors of the
names, shapes and types that are stored; the config is compared with the one that would be written for what is there.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate import kv_cache
from quantpress.core.errors import BadInput
from quantpress.core.files import changed
from quantpress.formats import FORMATS, ModelScheme
from quantpress.gguf.reader import GgufCheckpoint, gguf_files
from quantpress.models.checkpoint import INDEX
from quantpress.models.skeleton import LinearLayer, Skeleton
from quantpress.numbers.grid import QuantizedLinear

from .contracts import of_folder
from .package import find_artifact

_SUMS = "SHA256SUMS"
_ALIKE = (torch.float16, torch.bfloat16, torch.float32)  # readers cast scales of one to another
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_LEFT_BY_OLD_TOOLS = (".rotary_emb.inv_freq",)  # computed by every reader


def verify(where: Path) -> tuple[int, list[str]]:
    """How many files were compared with a list of checksums, and one line for each thing that is wrong.

    where: a run folder, an artifact folder or an exported one. Raises BadInput when it is none of them.
    """
    artifact = _artifact(where)
    folder, listed = _listed(where, artifact)
    found = [f"{folder / name}, which is listed, {what}" for name, what in changed(folder, listed)]
    try:
        found += structure(artifact)
    except BadInput as error:
        if not found:  # else it is the damage that the checksums have told of
            found.append(str(error))
    return len(listed), found


def compared(where: Path) -> str:
    """What of the tensors `verify` has found to be so, in words: a GGUF file by itself tells of no model to hold."""
    artifact = _artifact(where)
    if gguf_files(artifact) and not (artifact / "config.json").is_file():
        return "the GGUF file is whole; without a config.json beside it its tensors were compared with no model"
    return "every tensor fits its config and the model"


def structure(folder: Path) -> list[str]:
    """One line for each thing in an artifact that its own config, or its model, does not have so."""
    if gguf_files(folder):
        of_folder(folder)  # every part can be read, and its metadata
        if (folder / "config.json").is_file():
            GgufCheckpoint(folder)  # raises BadInput for a tensor that the model wants and the file does not have so
        return []
    artifact = Artifact(folder)
    if artifact.format is None:
        raise BadInput(f"{folder} is not quantized: config.json has no quantization_config")
    skeleton = Skeleton(artifact, device=torch.device("meta"))
    linears = skeleton.linears()
    artifact.transposed = frozenset(x.name for x in linears if x.transposed)
    misshapen = dict(_shapes(artifact, linears))
    found = [*_companions(folder), *misshapen.values(), *_parameters(artifact, skeleton)]
    claimed: set[str] = set()
    for name in artifact.linears:
        if name in misshapen:
            continue
        try:
            found += _linear(artifact, name, claimed)
        except BadInput as error:
            found.append(str(error))
    if not found:  # what is listed on disk is judged by a config that fits it
        found += _left_out(artifact, skeleton, linears)
    found += _cache(artifact, skeleton, claimed)
    found += _strangers(artifact, skeleton, claimed)
    found += _twins(folder, artifact)
    return found


def _artifact(where: Path) -> Path:
    """The artifact folder of what `verify` is given."""
    return find_artifact(where / "model" if (where / _SUMS).is_file() else where)


def _listed(where: Path, artifact: Path) -> tuple[Path, dict[str, str]]:
    """The sha256 of each file that a list beside the artifact names, and the folder that the names are of."""
    if (where / _SUMS).is_file():
        lines = (where / _SUMS).read_text(encoding="utf-8").splitlines()
        return where, {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    manifest = own_manifest(where) or own_manifest(artifact)
    return artifact, {} if manifest is None else manifest.artifact.files


def _companions(folder: Path) -> Iterator[str]:
    """Tokenizer, chat template and what else goes with the weights: the original's, unchanged."""
    manifest = own_manifest(folder)
    if manifest is None:
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
            yield f"{folder}: no tokenizer: servers start with one, or not at all"
        return
    files = manifest.model.files.items()
    beside = {n: d for n, d in files if not n.endswith(_WEIGHTS) and n not in ("config.json", INDEX)}
    for name, what in changed(folder, beside):
        yield f"{folder}: {name}, which the original has, {what}"


def _shapes(artifact: Artifact, linears: list[LinearLayer]) -> Iterator[tuple[str, str]]:
    """What is wrong with the shape of a quantized linear, by its name."""
    for x in linears:
        shape = artifact.shapes.get(x.name)
        if shape is not None and shape != (x.out_features, x.in_features):
            yield x.name, f"{x.name}: stored as {list(shape)} where the model has {[x.out_features, x.in_features]}"


def _parameters(artifact: Artifact, skeleton: Skeleton) -> Iterator[str]:
    """Every parameter that is not quantized is there, has the model's shape and is finite."""
    tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    heads = {f"{head}.weight" for head in skeleton.head_names()}
    for name, parameter in skeleton.model.named_parameters():
        disk = skeleton.disk_name(name)
        if disk.removesuffix(".weight") in artifact.linears:
            continue
        if disk not in artifact:
            if not (tied and disk in heads):
                yield f"{disk} is missing" + (": the head is not tied to the embedding" if disk in heads else "")
            continue
        shape = artifact.checkpoint.shape(disk)
        if shape != tuple(parameter.shape):
            yield f"{disk}: shape {list(shape)} where the model has {list(parameter.shape)}"
        elif not artifact.checkpoint.dtype(disk).is_floating_point:
            yield f"{disk}: {_kind(artifact.checkpoint.dtype(disk))} where a weight of the model is a float"
        elif not _finite(artifact.checkpoint.read(disk)):
            yield f"{disk} holds NaN or inf"


def _linear(artifact: Artifact, name: str, claimed: set[str]) -> Iterator[str]:
    """The stored tensors of a quantized linear are those that its record packs to, of the same types.

    Raises BadInput as the format does where it unpacks them: for a wrong shape, for a scale that is one number and not
    positive.
    """
    assert artifact.format is not None
    record = artifact.linear(name)
    if not _finite(record.scales):
        yield f"{name}: its scales hold NaN or inf"
        claimed |= {n for n in artifact.checkpoint.names() if n.startswith(f"{name}.")}
        return
    packed = FORMATS[artifact.format].pack(name, _writable(artifact.format, record, artifact.inputs(name)))
    claimed |= set(packed)
    for tensor_name, expected in packed.items():
        if tensor_name not in artifact.checkpoint:
            yield f"{tensor_name} is missing"
            continue
        dtype = artifact.checkpoint.dtype(tensor_name)
        if dtype != expected.dtype and not {dtype, expected.dtype} <= set(_ALIKE):
            yield f"{tensor_name}: {_kind(dtype)} where {_kind(expected.dtype)} is read"


def _writable(format: str, record: QuantizedLinear, inputs: Any) -> QuantizedLinear:
    """The record as `pack` takes it; only names, shapes and types of what comes out are looked at."""
    grid = record.grid
    if format == "gptq-v1-asymmetric":
        grid = grid.model_copy(update={"symmetric": True})
    scales = record.scales
    if grid.type == "int" and scales.dtype == torch.float32:
        scales = torch.ones_like(scales)  # a scale that another type cannot hold is not what is looked for here
    return replace(record, grid=grid, scales=scales, inputs=inputs)


def _left_out(artifact: Artifact, skeleton: Skeleton, linears: list[LinearLayer]) -> Iterator[str]:
    """The list of layers left in 16 bit says of each what is so on disk, by the names that readers compare."""
    assert artifact.format is not None
    stated = artifact.config["quantization_config"]
    format = FORMATS["gptq" if artifact.format.startswith("gptq") else artifact.format]
    schemes = {x.name: artifact.linears.get(x.name) for x in linears}
    outside = [name for name in skeleton.unquantized_modules() if name not in artifact.linears]
    spec = ModelScheme(schemes, outside, artifact.scattered, artifact.activations, artifact.kv_cache)
    names = [*schemes, *outside]
    wanted, said = format.grids(format.config(spec), names), format.grids(stated, names)
    for name in names:
        if wanted.get(name) is None and said.get(name) is not None:
            near = difflib.get_close_matches(name, _strings(stated), n=1, cutoff=0.6)
            hint = f"; the nearest entry is {near[0]!r}" if near else ""
            yield f"{name} is in 16 bit, and config.json does not leave it out{hint}"


def _cache(artifact: Artifact, skeleton: Skeleton, claimed: set[str]) -> Iterator[str]:
    assert artifact.format is not None
    if artifact.kv_cache is None:
        return
    for name, _ in kv_cache.attentions(skeleton):
        claimed |= {f"{name}.{suffix}" for suffix in FORMATS[artifact.format].cache_suffixes}
        try:
            scales = artifact.cache_scales(name)
        except BadInput as error:
            yield str(error)
            continue
        if not all(0 < float(scale) < math.inf for scale in scales):
            yield f"{name}: the scales of its key-value cache are not positive numbers"


def _strangers(artifact: Artifact, skeleton: Skeleton, claimed: set[str]) -> Iterator[str]:
    """Tensors that belong to nothing: servers stop at them."""
    own = {skeleton.disk_name(name) for name, _ in skeleton.model.named_parameters()}
    own |= {skeleton.disk_name(name) for name, _ in skeleton.model.named_buffers()}
    own |= {f"{head}.weight" for head in skeleton.head_names()}
    broken = {name for name in artifact.linears if not any(c.startswith(f"{name}.") for c in claimed)}
    for name in artifact.checkpoint.names():
        linear = name.rpartition(".")[0]
        if name in own | claimed or linear in broken or name.endswith(_LEFT_BY_OLD_TOOLS):
            continue
        layer = f"{linear} is not quantized" if f"{linear}.weight" in own else "the model has no such parameter"
        yield f"{name} is on disk, and {layer}"


def _twins(folder: Path, artifact: Artifact) -> Iterator[str]:
    """The files that say again what config.json says, where this package has written them."""
    assert artifact.format is not None
    if own_manifest(folder) is None:
        return
    wanted = FORMATS[artifact.format].extra_files(artifact.config["quantization_config"])
    for name, content in wanted.items():
        if not (folder / name).is_file():
            yield f"{folder}: {name} is lost"
        elif json.loads((folder / name).read_text(encoding="utf-8")) != content:
            yield f"{folder}: {name} and config.json say different things of the quantization"


def _strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [s for key, inner in value.items() for s in (str(key), *_strings(inner))]
    if isinstance(value, list):
        return [s for inner in value for s in _strings(inner)]
    return [value] if isinstance(value, str) else []


def _finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part.float()).all()) for part in torch.split(tensor.reshape(-1), 1 << 20))


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
