"""A recipe with format gguf, from the checkpoint to `quantized/model.gguf`."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import gguf
import torch
from safetensors.torch import load_file

from ..artifact.manifest import LayerRecord, Manifest, Sizes
from ..calibrate.tokens import Tokens, open_tokenizer
from ..core.errors import BadInput
from ..core.files import file_sha256, move_whole, write_json
from ..engine.sources import Source
from ..models.checkpoint import Checkpoint, copy_companions
from ..models.skeleton import Linear
from ..numbers.grid import Grid
from ..recipe import LlamaCppQuantizer, Recipe
from ..recipe.gguf_file import FLOATS
from . import imatrix
from . import llama_cpp_library as llama_cpp
from . import rounded_file as rounding
from .conversion import Conversion, FloatType
from .layout import Entry
from .mixes import Choice
from .modelfile import modelfile
from .planning import summed_up
from .reader import GgufCheckpoint, GgufTensors
from .tensor_types import fallbacks, our_types, own_types
from .writer import write

if TYPE_CHECKING:
    from ..engine.job import Job, Settings

_IMATRIX = "imatrix.gguf"
_FELL_BACK = re.compile(r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\S+)\)")


def check(recipe: Recipe, checkpoint: Checkpoint, source: Source) -> Conversion:
    """Raise BadInput for a model, tokenizer, pattern or tool that this recipe cannot be run with."""
    wanted = recipe.gguf_file
    conversion = _conversion(checkpoint, source)
    if isinstance(recipe.method, LlamaCppQuantizer) and wanted.type not in FLOATS:
        llama_cpp.library()
    own_types(recipe, conversion.entries)
    if isinstance(wanted.imatrix, str) and recipe.method.calibrated:
        given, outside = _given(recipe, conversion), conversion.outside()
        if not any(entry.name in given for entry in outside):
            raise BadInput(
                f"gguf.imatrix {wanted.imatrix}: gptq rounds the blocks by their own second moments, and of what is "
                f"outside of them ({', '.join(entry.name for entry in outside)}) the file has nothing; drop it, or "
                "make it with llama-imatrix --process-output"
            )
    return conversion


def _conversion(checkpoint: Checkpoint, source: Source) -> Conversion:
    return Conversion(checkpoint, source.path, source.id.rpartition("/")[2])


def _given(recipe: Recipe, conversion: Conversion) -> dict[str, imatrix.Array]:
    """What the recipe's file says of the model's tensors; empty without one."""
    file = recipe.gguf_file.imatrix
    return imatrix.fitted(imatrix.load(Path(file)), conversion.entries, file) if isinstance(file, str) else {}


def imatrix_sha256(recipe: Recipe) -> str | None:
    """Of the importance matrix that the recipe names, None where it names none."""
    file = recipe.gguf_file.imatrix
    return file_sha256(Path(file)) if recipe.is_gguf and isinstance(file, str) else None


def _without_importance(recipe: Recipe, conversion: Conversion, stored: GgufTensors) -> dict[str, str]:
    """The quantized tensors that a given matrix says nothing of; a lookup multiplies nothing, and has no importance."""
    if not isinstance(recipe.gguf_file.imatrix, str):
        return {}
    given, names = _given(recipe, conversion), {entry.name for entry in conversion.entries}
    asked = conversion.outside() if recipe.method.calibrated else conversion.entries
    return {
        entry.name: f"nothing in {recipe.gguf_file.imatrix}: rounded with all columns alike"
        for entry in asked
        if entry.matrix
        and entry.name not in given
        and stored.stored(entry.name).tensor_type.name not in FLOATS
        and not (entry.name == "token_embd.weight" and "output.weight" in names)
    }


def importance(recipe: Recipe, conversion: Conversion) -> dict[str, torch.Tensor]:
    """Mean squares [in] of what linears get, from a file, for those that are rounded to nearest by them."""
    given = _given(recipe, conversion)
    ours = not recipe.method.calibrated and not isinstance(recipe.method, LlamaCppQuantizer)
    return imatrix.of_linears(given, conversion.entries) if ours else {}


def schemes(recipe: Recipe, conversion: Conversion, linears: list[Linear]) -> dict[str, Grid | None]:
    """The grid of each linear where our own methods round it; None for each where llama.cpp does."""
    if isinstance(recipe.method, LlamaCppQuantizer):
        return {linear.name: None for linear in linears}
    return rounding.schemes(recipe, conversion.entries, linears, our_types(recipe, conversion))


def with_types(job: "Job", tokens: Tokens | None, work: Path) -> "Job":
    """The job with the types that its budget allows, as it is where it has none; found once, `work` keeps them."""
    if job.recipe.gguf_file.budget is None:
        return job
    assert tokens is not None
    conversion = _conversion(job.checkpoint, job.source)
    chosen, kept = our_types(job.recipe, conversion), work / "types.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        chosen = {name: None if found[name] is None else Choice(found[name]) for name in chosen}
    else:
        chosen = rounding.within_budget(job, conversion, chosen, tokens, work)
        write_json(kept, {name: None if choice is None else choice.type for name, choice in chosen.items()})
    grids = rounding.schemes(job.recipe, conversion.entries, job.linears, chosen)
    return replace(job, schemes=grids, gguf_types=chosen)


def make(
    job: "Job", manifest: Manifest, tokens: Tokens | None, settings: "Settings", parts: list[Path] | None = None
) -> Manifest:
    """Write `out/quantized`: model.gguf, the files that tell eval what model it is, and the manifest; returns that.

    `manifest` is what is known before: layers, fallbacks and artifact are filled in here. `parts` hold the blocks
    where they are rounded already, by our own methods; else llama.cpp quantizes.
    """
    work, partial = settings.out / ".work", settings.out / "quantized.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    conversion = _conversion(job.checkpoint, job.source)
    if parts is None:
        said = _write(job, conversion, tokens, work, partial, settings)
    else:
        chosen = job.gguf_types or our_types(job.recipe, conversion)
        given = _given(job.recipe, conversion)
        if job.weighs_head:
            given[imatrix.head_of(conversion.entries)] = load_file(parts[-1])[imatrix.HEAD_IMPORTANCE][None].numpy()
        rounding.save(job, conversion, chosen, parts, partial / "model.gguf", given)
    write_json(partial / "config.json", job.checkpoint.config)
    copy_companions(job.source.path, partial)
    artifact = GgufCheckpoint(partial)
    stored, about = artifact.tensors, _write_modelfile(job, conversion, artifact.tensors.files, partial)
    notes = _fallbacks(said, stored) if parts is None else fallbacks(conversion, chosen)
    unknown = _without_importance(job.recipe, conversion, stored)
    layers = _layers(job, conversion.entries, stored, notes)
    if parts is not None:  # the blocks' records say more
        layers = [
            there.changed(**{key: value for key, value in here.document().items() if key != "shape"})
            for there, here in zip(layers, manifest.layers, strict=True)
        ]
    manifest = manifest.changed(
        layers=tuple(layers),
        converted=(),
        fallbacks=(*conversion.notes, *summed_up(notes), *summed_up(unknown), *about),
        imatrix=imatrix_sha256(job.recipe),
        artifact=_sizes(job, artifact, conversion.entries),
    )
    manifest.write(partial)
    shutil.rmtree(settings.out / "quantized", ignore_errors=True)  # of a run that was killed before it was on record
    move_whole(partial, settings.out / "quantized")
    return manifest


def _write(
    job: "Job", conversion: Conversion, tokens: Tokens | None, work: Path, folder: Path, settings: "Settings"
) -> str:
    """Write model.gguf into `folder`; returns what llama.cpp said.

    What goes before its quantizer, the importance matrix and the model in 16 bit, stays in `work` until the run ends: a
    run that was killed meanwhile takes them as they are.
    """
    from ..engine.job import Progress

    wanted, method = job.recipe.gguf_file, job.recipe.method
    assert isinstance(method, LlamaCppQuantizer)
    blocks, told = conversion.skeleton.n_blocks, 0

    def tell(done: int, of: int) -> None:
        """Tensors done, in blocks, which is what progress is counted in."""
        nonlocal told
        if (now := done * blocks // of) > told:
            told = now
            settings.on_block(Progress(now, blocks, None, 0.0))

    if wanted.type in FLOATS:
        kind = cast(FloatType, wanted.type)
        tensors = conversion.tensors(kind)
        write(folder / "model.gguf", conversion.file_type(kind), tensors, wanted.split, lambda n: tell(n, len(tensors)))
        return ""
    importance = _importance(job, conversion, tokens, work, settings)
    if (work / _IMATRIX).exists():
        shutil.copy2(work / _IMATRIX, folder)
    parts = _converted(job, conversion, work)
    own = tuple((f"^{re.escape(name)}$", kind) for name, kind in own_types(job.recipe, conversion.entries).items())
    asked = llama_cpp.Quantization(wanted.type, own, importance, method.threads, split=len(parts) > 1)
    # With parts llama.cpp takes the name without its ending, and numbers them itself.
    target = folder / ("model" if len(parts) > 1 else "model.gguf")
    return llama_cpp.quantize(parts[0], target, asked, tell)


def _write_modelfile(job: "Job", conversion: Conversion, files: list[Path], folder: Path) -> list[str]:
    """Write Ollama's Modelfile; returns what there is to say about it."""
    if len(files) > 1:
        return ["no Modelfile: Ollama does not load a file in parts"]
    add_bos = bool(conversion.metadata["tokenizer.ggml.add_bos_token"])
    text, note = modelfile(files[0], open_tokenizer(job.source.path), conversion.config, add_bos)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return [note] if note else []


