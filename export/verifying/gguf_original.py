"""A GGUF file against the model it was made from: each parameter as the file gives it back, and its metadata."""

from collections.abc import Iterator
from pathlib import Path

import torch

from quantpress.artifact.manifest import own_manifest
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.gguf.conversion import Conversion
from quantpress.gguf.reader import LAYOUT, GgufCheckpoint, open_gguf
from quantpress.models.skeleton import Skeleton
from quantpress.recipe.gguf_file import FLOATS

from .gguf_file import unlike_metadata
from .tensors import at_once

# What a tensor may lose of its power as a whole, and in its worst row, by bits a weight in the file.
_LOSSES = ((3.0, 0.65, 0.95), (4.0, 0.4, 0.9), (5.0, 0.2, 0.6), (6.0, 0.12, 0.5), (7.5, 0.1, 0.4), (99.0, 0.08, 0.35))
_FLOAT_LOSS = {"F32": 1e-12, "F16": 1e-6, "BF16": 3e-5}  # a changed form (squared, exponentiated) is rounded once


def gguf_problems(folder: Path, original: Path) -> tuple[list[str], int]:
    """A line for each parameter and metadata key that is not the original's, and how many parameters were compared."""
    artifact, source = GgufCheckpoint(folder), OriginalCheckpoint(original)
    skeleton = Skeleton(source, device=torch.device("meta"))
    found: list[str] = []
    if not (folder / LAYOUT).is_file():
        found += _metadata(folder, artifact, source, original)
    towers = set(skeleton.tower_tensors())
    names = [name for name in skeleton.parameters_on_disk() if name not in towers and artifact.holds(name)]
    found += filter(None, at_once(lambda name: _unlike(artifact, skeleton, name), names))
    return found, len(names)


def _metadata(folder: Path, artifact: GgufCheckpoint, source: OriginalCheckpoint, original: Path) -> Iterator[str]:
    said = {key: value.contents() for key, value in open_gguf(artifact.tensors.files[0]).fields.items()}
    try:
        wanted = Conversion(source, original).metadata
    except BadInput as error:
        yield f"{original}: makes no GGUF file: {error}"
        return
    yield from unlike_metadata(folder, wanted, said, strict=own_manifest(folder) is not None, whose="the original")


def _unlike(artifact: GgufCheckpoint, skeleton: Skeleton, name: str) -> str | None:
    wanted, found = skeleton.reader.read(name).to(torch.float32), artifact.read(name)
    if wanted.shape != found.shape:
        return f"{name}: shape {list(found.shape)} in the file, and the original has {list(wanted.shape)}"
    stored = artifact.tensors.stored(artifact.entry(name).name)
    kind = stored.tensor_type.name
    off, power = (found - wanted).square_(), wanted.square()
    whole = float(off.sum() / power.sum().clamp(min=1e-30))
    if kind in FLOATS:
        return None if whole <= _FLOAT_LOSS[kind] else f"{name} is not the original's: it differs by {whole:.2g}"
    bits = 8 * int(stored.n_bytes) / int(stored.n_elements)
    most, most_row = next((whole, row) for below, whole, row in _LOSSES if bits < below)
    rows = off.flatten(1).sum(1) / power.flatten(1).sum(1).clamp_(min=0.02 * float(power.mean()) * off[0].numel())
    worst = int(rows.argmax())
    if whole <= most and float(rows[worst]) <= most_row:
        return None
    where, value = ("", whole) if whole > most else (f"in row {worst}, ", float(rows[worst]))
    return f"{name}: {where}its weights are off the original's by {value:.3g} of their power, too much for {kind}"
