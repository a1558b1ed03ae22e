"""A checkpoint's tensors as the parameters of a model whose experts are split: what is joined on disk is parted."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import MergeModulelist

from ..core.errors import BadInput
from .experts import Part
from .names import Origin, TensorNames


class TensorReader(Protocol):
    """A source of tensors by on-disk name: a checkpoint, or an artifact that dequantizes as it reads."""

    config: dict[str, Any]

    def __contains__(self, name: object) -> bool: ...
    def names(self) -> list[str]: ...
    def read(self, name: str) -> Tensor: ...
    def read_rows(self, name: str, rows: slice) -> Tensor: ...


class ModelTensors:
    """The tensors of a reader by their on-disk names, and those that the file does not hold as they are in the model.

    The latter have the names that a file with a tensor for each of them would have: the weights of one expert, where
    the file holds those of all together, and parameters that transformers joins or splits as it loads.
    """

    def __init__(self, reader: Any, names: TensorNames) -> None:
        self._reader, self._names = reader, names
        self.config: dict[str, Any] = reader.config
        self._made: dict[str, str] = {}  # parameter of the model, by name here
        self._parts: dict[str, tuple[str, Part, tuple[int, ...]]] = {}  # fused parameter, place, shape
        self._last: tuple[str, Tensor] | None = None  # a fused parameter that cannot be read in rows

    def place(self, name: str) -> str | None:
        """The name here of a parameter or saved buffer of the model; None where the file lacks it."""
        origin = self._names.origins.get(name)
        if origin is None:
            return next((disk for disk in self._names.likely(name) if disk in self._reader), None)
        if origin.converter is None:
            return origin.tensors[0][0]
        self._made[name] = name
        return name

    def place_part(self, names: tuple[str, ...], fused: str, part: Part, shape: tuple[int, ...]) -> str | None:
        """The name here of a parameter of one expert; None where the file lacks it.

        names: what it may be called, the likeliest first. fused: the parameter of the model that it is a part of.
        """
        origin = self._names.origins.get(fused)
        if origin is None:
            return next((name for name in names if name in self._reader), None)
        if (own := origin.stacked(part.source, part.expert)) is not None:
            return own
        if len(origin.tensors) > 1 and not origin.is_joined:
            if origin.converter is not None and not isinstance(origin.converter.operations[0], MergeModulelist):
                raise BadInput(
                    f"{origin.tensors[0][0]}: the experts on disk are joined in a way that is not known here "
                    f"({type(origin.converter.operations[0]).__name__}), as for experts of images; not supported"
                )
            return None  # the file has fewer experts than the model
        self._parts[names[0]] = fused, part, shape
        return names[0]

    def names(self) -> list[str]:
        """The names on disk."""
        return list(self._reader.names())

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._made or name in self._reader

    def on_disk(self, name: str) -> list[str]:
        """The tensors of the file that the tensor `name` is read from."""
        origin = self._origin(name)
        return [name] if origin is None else origin.on_disk

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if name in self._made:
            return self._names.made(self._made[name], self._reader.read)
        if name not in self._parts:
            tensor: Tensor = self._reader.read(name)
            return tensor
        fused, part, _ = self._parts[name]
        disk = self._names.origins[fused].on_disk[0]
        flipped = self._names.transposes(fused, self._reader.shape(disk))
        if flipped is None:
            if self._last is None or self._last[0] != fused:
                self._last = fused, self._names.made(fused, self._reader.read)
            return part.of(self._last[1][part.rows])
        rows: Tensor = self._reader.read_rows(disk, part.rows)
        return part.of(rows.transpose(-1, -2) if flipped else rows)

    def holds(self, name: str) -> bool:
        """Whether the file holds the tensor as it is, so that rows of it can be read."""
        return name not in self._made and name not in self._parts and not self._reader.is_packed(name)

    def rows(self, name: str) -> Callable[[slice], Tensor]:
        """What gives rows of the tensor. Where the file does not hold it as it is, all of it is read at once."""
        if self.holds(name):
            return lambda rows: self._reader.read_rows(name, rows)
        return self.read(name).__getitem__

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._parts:
            return self._parts[name][2]
        if name in self._made:
            return self._names.shape(self._made[name])
        return tuple(self._reader.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._reader.dtype(self.on_disk(name)[0])
        return dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor; of one that is made of others, as if it were stored in their dtype."""
        if name in self._parts or name in self._made:
            return math.prod(self.shape(name)) * self.dtype(name).itemsize
        return int(self._reader.nbytes(name))

    def check_shape(self, name: str, wanted: tuple[int, ...], shape: Callable[[str], tuple[int, ...] | None]) -> None:
        """Raise BadInput unless tensor `name` has the shape that the model wants, by the shapes on disk.

        shape: None for a packed weight, which is not checked.
        """
        origin = self._origin(name)
        if origin is None:
            stored, disk = shape(name), name
        else:
            parameter = self._parts[name][0] if name in self._parts else self._made[name]
            disk, wanted = origin.on_disk[0], self._names.shape(parameter)
            stored = self._converted(parameter, shape)
        if stored is not None and stored != wanted:
            raise BadInput(
                f"{disk}: shape {list(stored)} on disk, {list(wanted)} by config.json; "
                "is it the one that belongs to these weights?"
            )

    def _converted(self, parameter: str, shape: Callable[[str], tuple[int, ...] | None]) -> tuple[int, ...] | None:
        """The shape of a parameter, made of tensors of these shapes."""
        shapes = {disk: shape(disk) for disk in self._names.origins[parameter].on_disk}
        if any(one is None for one in shapes.values()):
            return None
        try:
            made = self._names.made(parameter, lambda disk: torch.empty(shapes[disk], device="meta"))  # type: ignore[arg-type]
        except (RuntimeError, ValueError):
            return shapes[next(iter(shapes))]
        return tuple(made.shape)

    def _origin(self, name: str) -> Origin | None:
        if name in self._parts:
            return self._names.origins[self._parts[name][0]]
        return self._names.origins[self._made[name]] if name in self._made else None
