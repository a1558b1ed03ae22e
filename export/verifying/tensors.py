"""The tensors of an artifact folder against its config and its model.

Each linear is unpacked by its format, which checks the shapes, and packed again: the names and types have to be those
on disk. The config's list of excluded layers is compared with the layers that are in 16 bit. One tensor is in memory at
a time and thread.
"""

import copy
import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quantpress.artifact.artifact import Artifact
from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate import kv_cache
from quantpress.core.errors import BadInput
from quantpress.core.untrusted import read_json
from quantpress.formats import FORMATS, ModelScheme
from quantpress.models.architecture import is_unknown
from quantpress.models.by_name import ByName
from quantpress.models.checkpoint import INDEX, Checkpoint
from quantpress.models.placed_model import LinearLayer
from quantpress.models.skeleton import Skeleton
from quantpress.models.vetting import all_finite
from quantpress.numbers.grid import Inputs, QuantizedLinear

from .beside import companions_of
from .statement import contradictions, model_statement
from .values import impossible, typical, unlike_layers, unlike_parts

_ALIKE = (torch.float16, torch.bfloat16, torch.float32)  # loaders cast scales between these
_LEFT_BY_OLD_TOOLS = (".rotary_emb.inv_freq",)  # every loader computes it
_THREADS = 4  # more would hold more linears in memory than they save time

_T = TypeVar("_T")
_R = TypeVar("_R")


def problems(folder: Path) -> list[str]:
    """One line for each way in which an artifact of safetensors contradicts its config or its model."""
    artifact = Artifact(folder)
    if artifact.format is None:
        if artifact.foreign is not None:
            raise BadInput(f"{folder}: its weights are {artifact.foreign}, in a format that is not written here")
        raise BadInput(f"{folder} is not quantized: config.json has no quantization_config")
    skeleton = model_of(artifact, folder, artifact.linears)
    linears = skeleton.linears()
    artifact.transposed = frozenset(x.name for x in linears if x.transposed)
    misshapen = dict(_shapes(artifact, linears))
    found = [*companions_of(folder, skeleton.vocabulary), *misshapen.values(), *_plain(artifact, skeleton)]
    manifest = own_manifest(folder)
    zeros = set() if manifest is None else {one.name for one in manifest.layers if one.relative_error == 0}
    whole = [name for name in artifact.linears if name not in misshapen]
    checked = list(at_once(lambda name: _checked(artifact, name, name in zeros), whole))
    found += [line for one in checked for line in one.problems]
    claimed = {name for one in checked for name in one.claimed}
    if not found:  # with a config that does not fit the tensors the list says nothing
        found += _left_out(artifact, skeleton, linears)
        found += contradictions(artifact, artifact.scattered)
    found += _fused(artifact, checked)
    sizes = {one.name: one.size for one in checked if one.size is not None and not one.problems}
    found += unlike_layers({name: size for name, size in sizes.items() if name not in zeros})
    corrected = artifact.config if isinstance(artifact.checkpoint, Checkpoint) else None
    found += model_statement(folder, skeleton.vocabulary, corrected)
    found += _cache(artifact, skeleton, claimed)
    found += _strangers(artifact, skeleton, claimed)
    found += _hidden(folder)
    return found


def model_of(artifact: Any, folder: Path, taken: Collection[str] = ()) -> Skeleton:
    """The artifact's model on the meta device. Raises BadInput for a config of which transformers builds none.

    Of a family that transformers does not have, what the names on disk tell. taken: linears of it, by on-disk name.
    """
    if is_unknown(artifact.config):
        return ByName(artifact, device=torch.device("meta"), chosen=taken.__contains__)
    try:
        return Skeleton(artifact, device=torch.device("meta"))
    except BadInput:
        raise
    except Exception as error:  # whatever a config makes transformers raise
        said = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{folder / 'config.json'}: no model can be built of it: {type(error).__name__}: {said}"
        ) from error


def at_once(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterable[_R]:
    """What `work` returns for each item, in order, a few at a time."""
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, items)


