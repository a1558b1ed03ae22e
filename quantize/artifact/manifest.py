"""manifest.json: what a run says of the artifact it made, written and read by these classes alone.

`quantized/manifest.json` holds what is the same each time the same run is made. The run folder's own manifest.json adds
the machine, the time it took, and what each later stage (export, evaluation, smoke test) depended on and found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import BadInput
from ..core.files import write_json
from ..models.hub import near

MANIFEST = "manifest.json"
SCHEMA = 1


class Record(BaseModel):
    """A part of the manifest. Keys of other versions are kept as they are when it is written again."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def document(self) -> dict[str, Any]:
        """The JSON values to write: what was set, in the order of the fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def changed(self, **changes: Any) -> Self:
        """A copy in which these fields are otherwise."""
        return self.model_copy(update=changes)


class Origin(Record):
    """The original model: where it came from and the sha256 of its files."""

    id: str = ""
    kind: str = ""
    revision: str | None = None
    caveat: str | None = None
    files: dict[str, str] = {}


class CalibrationText(Record):
    """The text that calibration read: `samples` sequences of `seq_len` tokens."""

    source: str
    sha256: str
    bos: bool | None = None
    samples: int
    seq_len: int
    tokens: int


class LayerRecord(Record):
    """A linear layer, by its name on disk. shape: [out, in]; bits: of a code; scheme: the number type in words.

    relative_error: error over power of what error_measure says (methods/layer_error.py); loss: squared output error a
    calibration token; damp: the damping that GPTQ's Hessian needed; tokens: that calibration sent through it; tuning:
    losses before and after. dynamic: set where the scales of its inputs are and the recipe asks for static ones, of
    which none fits; tensor: its name in a GGUF file.
    """

    name: str
    block: int | None = None
    shape: tuple[int, ...] = ()
    bits: float
    group_size: int | None = None
    symmetric: bool | None = None
    scheme: str
    loss: float | None = None
    relative_error: float | None = None
    error_measure: str | None = None
    damp: float | None = None
    tokens: int | None = None
    note: str | None = None
    tuning: dict[str, Any] | None = None
    dynamic: bool | None = None
    tensor: str | None = None


class TransformRecord(Record):
    """What a transform did before a feed's linears were rounded; note: why nothing, where it did nothing."""

    block: int
    feed: str
    transform: str | None = None
    strength: float | None = None
    note: str | None = None
    error_before: float | None = None
    error_after: float | None = None


class ForwardCheck(Record):
    """The model block by block against transformers' whole model; difference: of states, relative to the largest."""

    compared: str
    difference: float | None = None


class BlockRecord(Record):
    """A finished decoder block, as the journal has it."""

    block: int
    seconds: float
    layers: tuple[LayerRecord, ...]
    transforms: tuple[TransformRecord, ...] = ()


class Sizes(Record):
    """The artifact on disk. bits_per_parameter counts what stays in 16 bit too; files: sha256 by name."""

    format: str = ""
    bytes: int = 0
    original_bytes: int = 0
    quantized_bits_per_weight: float = 0.0
    bits_per_parameter: float = 0.0
    parameters: int = 0
    files: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """sha256 of the names and hashes of all files: that of these bytes and no others."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    llama_cpp: str | None = Field(None, alias="llama.cpp")  # the version of llama-cpp-python


class MachineRecord(Record):
    """What the run ran on."""

    cpu: str = ""
    cores: int = 0
    device: str = ""
    memory_bytes: int = 0
    threads: int | None = None


class Timing(Record):
    """What quantizing took; peak_rss_bytes is the process's largest resident memory."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    per_block_seconds: tuple[float, ...] = ()


class StageRecord(Record):
    """A stage after the artifact: all that decided its outcome, what it found, and how long it took."""

    inputs: dict[str, Any]
    summary: dict[str, Any]
    seconds: float


class Manifest(Record):
    """manifest.json as it may be found: of this version, of an earlier one, or of a part of a run."""

    schema_: int | None = Field(None, alias="schema")
    name: str = ""
    model: Origin = Origin()
    recipe: dict[str, Any] = {}
    quantpress: str | None = None
    versions: dict[str, str] = {}
    calibration: CalibrationText | None = None
    seed: int = 0
    error_measure: str | None = None
    transforms: tuple[TransformRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    outside: dict[str, str] = {}  # schemes of what is quantized outside of the blocks: head, embeddings
    fallbacks: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # tensors of the original that its transformers model has no place for, copied
    forward: ForwardCheck | None = None
    end_to_end: dict[str, Any] | None = None
    imatrix: str | None = None
    artifact: Sizes = Sizes()
    converted: tuple[str, ...] = ()
    converted_from: dict[str, str] | None = None
    machine: MachineRecord | None = None
    timing: Timing | None = None
    stages: dict[str, StageRecord] = {}

    def write(self, folder: Path) -> None:
        """Write FOLDER/manifest.json, whole or not at all."""
        write_json(folder / MANIFEST, self.document())


class RunManifest(Manifest):
    """The manifest of a finished run: everything a report says of it is there."""

    name: str
    model: Origin
    recipe: dict[str, Any]
    quantpress: str
    versions: dict[str, str]
    seed: int
    layers: tuple[LayerRecord, ...]
    fallbacks: tuple[str, ...]
    artifact: Sizes
    machine: MachineRecord
    timing: Timing


_M = TypeVar("_M", bound=Manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest `path`, or that of the folder `path`; raises BadInput when there is none that can be read."""
    file = path / MANIFEST if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise BadInput(f"{file}: not a file")  # a pipe would be waited for
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"holds no finished run (no {MANIFEST})" if path.is_dir() else "no such file or folder"
        raise BadInput(f"{path}: {what}; give the folder of a run, or its {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{file}: not the manifest of a quantpress run")
    return _validated(Manifest, document, file)


def read_run_manifest(folder: Path) -> RunManifest:
    """The manifest of the finished run in `folder`. Raises BadInput when it is missing, incomplete or of another
    schema."""
    if not (folder / MANIFEST).is_file():
        if not folder.exists():
            raise BadInput(f"{folder}: no such folder{near(folder)}")
        raise BadInput(f"{folder}: no {MANIFEST}; is this a run folder?")
    manifest = read_manifest(folder)
    if manifest.schema_ != SCHEMA:
        raise BadInput(
            f"{folder / MANIFEST}: schema {manifest.schema_!r} is not {SCHEMA}; this quantpress cannot read it"
        )
    return _validated(RunManifest, manifest.document(), folder / MANIFEST)


def own_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder where this package wrote one; None where there is none, or another program's."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    return None if manifest.quantpress is None else manifest


def _validated(kind: type[_M], document: Mapping[str, Any], file: Path) -> _M:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
