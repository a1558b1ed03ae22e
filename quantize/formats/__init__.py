"""On-disk formats: pack and unpack between QuantizedLinear and files, and the config.json that goes with them."""

from typing import Any

from ..core.errors import BadInput
from ..core.plugins import Table
from .awq import Awq
from .base import Format, ModelScheme
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq
from .modelopt import ModelOpt

_OWN: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "awq": Awq(),
    "modelopt": ModelOpt(),
    "gguf": Gguf(),  # for the parts of a run, which the file is made of
    "gptq-v1-asymmetric": Gptq(lowered=True),  # read only
}
FORMATS: Table[Format] = Table("quantpress.formats", _OWN, Format)

__all__ = ["FORMATS", "Format", "ModelScheme", "detect"]


def detect(config: dict[str, Any]) -> str | None:
    """The format of a checkpoint with this config.json, None when it is not quantized.

    Raises BadInput for a quantization that cannot be read.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    stated = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    for name, format in FORMATS.items():
        if format.reads(stated):
            return name
    known = ", ".join(dict.fromkeys(format.name for format in FORMATS.values() if format.holds.convertible))
    raise BadInput(f"quantized with {stated.get('quant_method')!r}, which cannot be read; known: {known}")
