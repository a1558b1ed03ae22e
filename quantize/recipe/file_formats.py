"""What the files of each format can hold, as far as a recipe has to know; how they hold it is in formats/. No torch."""

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from ..core.plugins import added
from ..core.text import meant
from ..plugin import FileFormat

FILE_FORMATS: dict[str, FileFormat] = {
    "compressed-tensors": FileFormat(("int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"), input_scales=True),
    "gptq": FileFormat(("int",), scattered=True, conv1d=True),
    "awq": FileFormat(("int",)),
    "modelopt": FileFormat(("int", "fp8", "nvfp4"), input_scales=True),
    "gguf": FileFormat((), convertible=False),  # ggml's own block types, which `gguf.type` chooses
}
FILE_FORMATS |= added("quantpress.file_formats", FileFormat, FILE_FORMATS)


def _known(name: str) -> str:
    if name not in FILE_FORMATS:
        raise ValueError(f"unknown format{meant(name, FILE_FORMATS)} (known: {', '.join(FILE_FORMATS)})")
    return name


_SCHEMA: dict[str, Any] = {"type": "string", "enum": list(FILE_FORMATS)}
FormatName = Annotated[str, AfterValidator(_known), WithJsonSchema(_SCHEMA)]
