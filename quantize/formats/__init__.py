"""On-disk formats: pack and unpack between QuantizedLinear and files, and the config.json that goes with them."""

from typing import Any

from ..core.errors import BadInput
from . import awq, gptq
from .awq import Awq
from .base import Contents, Format
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq
from .modelopt import ModelOpt

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "awq": Awq(),
    "modelopt": ModelOpt(),
    "gguf": Gguf(),  # the parts of a run; the file is written from them
    "gptq-v1-asymmetric": Gptq(lowered=True),  # read only
}

__all__ = ["FORMATS", "Contents", "Format", "detect"]


def detect(config: dict[str, Any]) -> str | None:
    """The format of a checkpoint with this config.json, None when it is not quantized.

    Raises BadInput for a quantization that is none of ours.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "compressed-tensors":
        return "compressed-tensors"
    if method == "gptq":
        return gptq.version(quantization)
    if method == "awq":
        awq.check_version(quantization)
        return "awq"
    if str(method).startswith("modelopt"):
        return "modelopt"
    raise BadInput(f"quantized with {method!r}, which cannot be read; known: compressed-tensors, gptq, awq, modelopt")
