"""A GGUF file with a config.json beside it, read like a checkpoint: dequantized tensors by their HF names."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.files import file_sha256
from ..core.untrusted import read_json
from ..models.architecture import decoder_config, model_config
from ..models.building import build_model
from ..models.companions import check_checkpoint_files, companions
from ..models.names import saved_shapes
from ..models.skeleton import Skeleton
from ..recipe.gguf_file import FLOATS
from .header import check_header
from .hyperparameters import form_of
from .layout import Entry, layout
from .tensor_map import from_gguf

_FILE = "model.gguf"
LAYOUT = "gguf_layout.json"  # beside a file by llama.cpp's converter: what its tensors are made of
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def gguf_files(folder: Path) -> list[Path]:
    """The files of model.gguf in a folder: the file itself, its parts in order, or none.

    Raises BadInput when parts are missing.
    """
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    parts = sorted(path for path in folder.glob("model-*.gguf") if _PART.search(path.name))
    if parts:
        total = int(_PART.search(parts[0].name)[2])  # type: ignore[index]
        if len(parts) != total:
            raise BadInput(f"{folder}: {len(parts)} of {total} parts of the GGUF file are there")
    return parts


class GgufTensors:
    """The tensors of a GGUF file, or of its parts, as stored.

    Raises BadInput for a file that is damaged or incomplete.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._tensors: dict[str, tuple[Path, Any]] = {}
        for file in files:
            self._tensors |= {tensor.name: (file, tensor) for tensor in open_gguf(file).tensors}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def stored(self, name: str) -> Any:
        """The `gguf` package's record of a tensor."""
        if name not in self._tensors:
            raise BadInput(f"{self.files[0]}: the GGUF file has no tensor {name}")
        return self._tensors[name][1]

    def file_of(self, name: str) -> Path:
        return self._tensors[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, columns last."""
        return tuple(int(n) for n in reversed(self.stored(name).shape))

    def dequantized(self, name: str, part: int | None = None) -> Tensor:
        """A tensor in float32, or its slice `part` along the first dimension."""
        return dequantized(self.stored(name), part, self.files[0])


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes, columns last, are the same to ggml, which drops leading dimensions of 1."""
    short = [shape[next((i for i, n in enumerate(shape) if n != 1), len(shape)) :] for shape in (one, other)]
    return short[0] == short[1]


def dequantized(tensor: Any, part: int | None, file: Path) -> Tensor:
    """A record of the `gguf` package's reader in float32, or its slice `part` along the first dimension."""
    try:
        values = gguf.quants.dequantize(tensor.data if part is None else tensor.data[part], tensor.tensor_type)
    except NotImplementedError as error:
        raise BadInput(f"{file}: tensor {tensor.name}: type {tensor.tensor_type.name} cannot be read") from error
    shape = [int(n) for n in reversed(tensor.shape)]
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape if part is None else shape[1:])


def open_gguf(file: Path) -> gguf.GGUFReader:
    """The `gguf` package's reader; raises BadInput for a file that is not GGUF or is incomplete."""
    try:
        check_header(file)
        reader = gguf.GGUFReader(file)
        _check_places(reader, file)
        return reader
    except BadInput:
        raise
    except Exception as error:  # whatever the package's reader meets in a damaged file
        raise BadInput(f"{file}: not a whole GGUF file: {' '.join(str(error).split())[:200]}") from error


