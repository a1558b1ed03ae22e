"""What the files of each format can hold, as far as a recipe has to know; how they hold it is in formats/. No torch."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from ..core.text import meant
from ..numbers.types import NumberType


@dataclass(frozen=True)
class FileFormat:
    """types: number types of weights it has a layout for. input_scales: whether it holds scales for the inputs of
    linears and for a key-value cache. scattered: whether it names the group of each column (g_idx, desc_act). conv1d:
    whether readers of it find the transposed linears of GPT-2. convertible: whether it is safetensors with one linear's
    tensors side by side, which `convert` reads and writes.
    """

    types: tuple[NumberType, ...]
    input_scales: bool = False
    scattered: bool = False
    conv1d: bool = False
    convertible: bool = True


FILE_FORMATS: dict[str, FileFormat] = {
    "compressed-tensors": FileFormat(("int", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"), input_scales=True),
    "gptq": FileFormat(("int",), scattered=True, conv1d=True),
    "awq": FileFormat(("int",)),
    "modelopt": FileFormat(("int", "fp8", "nvfp4"), input_scales=True),
    "gguf": FileFormat((), convertible=False),  # ggml's own block types, which `gguf.type` chooses
}


def _known(name: str) -> str:
    if name not in FILE_FORMATS:
        raise ValueError(f"unknown format{meant(name, FILE_FORMATS)} (known: {', '.join(FILE_FORMATS)})")
    return name


_SCHEMA: dict[str, Any] = {"type": "string", "enum": list(FILE_FORMATS)}
FormatName = Annotated[str, AfterValidator(_known), WithJsonSchema(_SCHEMA)]
