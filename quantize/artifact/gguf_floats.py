"""A checkpoint, or an artifact dequantized, as a GGUF file of floats; and such a file rounded."""

from collections.abc import Callable
from pathlib import Path

from ..core.errors import BadInput
from ..core.files import expanded
from ..gguf.conversion import Conversion, FloatType
from ..gguf.requantized import requantize
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


def write_rounded(
    model: str,
    target: Path,
    file_type: str,
    imatrix: Path | None = None,
    split_bytes: int | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, all: None,
) -> list[Path]:
    """Round the GGUF file of floats that `model` names, of whatever architecture; see `requantize`."""
    source = expanded(model)
    if source.suffix.lower() != ".gguf" or not source.is_file():
        raise BadInput(f"--type {file_type}: only a .gguf file of floats is rounded as it is; for {model} run a recipe")
    return requantize(source, target, file_type, imatrix, split_bytes, on_tensor)


def _conversion(folder: Path) -> Conversion:
    artifact = Artifact(folder)
    if artifact.format is None and isinstance(artifact.checkpoint, Checkpoint):
        return Conversion(artifact.checkpoint, folder)
    conversion = Conversion(artifact, folder)
    artifact.transposed = frozenset(x.name for x in conversion.skeleton.linears() if x.transposed)
    return conversion