def _shapes(artifact: Artifact, linears: list[LinearLayer]) -> Iterator[tuple[str, str]]:
    """(linear, problem) of each quantized linear whose shape is not the model's."""
    for x in linears:
        shape = artifact.shapes.get(x.name)
        if shape is not None and shape != (x.out_features, x.in_features):
            yield x.name, f"{x.name}: stored as {list(shape)} where the model has {[x.out_features, x.in_features]}"


def _plain(artifact: Artifact, skeleton: Skeleton) -> Iterator[str]:
    """Every parameter that is not quantized exists, has the model's shape, is finite, and switches nothing off."""
    heads = {f"{head}.weight" for head in skeleton.head_names()}
    there: list[tuple[str, str, tuple[int, ...]]] = []
    for name, parameter in skeleton.model.named_parameters():
        disk = skeleton.disk_name(name)
        if disk.removesuffix(".weight") in artifact.linears:
            continue
        if disk in skeleton.reader:
            there.append((name, disk, tuple(parameter.shape)))
        elif not (skeleton.tied and disk in heads):
            yield f"{disk} is missing" + (": the head is not tied to the embedding" if disk in heads else "")
    yield from filter(None, at_once(lambda one: _plain_problem(skeleton, *one), there))


def _plain_problem(skeleton: Skeleton, name: str, disk: str, wanted: tuple[int, ...]) -> str | None:
    shape, dtype = skeleton.reader.shape(disk), skeleton.reader.dtype(disk)
    if shape != wanted:
        return f"{disk}: shape {list(shape)} where the model has {list(wanted)}"
    if not dtype.is_floating_point:
        return f"{disk}: {_kind(dtype)} where a weight of the model is a float"
    values = skeleton.reader.read(disk)
    if not _finite(values):
        return f"{disk} holds NaN or inf"
    if name.endswith("weight") and not bool(values.any()) and _never_zero(skeleton, name):
        return f"{disk} is zero in all {values.numel()} places"
    return None


def _never_zero(skeleton: Skeleton, name: str) -> bool:
    """Whether a weight of zeros switches its module off: of embeddings and heads, and of norms that begin as ones."""
    module = skeleton.model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return True
    if "norm" not in type(module).__name__.lower():
        return name.rpartition(".")[0] in skeleton.head_modules()
    fresh = copy.deepcopy(module).to_empty(device="cpu")
    try:
        skeleton.model._init_weights(fresh)  # zeros for the families whose norms multiply by 1 + weight
    except Exception:  # how each class of transformers' begins is its own affair
        return False
    return bool((fresh.weight == 1).all())


@dataclass(frozen=True)
class _Checked:
    """What was found of a linear: problems, the stored tensors that are its own, its scales and their typical size."""

    name: str
    problems: list[str]
    claimed: set[str] = field(default_factory=set)
    overall: float | None = None
    size: float | None = None
    inputs: Inputs | None = None


def _checked(artifact: Artifact, name: str, may_be_zero: bool) -> _Checked:
    try:
        return _linear(artifact, name, may_be_zero)
    except BadInput as error:
        return _Checked(name, [str(error)])


def _linear(artifact: Artifact, name: str, may_be_zero: bool) -> _Checked:
    """The stored tensors of a quantized linear are those that its record packs to, of the same types.

    may_be_zero: whether it was rounded without any error, as a weight of zeros is.
    Raises BadInput as the format does where it unpacks them: for a wrong shape, for a scale that is one number and not
    positive.
    """
    assert artifact.format is not None
    record = artifact.linear(name)
    inputs = artifact.inputs(name)
    overall = None if record.global_scale is None else float(record.global_scale)
    size = typical(record)
    if wrong := list(impossible(name, record, may_be_zero)):
        claimed = {n for n in artifact.checkpoint.names() if n.startswith(f"{name}.")}
        return _Checked(name, wrong, claimed, overall, size, inputs)
    packed = FORMATS[artifact.format].pack(name, _writable(artifact.format, record, inputs))
    found = []
    for tensor_name, expected in packed.items():
        if tensor_name not in artifact.checkpoint:
            found.append(f"{tensor_name} is missing")
            continue
        dtype = artifact.checkpoint.dtype(tensor_name)
        if dtype != expected.dtype and not {dtype, expected.dtype} <= set(_ALIKE):
            found.append(f"{tensor_name}: {_kind(dtype)} where {_kind(expected.dtype)} is read")
    return _Checked(name, found, set(packed), overall, size, inputs)