def _exact_type(checkpoint: Checkpoint) -> FloatType:
    """The float type that holds every tensor of the checkpoint without loss."""
    dtypes = {checkpoint.dtype(name) for name in checkpoint.names()}
    if dtypes <= {torch.bfloat16}:
        return "BF16"
    return "F16" if dtypes <= {torch.float16} else "F32"


def _converted(job: "Job", conversion: Conversion, work: Path) -> list[Path]:
    """The model in its checkpoint's float type, as one file or in parts; those of a killed run where they are whole."""
    done = work / "converted.json"
    if done.exists():
        before: dict[str, str] = json.loads(done.read_text(encoding="utf-8"))
        parts = [work / name for name in before]
        if all(part.exists() and file_sha256(part) == before[part.name] for part in parts):
            return parts
        done.unlink()
    kind = _exact_type(job.checkpoint)
    split = job.recipe.gguf_file.split
    parts = write(work / "model.gguf", conversion.file_type(kind), conversion.tensors(kind), split)
    write_json(done, {part.name: file_sha256(part) for part in parts})
    return parts


def _importance(
    job: "Job", conversion: Conversion, tokens: Tokens | None, work: Path, settings: "Settings"
) -> dict[str, imatrix.Array] | None:
    wanted = job.recipe.gguf_file.imatrix
    if wanted is False:
        return None
    if isinstance(wanted, str):
        return _given(job.recipe, conversion)
    assert tokens is not None
    file = work / _IMATRIX
    if not file.exists():
        found = settings.shared.importance(
            job, tokens, lambda: imatrix.measure(job.skeleton, conversion.entries, tokens)
        )
        imatrix.save(file, found, tokens.source, tokens.ids.shape[1])
    return imatrix.fitted(imatrix.load(file), conversion.entries, "of the calibration text")


