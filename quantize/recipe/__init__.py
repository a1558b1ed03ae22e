"""The recipe: what one YAML file may say. No torch here; file.py reads it from disk."""

from .base import Strict, matches
from .document import FormatName, Override, PackedFormat, Recipe
from .gates import Gates
from .gguf import Budget, FileType, Gguf, TensorType
from .methods import (
    AutoRound,
    Awq,
    EndToEnd,
    Gptq,
    Hadamard,
    LlamaCpp,
    Method,
    Objective,
    Qat,
    Rtn,
    SmoothQuant,
    Transform,
    Tuned,
)
from .numbers import Activations, Grid, GroupSize, NumberType, ScaleSearch
from .text import Bos, Calibration, Evaluation, Text

__all__ = [
    "Activations",
    "AutoRound",
    "Awq",
    "Bos",
    "Budget",
    "Calibration",
    "EndToEnd",
    "Evaluation",
    "FileType",
    "FormatName",
    "Gates",
    "Gguf",
    "Gptq",
    "Grid",
    "GroupSize",
    "Hadamard",
    "LlamaCpp",
    "Method",
    "NumberType",
    "Objective",
    "Override",
    "PackedFormat",
    "Qat",
    "Recipe",
    "Rtn",
    "ScaleSearch",
    "SmoothQuant",
    "Strict",
    "TensorType",
    "Text",
    "Transform",
    "Tuned",
    "matches",
]
