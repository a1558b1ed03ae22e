"""A recipe with format gguf, from the checkpoint to `quantized/model.gguf`."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import torch
from gguf import GGMLQuantizationType

from ..calibration import Tokens, open_tokenizer
from ..checkpoint import Checkpoint, copy_companions
from ..errors import BadInput
from ..files import write_json
from ..grid import Grid
from ..model import Linear
from ..plan import PROCESS_BYTES, Plan, make_plan
from ..recipe import LlamaCppQuantizer, Recipe
from ..recipe.gguf import FLOATS
from . import imatrix, llama_cpp, rounding
from .convert import Conversion, FloatType
from .layout import Entry, float_type
from .modelfile import modelfile
from .reader import GgufCheckpoint, GgufTensors
from .writer import sizes, tensor_bytes, write

if TYPE_CHECKING:
    from ..job import Job, Settings

_BASE = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}  # the type most tensors of a mix have
_FELL_BACK = re.compile(r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\S+)\)")


def check(recipe: Recipe, checkpoint: Checkpoint) -> Conversion:
    """Raise BadInput for a model, tokenizer, pattern or tool that this recipe cannot be run with."""
    wanted = recipe.gguf_file
    conversion = Conversion(checkpoint, checkpoint.folder)
    if isinstance(recipe.method, LlamaCppQuantizer) and wanted.type not in FLOATS:
        llama_cpp.library()
    _tensor_types(recipe, conversion.entries)
    if isinstance(wanted.imatrix, str):
        imatrix.fitted(imatrix.load(Path(wanted.imatrix)), conversion.entries, wanted.imatrix)
    return conversion


def schemes(recipe: Recipe, conversion: Conversion, linears: list[Linear]) -> dict[str, Grid | None]:
    """The grid of each linear where our own methods round it; None for each where llama.cpp does."""
    if isinstance(recipe.method, LlamaCppQuantizer):
        return {linear.name: None for linear in linears}
    return rounding.schemes(recipe, conversion.entries, linears, rounding.types(recipe, conversion))


def with_types(job: "Job", tokens: Tokens | None) -> "Job":
    """The job with the types that its budget allows; as it is where it has none."""
    if job.recipe.gguf_file.budget is None:
        return job
    assert tokens is not None
    conversion = Conversion(job.checkpoint, job.source.path)
    chosen = rounding.within_budget(job, conversion, rounding.types(job.recipe, conversion), tokens)
    grids = rounding.schemes(job.recipe, conversion.entries, job.linears, chosen)
    return replace(job, schemes=grids, gguf_types=chosen)


def plan(recipe: Recipe, conversion: Conversion, linears: list[Linear], grids: dict[str, Grid | None]) -> Plan:
    """What the run needs. What llama.cpp makes is an estimate in bytes: every matrix in the type most of them get."""
    wanted, checkpoint = recipe.gguf_file, conversion.reader
    assert isinstance(checkpoint, Checkpoint)
    if not isinstance(recipe.method, LlamaCppQuantizer):
        chosen = rounding.types(recipe, conversion)
        artifact = rounding.allowed(recipe, conversion) or sum(rounding.file_sizes(recipe, conversion, chosen))
        own = make_plan(recipe, conversion.skeleton, linears, grids)
        notes = (*conversion.notes, *_summed_up(rounding.notes(conversion, chosen)))
        return replace(own, artifact_bytes=artifact, original_bytes=checkpoint.total_bytes, notes=notes)
    kinds = {entry.name: _usual_type(wanted.type, entry) for entry in conversion.entries}
    artifact = sum(tensor_bytes(entry.shape, kinds[entry.name]) for entry in conversion.entries)
    original = checkpoint.total_bytes
    if wanted.type in FLOATS:
        kind = cast(FloatType, wanted.type)
        artifact = sum(sizes(conversion.file_type(kind), conversion.tensors(kind), wanted.split))
    largest = max(sum(checkpoint.nbytes(name) for name in entry.parameters) for entry in conversion.entries)
    memory, operations = PROCESS_BYTES + 6 * largest, 0.0
    if recipe.calibrated:
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        width = conversion.config.hidden_size
        memory += 2 * original // max(1, conversion.skeleton.n_blocks) + 4 * tokens * width
        operations = 2.0 * tokens * sum(x.in_features * x.out_features for x in linears)
    intermediate = 0 if wanted.type in FLOATS else original
    return Plan(
        layers={x.name: wanted.type for x in linears},
        original_bytes=original,
        artifact_bytes=artifact,
        memory_bytes=memory,
        disk_bytes=artifact + intermediate,
        operations=operations,
        seconds=original / 2e7 if wanted.type not in FLOATS else original / 2e8,
        passes=1 if recipe.calibrated else 0,
        notes=conversion.notes,
    )


def make(
    job: "Job", manifest: dict[str, Any], tokens: Tokens | None, settings: "Settings", parts: list[Path] | None = None
) -> dict[str, Any]:
    """Write `out/quantized`: model.gguf, the files that tell eval what model it is, and the manifest; returns that.

    `manifest` is what is known before: layers, fallbacks and artifact are filled in here. `parts` hold the blocks
    where they are rounded already, by our own methods; else llama.cpp quantizes.
    """
    work, partial = settings.out / ".work", settings.out / "quantized.partial"
    for folder in (work, partial) if parts is None else (partial,):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    conversion = Conversion(job.checkpoint, job.source.path)
    conversion.metadata["general.name"] = job.source.id.rpartition("/")[2]
    if parts is None:
        said = _write(job, conversion, tokens, work, partial, settings)
    else:
        chosen = job.gguf_types or rounding.types(job.recipe, conversion)
        rounding.save(job, conversion, chosen, parts, partial / "model.gguf")
    write_json(partial / "config.json", job.checkpoint.config)
    copy_companions(job.source.path, partial)
    artifact = GgufCheckpoint(partial)
    stored, about = artifact.tensors, _write_modelfile(job, conversion, artifact.tensors.files, partial)
    notes = _fallbacks(said, stored) if parts is None else rounding.notes(conversion, chosen)
    layers = _layers(job, conversion.entries, stored, notes)
    if parts is not None:  # the blocks' records say more
        layers = [there | here for there, here in zip(layers, manifest["layers"], strict=True)]
    manifest = manifest | {"layers": layers, "converted": []}
    manifest["fallbacks"] = [*conversion.notes, *_summed_up(notes), *about]
    manifest["artifact"] = _sizes(job, artifact, conversion.entries)
    write_json(partial / "manifest.json", manifest)
    partial.rename(settings.out / "quantized")
    return manifest


def _write(
    job: "Job", conversion: Conversion, tokens: Tokens | None, work: Path, folder: Path, settings: "Settings"
) -> str:
    """Write model.gguf into `folder`; returns what llama.cpp said."""
    from ..job import Progress

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
    importance = _importance(job, conversion, tokens, folder, settings)
    plain = work / "model.gguf"
    kind = _exact_type(job.checkpoint)
    parts = write(plain, conversion.file_type(kind), conversion.tensors(kind), wanted.split)
    asked = llama_cpp.Quantization(
        wanted.type, _tensor_types(job.recipe, conversion.entries), importance, method.threads, split=len(parts) > 1
    )
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


def _importance(
    job: "Job", conversion: Conversion, tokens: Tokens | None, folder: Path, settings: "Settings"
) -> dict[str, imatrix.Array] | None:
    wanted = job.recipe.gguf_file.imatrix
    if wanted is False:
        return None
    if isinstance(wanted, str):
        return imatrix.fitted(imatrix.load(Path(wanted)), conversion.entries, wanted)
    assert tokens is not None
    found = settings.shared.importance(job, tokens, lambda: imatrix.measure(job.skeleton, conversion.entries, tokens))
    imatrix.save(folder / "imatrix.gguf", found, tokens.source, tokens.ids.shape[1])
    return imatrix.fitted(found, conversion.entries, "of the calibration text")


def _tensor_types(recipe: Recipe, entries: list[Entry]) -> tuple[tuple[str, str], ...]:
    """The tensors with a type of their own, each by an expression that only its name matches.

    Raises BadInput for a pattern that matches no matrix.
    """
    from ..recipe import matches

    matrices = [entry.name for entry in entries if entry.matrix]
    chosen: dict[str, str] = {}
    for pattern, kind in recipe.gguf_file.tensor_types.items():
        found = [name for name in matrices if matches(pattern, name)]
        if not found:
            raise BadInput(
                f"gguf.tensor_types: {pattern!r} matches no matrix of the file; names are such as "
                f"{', '.join(matrices[:3])}"
            )
        for name in found:
            chosen.setdefault(name, kind)
    return tuple((f"^{re.escape(name)}$", kind) for name, kind in chosen.items())


def _usual_type(file_type: str, entry: Entry) -> GGMLQuantizationType:
    """The type an entry most likely gets."""
    if not entry.matrix:
        return GGMLQuantizationType.F32
    name = _BASE.get(file_type, re.sub(r"_[SML]$", "", file_type) if "_K_" in file_type else file_type)
    kind = GGMLQuantizationType[name]
    if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.Q8_0
    fits = entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else float_type(entry, GGMLQuantizationType.F16)


def _fallbacks(said: str, stored: GgufTensors) -> dict[str, str]:
    """Tensors whose rows are not whole blocks of the type they were to get: why, and what they got."""
    notes = {}
    for name, columns, block, kind in _FELL_BACK.findall(said):
        if name in stored:
            got = stored.stored(name).tensor_type.name
            notes[name] = f"rows of {columns} are not whole blocks of {block}: {kind.upper()} -> {got}"
    return notes


def _summed_up(notes: Mapping[str, str]) -> list[str]:
    """One line for all the tensors with the same note."""
    kinds: dict[str, list[str]] = {}
    for name, note in notes.items():
        kinds.setdefault(note, []).append(re.sub(r"^blk\.\d+", "blk.*", name))
    return [f"{len(names)} tensors ({', '.join(dict.fromkeys(names))}): {note}" for note, names in kinds.items()]


def _layers(job: "Job", entries: list[Entry], stored: GgufTensors, notes: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the manifest says of each linear."""
    of = {parameter: entry for entry in entries for parameter in entry.parameters}
    layers = []
    for linear in job.linears:
        entry = of[f"{linear.name}.weight"]
        kind = stored.stored(entry.name).tensor_type
        block, size = gguf.GGML_QUANT_SIZES[kind]
        layers.append(
            {"name": linear.name, "block": linear.block, "shape": [linear.out_features, linear.in_features]}
            | {"bits": 8 * size / block, "group_size": block, "symmetric": None, "scheme": kind.name, "loss": None}
            | {
                "relative_error": None,
                "damp": None,
                "tokens": None,
                "note": notes.get(entry.name),
                "tensor": entry.name,
            }
        )
    return layers


def _sizes(job: "Job", artifact: GgufCheckpoint, entries: list[Entry]) -> dict[str, Any]:
    """Bytes of the tensors, and true bits per weight."""
    linears = {f"{linear.name}.weight" for linear in job.linears}
    own = [entry for entry in entries if entry.parameters[0] in linears]
    weights = sum(math.prod(entry.shape) for entry in own)
    packed = sum(int(artifact.tensors.stored(entry.name).n_bytes) for entry in own)
    return job.sizes("gguf", artifact, packed, weights) | {"llama.cpp": _version()}


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None
