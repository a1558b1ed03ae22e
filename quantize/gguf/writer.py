"""Writing GGUF files tensor by tensor, completely or not at all.

The `gguf` package writes the header; then each tensor is made and written, so that only one is in memory. The header
follows from names, types and shapes, so the size of a file is known exactly before it is written.
"""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from ..core.errors import BadInput
from ..core.files import fsync, temporary_folder

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes to whose multiples each tensor is padded
ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written: its name in the file, ggml type and shape, the columns last.

    data: makes its raw bytes when it is written: an array of any dtype with exactly `nbytes` bytes, row by row.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding. Raises BadInput when rows are not whole blocks of the type."""
        return tensor_bytes(self.shape, self.type, self.name)


def tensor_bytes(shape: Sequence[int], kind: GGMLQuantizationType, name: str = "a tensor") -> int:
    """Bytes of a tensor, the columns last in `shape`; raises BadInput when rows are not whole blocks of the type."""
    block, size = map(int, gguf.GGML_QUANT_SIZES[kind])
    columns = shape[-1] if shape else 1
    if columns % block:
        raise BadInput(f"{name}: {kind.name} needs rows of a multiple of {block}, not {columns}")
    return math.prod(shape) // block * size


def padded_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor with its padding in the file."""
    return _padded(tensor_bytes(shape, kind))


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[FileTensor],
    split_bytes: int | None = None,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write the GGUF file `path`, or numbered parts of at most `split_bytes` of tensors each; returns their paths.

    metadata: plain values by their full key; int is written as uint32, float as float32, a list as an array of its
    items' type, numpy scalars as their own type. Parts are named as llama.cpp's loader expects,
    model-00001-of-00003.gguf. Files get their final names once all are complete and on disk. `on_tensor` is called with
    the number of tensors written so far. Raises BadInput where one of the names is a folder.
    """
    writer = _described(path, metadata, tensors, split_bytes)
    names: list[Path] = writer.format_shard_names(path)
    for name in names:
        if name.is_dir():  # checked before the work, not when the finished file is renamed
            raise BadInput(f"{name} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent) as scratch:
        try:
            writer.write_header_to_file(Path(scratch) / path.name)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, tensor in enumerate(tensors):
                data = np.ascontiguousarray(tensor.data())
                if data.nbytes != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {data.nbytes} bytes where its type and shape say {tensor.nbytes}")
                writer.write_tensor_data(data)
                on_tensor(i + 1)
        finally:
            writer.close()
        for name in names:
            fsync(Path(scratch) / name.name)
        for name in names:
            os.replace(Path(scratch) / name.name, name)
    fsync(path.parent)
    return names


def sizes(metadata: Mapping[str, Any], tensors: Sequence[FileTensor], split_bytes: int | None = None) -> list[int]:
    """The exact size in bytes of each file that `write` would make."""
    writer = _described(Path("model.gguf"), metadata, tensors, split_bytes)
    parts, out = writer.tensors, []
    with tempfile.TemporaryDirectory() as scratch:  # only the headers are written
        infos = [dict(part) for part in parts]
        writer.write_header_to_file(Path(scratch) / "model.gguf")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for file, part in zip(writer.fout or [], infos, strict=True):
            file.flush()
            out.append(_padded(file.tell()) + sum(_padded(info.nbytes) for info in part.values()))
        writer.close()
    return out


def parameter_counts(tensors: Sequence[FileTensor]) -> tuple[int, int, int, int]:
    """Of a file of these tensors: all parameters, those of no expert, those of one expert, and the experts."""
    return _described(Path("model.gguf"), {}, tensors, None).get_total_parameter_count()  # type: ignore[no-any-return]


def _padded(size: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(size, ALIGNMENT))


def _described(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[FileTensor], split_bytes: int | None
) -> gguf.GGUFWriter:
    """A writer with everything but the tensors' data."""
    writer = gguf.GGUFWriter(path, str(metadata.get(ARCHITECTURE, "")), split_max_size=split_bytes or 0)
    for key, value in metadata.items():
        if key != ARCHITECTURE and value is not None:
            _add(writer, key, value)
    for tensor in tensors:
        # float32 leaves the shape as it is; with uint8, add_tensor_info would take the columns for bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    return writer


class TypedList(list[Any]):
    """A list whose items are to be of this type in the file."""

    def __init__(self, values: Sequence[Any], kind: GGUFValueType) -> None:
        super().__init__(values)
        self.kind = kind


_NUMPY = {np.dtype(kind.name.lower()).type: kind for kind in GGUFValueType if kind.name[-1].isdigit()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, TypedList):
        writer.add_key_value(key, list(value), GGUFValueType.ARRAY, value.kind)
    elif isinstance(value, list):
        kind = GGUFValueType.get_type(value[0]) if value else GGUFValueType.STRING
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
    elif type(value) in _NUMPY:
        writer.add_key_value(key, value.item(), _NUMPY[type(value)])
    elif isinstance(value, int) and not isinstance(value, bool):
        writer.add_key_value(key, value, GGUFValueType.UINT32)
    else:
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
