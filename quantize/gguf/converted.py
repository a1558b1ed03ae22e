"""A 16- or 32-bit GGUF file that llama.cpp's own converter made of a checkpoint, and which parameters are in it.

The converter knows more families than models/gguf_forms.py. What its tensors are made of is found by their numbers: a
tensor that holds exactly the numbers of a parameter, in an order that is known, is that parameter.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..models.skeleton import Skeleton
from .layout import Entry
from .reader import GgufTensors, open_gguf
from .tensor_map import EXPERT, Changes, to_gguf
from .writer import TypedList

_ORDERS: tuple[Changes, ...] = ((), ("query",), ("key",), ("by_head",), ("transposed",))
_Sums = tuple[int, float, float]


def metadata_of(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, such that `write` writes them again in their types."""
    found: dict[str, Any] = {}
    for key, field in open_gguf(file).fields.items():
        if not key.startswith("GGUF."):
            found[key] = _typed(field)
    return found


def _typed(field: gguf.ReaderField) -> Any:
    value, kind = field.contents(), field.types[0]
    if kind == gguf.GGUFValueType.ARRAY:
        return TypedList(value, field.types[-1])
    if kind in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL):
        return value
    return np.dtype(kind.name.lower()).type(value)


def matched(tensors: GgufTensors, skeleton: Skeleton) -> list[Entry]:
    """The tensors of a file of the skeleton's model, each with the parameters it is made of; () where none is found.

    Everything is read once, and once more what seems to fit.
    """
    known: dict[_Sums, list[str]] = {}
    for name in skeleton.parameters_on_disk():
        known.setdefault(_sums(skeleton.reader.read(name)), []).append(name)
    return [_entry(tensors, name, skeleton, known) for name in tensors.names()]


def _sums(values: Tensor) -> _Sums:
    """The same for the same numbers in any order."""
    wide = values.double().flatten().sort().values
    return wide.numel(), float(wide.sum()), float(wide.square().sum())


def _entry(tensors: GgufTensors, name: str, skeleton: Skeleton, known: dict[_Sums, list[str]]) -> Entry:
    shape = tensors.shape(name)
    if len(shape) == 3 and "_exps." in name:
        found = [_found(tensors.dequantized(name, e), skeleton, known) for e in range(shape[0])]
        parameters = tuple(one[0] for one in found if one is not None and EXPERT.search(one[0]))
        if len(parameters) == shape[0] and len({one[1] for one in found if one is not None}) == 1:
            return Entry(name, parameters, shape, found[0][1] if found[0] else ())
        return Entry(name, (), shape)
    values = tensors.dequantized(name)
    one = _found(values, skeleton, known)
    if one is None and len(shape) == 1 and (less := _found(values - 1, skeleton, known)) is not None:
        one = less[0], ("plus_one",)
    return Entry(name, (), shape) if one is None else Entry(name, (one[0],), shape, one[1])


def _found(values: Tensor, skeleton: Skeleton, known: dict[_Sums, list[str]]) -> tuple[str, Changes] | None:
    """The parameter with exactly these values, and how it is arranged."""
    for name in known.get(_sums(values), ()):
        weight = skeleton.reader.read(name).float()
        for changes in _ORDERS if weight.dim() == 2 else ((),):
            try:
                arranged = to_gguf(changes, weight, skeleton.config)
            except (RuntimeError, AttributeError, TypeError):  # another number of heads
                continue
            if torch.equal(arranged, values):
                return name, changes
    return None
