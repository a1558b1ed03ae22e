"""What the manifest of a run says before the artifact is put together."""

from collections.abc import Sequence
from importlib.metadata import version

from ..artifact.manifest import SCHEMA, BlockRecord, CalibrationText, Manifest, Origin
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.plugins import packages
from ..methods.layer_error import common_measure
from ..recipe import Calibration
from .end_to_end import Trained
from .job import Job

_PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "tokenizers")


def describe(
    job: Job, files: dict[str, str], tokens: Tokens | None, done: Sequence[BlockRecord], trained: Trained
) -> Manifest:
    """Everything that is the same each time the same run is made: no times, nothing of the machine.

    files: sha256 of the original's files. done: the journal's line for each block.
    """
    layers = tuple(layer.changed(**trained.errors.get(layer.name, {})) for block in done for layer in block.layers)
    transforms = tuple(record for block in done for record in block.transforms)
    notes = [(record.feed, record.note) for record in transforms]
    notes += [(layer.name, layer.note) for layer in layers]
    source = job.source
    manifest = Manifest(
        schema=SCHEMA,
        name=job.recipe.name,
        model=Origin(id=source.id, kind=source.kind, revision=source.revision, caveat=source.caveat, files=files),
        recipe=job.recipe.model_dump(mode="json"),
        quantpress=version("quantpress"),
        versions={name: version(name) for name in _PACKAGES} | {"python": machine.python_version()} | packages(),
        calibration=None if tokens is None else _calibration(tokens, job.recipe.calibration),
        seed=job.recipe.calibration.seed,
        error_measure=common_measure(layer.error_measure for layer in layers),
        transforms=transforms,
        layers=layers,
        fallbacks=tuple(f"{name}: {note}" for name, note in notes if note),
    )
    return manifest if trained.summary is None else manifest.changed(end_to_end=trained.summary)


def _calibration(tokens: Tokens, wanted: Calibration) -> CalibrationText:
    return CalibrationText(
        source=tokens.source,
        sha256=tokens.sha256,
        bos=tokens.bos,
        samples=wanted.samples,
        seq_len=wanted.seq_len,
        tokens=tokens.ids.numel(),
    )