def _fallbacks(said: str, stored: GgufTensors) -> dict[str, str]:
    """Tensors whose rows are not whole blocks of the type they were to get: why, and what they got."""
    notes = {}
    for name, columns, block, kind in _FELL_BACK.findall(said):
        if name in stored:
            got = stored.stored(name).tensor_type.name
            notes[name] = f"rows of {columns} are not whole blocks of {block}: {kind.upper()} -> {got}"
    return notes


def _layers(job: "Job", entries: list[Entry], stored: GgufTensors, notes: Mapping[str, str]) -> list[LayerRecord]:
    """What the manifest says of each linear."""
    of = {parameter: entry for entry in entries for parameter in entry.parameters}
    layers = []
    for linear in job.linears:
        entry = of[f"{linear.name}.weight"]
        kind = stored.stored(entry.name).tensor_type
        block, size = gguf.GGML_QUANT_SIZES[kind]
        layers.append(
            LayerRecord(
                name=linear.name,
                block=linear.block,
                shape=(linear.out_features, linear.in_features),
                bits=8 * size / block,
                group_size=block,
                symmetric=None,
                scheme=kind.name,
                loss=None,
                relative_error=None,
                damp=None,
                tokens=None,
                note=notes.get(entry.name),
                tensor=entry.name,
            )
        )
    return layers


def _sizes(job: "Job", artifact: GgufCheckpoint, entries: list[Entry]) -> Sizes:
    """Bytes of the tensors, and true bits per weight."""
    linears = {f"{linear.name}.weight" for linear in job.linears}
    own = [entry for entry in entries if entry.parameters[0] in linears]
    weights = sum(math.prod(entry.shape) for entry in own)
    packed = sum(int(artifact.tensors.stored(entry.name).n_bytes) for entry in own)
    return job.sizes("gguf", artifact, packed, weights).changed(llama_cpp=_version())


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None