def _check_places(reader: gguf.GGUFReader, file: Path) -> None:
    """Raise BadInput unless the tensors lie one after the other, as llama.cpp demands."""
    at = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != at:
            raise BadInput(f"{file}: not a whole GGUF file: {tensor.name} does not lie where the tensor before it ends")
        at += -(-tensor.n_bytes // reader.alignment) * reader.alignment


def not_read_back(lost: list[str]) -> str:
    """Why a file with these parameters missing cannot be evaluated."""
    return (
        f"llama.cpp's converter stores {len(lost)} parameters ({lost[0]}) in a form that is not read back: llama.cpp "
        "runs such a file, and it is not evaluated here"
    )


class GgufCheckpoint:
    """A folder with model.gguf and the config.json of its model, used like a safetensors checkpoint.

    Raises BadInput for a file that does not hold the tensors of that model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_checkpoint_files(folder)
        self.config: dict[str, Any] = read_json(folder / "config.json", "a GGUF file is read beside one")
        self.tensors = GgufTensors(gguf_files(folder))
        whole = model_config(self.config)
        self._config = decoder_config(whole)
        own = folder / LAYOUT
        if not own.is_file():
            form_of(self._config)  # refuses a family that GGUF does not hold
        self._where: dict[str, list[tuple[Entry, int | None]]] = {}
        self._expected = saved_shapes(build_model(whole))
        skeleton = Skeleton(self, device=torch.device("cpu"))
        for entry in self._layout(own) if own.is_file() else layout(skeleton):
            if entry.name not in self.tensors or not same_shape(self.tensors.shape(entry.name), entry.shape):
                found = list(self.tensors.shape(entry.name)) if entry.name in self.tensors else "absent"
                raise BadInput(f"{folder}: tensor {entry.name} is {found} and config.json wants {list(entry.shape)}")
            for i, parameter in enumerate(entry.parameters):
                self._where.setdefault(parameter, []).append((entry, i if entry.stacked else None))
        self._towers = list(skeleton.tower_tensors())
        self._lost = [name for name in skeleton.parameters_on_disk() if name not in self._where]

    def _layout(self, file: Path) -> list[Entry]:
        """The tensors of a file that llama.cpp's converter made, as it was noted beside it."""
        made: dict[str, tuple[list[str], Any]] = read_json(file)
        return [
            Entry(name, tuple(parameters), self.tensors.shape(name), tuple(changes))
            for name, (parameters, changes) in made.items()
        ]

    def names(self) -> list[str]:
        """HF names; those of a multimodal model's towers too, which the file does not hold.

        Raises BadInput for a file by llama.cpp's converter in which parameters were not found.
        """
        if not self._where:
            return list(self._expected)
        if self._lost:
            raise BadInput(f"{self.folder}: {not_read_back(self._lost)}")
        return [*self._where, *self._towers]

    def __contains__(self, name: object) -> bool:
        """Whether `names` has it."""
        return name in self.names()

    def holds(self, name: str) -> bool:
        """Whether the file's tensors make up this parameter."""
        return name in self._where

    def entry(self, name: str) -> Entry:
        """The tensor of the file that holds a parameter."""
        if name not in self._where:
            raise BadInput(f"{self.folder}: no tensor {name}")
        return self._where[name][0][0]

    def _made_of(self, name: str) -> list[tuple[Entry, int | None]]:
        """The tensors that make up a parameter, and its slices of them; a tied head's twin counts once."""
        first = self.entry(name)
        return self._where[name][:1] if first.whole else self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._where and name in self._expected:
            return self._expected[name]
        made = self._made_of(name)
        tensors = [torch.empty(e.shape[1:] if e.stacked else e.shape, device="meta") for e, _ in made]
        return tuple(from_gguf(made[0][0].changes, tensors, self._config).shape)

    def dtype(self, name: str) -> torch.dtype:
        """float32, the dtype of dequantized tensors."""
        self.entry(name)
        return torch.float32

    def nbytes(self, name: str) -> int:
        """Bytes a parameter takes in the file."""
        sizes = [(e, int(self.tensors.stored(e.name).n_bytes)) for e, _ in self._made_of(name)]
        return sum(size // (entry.shape[0] if entry.stacked else 1) for entry, size in sizes)

    def block(self, name: str) -> int:
        """Columns of a parameter that its type in the file takes together; 1 for a type of floats."""
        return int(gguf.GGML_QUANT_SIZES[self.tensors.stored(self.entry(name).name).tensor_type][0])

    def file_of(self, name: str) -> str:
        return self.tensors.file_of(self.entry(name).name).name

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(int(self.tensors.stored(name).n_bytes) for name in self.tensors.names())

    def bits_per_weight(self) -> float | None:
        """Bits on disk per weight of the quantized tensors; None when there are none."""
        entries = dict.fromkeys(entry for made in self._where.values() for entry, _ in made)
        stored = [self.tensors.stored(entry.name) for entry in entries if entry.matrix]
        packed = [tensor for tensor in stored if tensor.tensor_type.name not in FLOATS]
        count = sum(int(tensor.n_elements) for tensor in packed)
        return 8 * sum(int(tensor.n_bytes) for tensor in packed) / count if count else None

    def read(self, name: str) -> Tensor:
        """A parameter in float32, in transformers' layout; zeros for one of the towers, which no text reaches."""
        if name in self._towers:
            return torch.zeros(self._expected[name])
        made = self._made_of(name)
        weights = [
            self.tensors.dequantized(e.name, part).reshape(e.shape if part is None else e.shape[1:]) for e, part in made
        ]
        return from_gguf(made[0][0].changes, weights, self._config).contiguous()

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """As `read`, for a part along the first dimension."""
        return self.read(name)[rows]

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 by name of the GGUF files, config.json, tokenizer and other companions."""
        files = {
            *self.folder.glob("*.gguf"),
            *self.folder.glob("Modelfile"),
            *self.folder.glob(LAYOUT),
            self.folder / "config.json",
            *companions(self.folder),
        }
        return {file.relative_to(self.folder).as_posix(): file_sha256(file) for file in sorted(files)}
