"""The header of a GGUF file, walked over before anything is made of it: lengths that the file cannot hold are refused.

The `gguf` package's reader believes them, and would loop over 2^60 elements of an array that is not there.
"""

import math
import mmap
import struct
from pathlib import Path

from ..core.errors import BadInput
from ..core.text import printable, shortened

# Bytes of a value by its type: uint8, int8, uint16, int16, uint32, int32, float32, bool; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_LONGEST_KEY, _LONGEST_ARRAY, _DIMENSIONS = 65535, 10_000_000, 4  # by the format's description; elements; of a tensor


def check_header(file: Path) -> None:
    """Raise BadInput unless all that the header of `file` announces is in it."""
    with open(file, "rb") as opened:
        try:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise BadInput(f"{file}: not a whole GGUF file: it is empty") from None
        with data:
            try:
                _Header(data).walk()
            except (ValueError, struct.error) as error:
                raise BadInput(f"{file}: not a whole GGUF file: {error}") from None


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._order = data, 4, "<"

    def walk(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # of the other byte order
            self._order, version = ">", int.from_bytes(self._data[4:8], "big")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not known")
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in range(fields):
            key = self._string(_LONGEST_KEY)
            kind = self._number("I")
            self._array(key) if kind == _ARRAY else self._value(kind, key)
        for _ in range(tensors):
            self._tensor()

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(self._order + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _skip(self, count: int, what: str) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(f"{what} has {count} bytes, and the file ends before")
        self._at += count

    def _string(self, longest: int) -> str:
        """For messages: of a damaged file it may be anything."""
        start = self._at + 8
        length = self._number("Q")
        if length > longest:
            raise ValueError(f"a name of {length} bytes")
        self._skip(length, "a name")
        return shortened(printable(self._data[start : self._at].decode()), 80)  # UnicodeDecodeError is a ValueError

    def _value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"), key)
        elif kind in _SIZES:
            self._skip(_SIZES[kind], key)
        else:
            raise ValueError(f"{key}: type {kind} is not known")

    def _array(self, key: str) -> None:
        kind, length = self._number("I"), self._number("Q")
        if length > _LONGEST_ARRAY:
            raise ValueError(f"{key}: an array of {length} elements")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._number("Q"), key)
        elif kind in _SIZES:
            self._skip(length * _SIZES[kind], key)
        else:
            raise ValueError(f"{key}: an array of type {kind} is not known")

    def _tensor(self) -> None:
        name = self._string(_LONGEST_KEY)
        dimensions = self._number("I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"{name}: a tensor of {dimensions} dimensions")
        shape = [self._number("Q") for _ in range(dimensions)]
        if math.prod(shape) > 1 << 48:
            raise ValueError(f"{name}: a tensor of shape {shape}")
        self._skip(12, name)  # type and offset, which are compared with the file when the tensors are found
