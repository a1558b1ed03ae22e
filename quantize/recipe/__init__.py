"""The recipe: what one YAML file may say. No torch here; file.py reads it from disk."""

from .base import Strict, matches
from .document import FormatName, Override, Recipe
from .gates import Gates
from .methods import (
    AutoRound,
    Awq,
    EndToEnd,
    Gptq,
    Hadamard,
    Method,
    Objective,
    Qat,
    Rtn,
    SmoothQuant,
    Transform,
    Tuned,
)
from .numbers import Activations, Grid, GroupSize, NumberType, ScaleSearch
from .smoke import ServerName, Smoke
from .text import Bos, Calibration, Evaluation, Text

__all__ = [
    "Activations",
    "AutoRound",
    "Awq",
    "Bos",
    "Calibration",
    "EndToEnd",
    "Evaluation",
    "FormatName",
    "Gates",
    "Gptq",
    "Grid",
    "GroupSize",
    "Hadamard",
    "Method",
    "NumberType",
    "Objective",
    "Override",
    "Qat",
    "Recipe",
    "Rtn",
    "ScaleSearch",
    "ServerName",
    "Smoke",
    "SmoothQuant",
    "Strict",
    "Text",
    "Transform",
    "Tuned",
    "matches",
]