def _writable(format: str, record: QuantizedLinear, inputs: Any) -> QuantizedLinear:
    """The record in a form that `pack` accepts; only the names and types of its result are used."""
    grid = record.grid
    if format == "gptq-v1-asymmetric":
        grid = grid.model_copy(update={"symmetric": True})
    scales = record.scales
    if grid.type == "int" and scales.dtype == torch.float32:
        scales = torch.ones_like(scales)  # whether float16 can hold the scales is not the question here
    return replace(record, grid=grid, scales=scales, inputs=inputs)


def _fused(artifact: Artifact, checked: Sequence[_Checked]) -> Iterator[str]:
    """Where servers make one linear of several, nvfp4's global scales and static input scales are the same."""
    overall = {one.name: one.overall for one in checked if one.overall is not None}
    inputs = {one.name: one.inputs for one in checked if one.inputs is not None}
    yield from unlike_parts(overall, inputs, any(g.type == "nvfp4" for g in artifact.linears.values()))


def _left_out(artifact: Artifact, skeleton: Skeleton, linears: list[LinearLayer]) -> Iterator[str]:
    """The config leaves out exactly the layers that are in 16 bit on disk, under the names that loaders compare."""
    assert artifact.format is not None
    stated = artifact.config["quantization_config"]
    format = FORMATS["gptq" if artifact.format.startswith("gptq") else artifact.format]
    schemes = {x.name: artifact.linears.get(x.name) for x in linears}
    outside = skeleton.unquantized_modules(but=artifact.linears)
    spec = ModelScheme(
        skeleton.by_all_names(schemes), outside, artifact.scattered, artifact.activations, artifact.kv_cache
    )
    names = [*schemes, *outside]
    wanted, said = format.grids(format.config(spec), names), format.grids(stated, names)
    unknown = is_unknown(artifact.config)
    family = f" (model_type {artifact.config.get('model_type')!r}, unknown to transformers)" if unknown else ""
    for name in names:
        if wanted.get(name) is None and said.get(name) is not None:
            near = difflib.get_close_matches(name, _strings(stated), n=1, cutoff=0.6)
            hint = f"; the nearest entry is {near[0]!r}" if near else ""
            yield f"{name} is in 16 bit, and config.json{family} does not leave it out{hint}"


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
    """Tensors that belong to no layer: servers refuse to load them, or take them in the place of others."""
    own = {skeleton.disk_name(name) for name, _ in skeleton.model.named_parameters()}
    own |= {skeleton.disk_name(name) for name, _ in skeleton.model.named_buffers()}
    own |= {f"{head}.weight" for head in skeleton.head_names()} | skeleton.on_disk_of_blocks()
    own |= set(skeleton.tower_tensors())
    manifest = own_manifest(artifact.checkpoint.folder)
    own |= set() if manifest is None else set(manifest.kept)
    broken = {name for name in artifact.linears if not any(c.startswith(f"{name}.") for c in claimed)}
    for name in artifact.checkpoint.names():
        linear, _, last = name.rpartition(".")
        if name in claimed or linear in broken or name.endswith(_LEFT_BY_OLD_TOOLS):
            continue
        if linear in artifact.linears and last == "weight":
            yield f"{name} is on disk, and {linear} is quantized: loaders differ in which of the two they take"
        elif name not in own:
            layer = f"{linear} is not quantized" if f"{linear}.weight" in own else "the model has no such parameter"
            yield f"{name} is on disk, and {layer}"


def _hidden(folder: Path) -> Iterator[str]:
    """Tensors in the files of weights that the index does not name there: some loaders take all that they find."""
    if not (folder / INDEX).is_file():
        return
    shard_of: dict[str, str] = read_json(folder / INDEX)["weight_map"]
    for shard in sorted(set(shard_of.values())):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if shard_of.get(name) != shard:
                    yield f"{folder / shard}: {name} is in the file, and {INDEX} does not say so"


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
