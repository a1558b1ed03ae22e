"""A checkpoint, or an artifact dequantized, as a GGUF file of floats."""

from collections.abc import Callable
from pathlib import Path

from ..gguf.conversion import Conversion, FloatType
from ..gguf.writer import write
from ..models.checkpoint import Checkpoint
from .artifact import Artifact


def write_floats(
    folder: Path,
    target: Path,
    kind: FloatType = "F16",
    split_bytes: int | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the model in `folder` as the GGUF file `target`, or as parts of it; returns the files written.

    on_note: told beforehand of what the file cannot hold. Raises BadInput for a model that cannot be written.
    """
    conversion = _conversion(folder)
    for note in conversion.notes:
        on_note(note)
    return write(target, conversion.file_type(kind), conversion.tensors(kind), split_bytes)


def _conversion(folder: Path) -> Conversion:
    artifact = Artifact(folder)
    if artifact.format is None and isinstance(artifact.checkpoint, Checkpoint):
        return Conversion(artifact.checkpoint, folder)
    conversion = Conversion(artifact, folder)
    artifact.transposed = frozenset(x.name for x in conversion.skeleton.linears() if x.transposed)
    return conversion
