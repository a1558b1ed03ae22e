"""The artifact folder put together from the parts that blocks left, and what its manifest says."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.convert import convert
from ..artifact.manifest import SCHEMA, BlockRecord, CalibrationText, Manifest, Origin, Sizes
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.files import move_whole, write_json
from ..formats import FORMATS
from ..models.checkpoint import Checkpoint, copy_companions, merge_parts, write_part
from .job import Job, Settings
from .journal import Journal


def describe(job: Job, files: dict[str, str], tokens: Tokens | None, done: Sequence[BlockRecord] = ()) -> Manifest:
    """What `quantized/manifest.json` says: all that is the same each time the same run is made.

    done: what the journal has of each block.
    """
    layers = tuple(layer for block in done for layer in block.layers)
    transforms = tuple(record for block in done for record in block.transforms)
    notes = [(record.feed, record.note) for record in transforms]
    notes += [(layer.name, layer.note) for layer in layers]
    source, wanted = job.source, job.recipe.calibration
    packages = ("torch", "transformers", "safetensors", "compressed-tensors", "tokenizers")
    return Manifest(
        schema=SCHEMA,
        name=job.recipe.name,
        model=Origin(id=source.id, kind=source.kind, revision=source.revision, caveat=source.caveat, files=files),
        recipe=job.recipe.model_dump(mode="json"),
        quantpress=version("quantpress"),
        versions={name: version(name) for name in packages} | {"python": machine.python_version()},
        calibration=None
        if tokens is None
        else CalibrationText(
            source=tokens.source,
            sha256=tokens.sha256,
            bos=tokens.bos,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            tokens=tokens.ids.numel(),
        ),
        seed=wanted.seed,
        error_measure="output" if tokens is not None else "weight",
        transforms=transforms,
        layers=layers,
        fallbacks=(*job.plan.notes, *(f"{name}: {note}" for name, note in notes if note)),
    )


def assemble(job: Job, journal: Journal, settings: Settings, manifest: Manifest, parts: list[Path]) -> Manifest:
    """Put the parts together beside the final place, then rename: an artifact is never visible half written.

    Returns the manifest with the artifact's sizes and the formats it was converted to.
    """
    partial, final = settings.out / "quantized.partial", settings.out / "quantized"
    shutil.rmtree(partial, ignore_errors=True)
    if not final.exists():
        partial.mkdir(parents=True)
        shell = _shell_tensors(job)
        write_part(journal.folder / "shell.safetensors", shell)
        merge_parts([journal.folder / "shell.safetensors", *parts], partial)
        format = FORMATS[job.recipe.formats[0]]
        quantization = format.config(job.contents)
        config = dict(job.reader.config) | {"quantization_config": quantization}
        write_json(partial / "config.json", config)
        for name, content in format.extra_files(quantization).items():
            write_json(partial / name, content)
        copy_companions(job.source.path, partial)
        manifest = manifest.changed(artifact=_sizes(job, partial))
        manifest.write(partial)
        move_whole(partial, final)
    else:  # a run was stopped between here and its own manifest
        manifest = manifest.changed(artifact=_sizes(job, final))
    for name in job.recipe.formats[1:]:
        target = settings.out / "converted" / name
        if not target.exists():
            convert(final, target, name)
    return manifest.changed(converted=job.recipe.formats[1:])


def _shell_tensors(job: Job) -> dict[str, Tensor]:
    """The tensors outside the blocks; a head that is tied and equal to the embedding is stored once."""
    inside = {disk for k in range(job.skeleton.n_blocks) for disk in job.skeleton.block_names(k).values()}
    names = [name for name in job.reader.names() if name not in inside]
    tensors = {name: job.reader.read(name) for name in names}
    if job.reader.config.get("tie_word_embeddings", getattr(job.skeleton.config, "tie_word_embeddings", False)):
        for head in job.skeleton.heads():
            twin = tensors.get(f"{head}.weight")
            if twin is not None and any(n != f"{head}.weight" and torch.equal(t, twin) for n, t in tensors.items()):
                del tensors[f"{head}.weight"]
    return tensors


def _sizes(job: Job, folder: Path) -> Sizes:
    """Bytes on disk and true bits per weight, scales and zeros counted."""
    artifact = Checkpoint(folder)
    quantized = [x for x in job.linears if job.schemes[x.name] is not None]
    weights = sum(x.out_features * x.in_features for x in quantized)
    packed = {f"{x.name}.{suffix}" for x in quantized for suffix in FORMATS[job.recipe.formats[0]].suffixes}
    stored = sum(artifact.nbytes(n) for n in artifact.names() if n in packed)
    return job.sizes(job.recipe.formats[0], artifact, stored, weights)
