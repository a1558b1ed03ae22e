"""Whether an artifact is intact: its files against the manifest, its tensors against its config and its model.

Each linear is unpacked by its format, which checks the shapes, and packed again: the names and types have to be those
on disk. The config's list of excluded layers is compared with the layers that are in 16 bit.
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
from quantpress.models.placed_model import LinearLayer
from quantpress.models.skeleton import Skeleton
from quantpress.models.vetting import all_finite
from quantpress.numbers.grid import QuantizedLinear

from .contracts import of_folder
from .package import find_artifact

_SUMS = "SHA256SUMS"
_ALIKE = (torch.float16, torch.bfloat16, torch.float32)  # loaders cast scales between these
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_LEFT_BY_OLD_TOOLS = (".rotary_emb.inv_freq",)  # every loader computes it


def verify(where: Path) -> tuple[int, list[str]]:
    """The number of files compared with a list of checksums, and one line for each problem.

    where: a run folder, an artifact folder or an exported one. Raises BadInput when it is none of them.
    """
    artifact = _artifact(where)
    folder, listed = _listed(where, artifact)
    found = [f"{folder / name}, which is listed, {what}" for name, what in changed(folder, listed)]
    try:
        found += structure(artifact)
    except BadInput as error:
        if not found:  # else the checksums have told of the damage
            found.append(str(error))
    return len(listed), found


def compared(where: Path) -> str:
    """What `verify` compared the tensors with, in words: a GGUF file without a config.json has nothing to compare."""
    artifact = _artifact(where)
    if gguf_files(artifact) and not (artifact / "config.json").is_file():
        return "the GGUF file is whole; without a config.json beside it its tensors were compared with no model"
    return "every tensor fits its config and the model"


def structure(folder: Path) -> list[str]:
    """One line for each way in which an artifact contradicts its config or its model."""
    if gguf_files(folder):
        of_folder(folder)  # raises BadInput unless every part can be read
        if (folder / "config.json").is_file():
            GgufCheckpoint(folder)  # raises BadInput for a tensor that is missing or has another shape
        return []
    artifact = Artifact(folder)
    if artifact.format is None:
        if artifact.foreign is not None:
            raise BadInput(f"{folder}: its weights are {artifact.foreign}, in a format that is not written here")
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
    if not found:  # with a config that does not fit the tensors the list says nothing
        found += _left_out(artifact, skeleton, linears)
    found += _cache(artifact, skeleton, claimed)
    found += _strangers(artifact, skeleton, claimed)
    found += _twins(folder, artifact)
    return found


def _artifact(where: Path) -> Path:
    """The artifact folder in a run folder, an artifact folder or an exported one."""
    return find_artifact(where / "model" if (where / _SUMS).is_file() else where)


def _listed(where: Path, artifact: Path) -> tuple[Path, dict[str, str]]:
    """The folder that the listed file names are relative to, and the sha256 of each listed file."""
    if (where / _SUMS).is_file():
        lines = (where / _SUMS).read_text(encoding="utf-8").splitlines()
        return where, {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    manifest = own_manifest(where) or own_manifest(artifact)
    return artifact, {} if manifest is None else manifest.artifact.files


def _companions(folder: Path) -> Iterator[str]:
    """Tokenizer, chat template and the other files beside the weights are the original's, unchanged."""
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
    """(linear, problem) of each quantized linear whose shape is not the model's."""
    for x in linears:
        shape = artifact.shapes.get(x.name)
        if shape is not None and shape != (x.out_features, x.in_features):
            yield x.name, f"{x.name}: stored as {list(shape)} where the model has {[x.out_features, x.in_features]}"


def _parameters(artifact: Artifact, skeleton: Skeleton) -> Iterator[str]:
    """Every parameter that is not quantized exists, has the model's shape and is finite."""
    heads = {f"{head}.weight" for head in skeleton.head_names()}
    for name, parameter in skeleton.model.named_parameters():
        disk = skeleton.disk_name(name)
        if disk.removesuffix(".weight") in artifact.linears:
            continue
        if disk not in skeleton.reader:
            if not (skeleton.tied and disk in heads):
                yield f"{disk} is missing" + (": the head is not tied to the embedding" if disk in heads else "")
            continue
        shape = skeleton.reader.shape(disk)
        if shape != tuple(parameter.shape):
            yield f"{disk}: shape {list(shape)} where the model has {list(parameter.shape)}"
        elif not skeleton.reader.dtype(disk).is_floating_point:
            yield f"{disk}: {_kind(skeleton.reader.dtype(disk))} where a weight of the model is a float"
        elif not _finite(skeleton.reader.read(disk)):
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
    """The record in a form that `pack` accepts; only the names and types of its result are used."""
    grid = record.grid
    if format == "gptq-v1-asymmetric":
        grid = grid.model_copy(update={"symmetric": True})
    scales = record.scales
    if grid.type == "int" and scales.dtype == torch.float32:
        scales = torch.ones_like(scales)  # whether float16 can hold the scales is not the question here
    return replace(record, grid=grid, scales=scales, inputs=inputs)


def _left_out(artifact: Artifact, skeleton: Skeleton, linears: list[LinearLayer]) -> Iterator[str]:
    """The config leaves out exactly the layers that are in 16 bit on disk, under the names that loaders compare."""
    assert artifact.format is not None
    stated = artifact.config["quantization_config"]
    format = FORMATS["gptq" if artifact.format.startswith("gptq") else artifact.format]
    schemes = {x.name: artifact.linears.get(x.name) for x in linears}
    outside = [name for name in skeleton.unquantized_modules() if name not in artifact.linears]
    spec = ModelScheme(
        skeleton.by_all_names(schemes), outside, artifact.scattered, artifact.activations, artifact.kv_cache
    )
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
    """Tensors that belong to no layer: servers refuse to load them."""
    own = {skeleton.disk_name(name) for name, _ in skeleton.model.named_parameters()}
    own |= {skeleton.disk_name(name) for name, _ in skeleton.model.named_buffers()}
    own |= {f"{head}.weight" for head in skeleton.head_names()} | skeleton.on_disk_of_blocks()
    own |= set(skeleton.tower_tensors())
    manifest = own_manifest(artifact.checkpoint.folder)
    own |= set() if manifest is None else set(manifest.kept)
    broken = {name for name in artifact.linears if not any(c.startswith(f"{name}.") for c in claimed)}
    for name in artifact.checkpoint.names():
        linear = name.rpartition(".")[0]
        if name in own | claimed or linear in broken or name.endswith(_LEFT_BY_OLD_TOOLS):
            continue
        layer = f"{linear} is not quantized" if f"{linear}.weight" in own else "the model has no such parameter"
        yield f"{name} is on disk, and {layer}"


def _twins(folder: Path, artifact: Artifact) -> Iterator[str]:
    """The format's other config files say the same as config.json; only checked where this package wrote them."""
    assert artifact.format is not None
    if own_manifest(folder) is None:
        return
    wanted = FORMATS[artifact.format].extra_files(artifact.config["quantization_config"])
    for name, content in wanted.items():
        if not (folder / name).is_file():
            yield f"{folder}: {name} is missing"
        elif json.loads((folder / name).read_text(encoding="utf-8")) != content:
            yield f"{folder}: {name} and config.json disagree about the quantization"


def _strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [s for key, inner in value.items() for s in (str(key), *_strings(inner))]
    if isinstance(value, list):
        return [s for inner in value for s in _strings(inner)]
    return [value] if isinstance(value, str) else []


def _finite(tensor: Tensor) -> bool:
    return all_finite(tensor if tensor.dtype.itemsize > 1 else tensor.float())


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
