"""The recipe: what one YAML file may say. No torch here; file.py reads it from disk."""

from .base import Strict, matches
from .document import FormatName, Override, PackedFormat, Recipe
from .evaluation import GPUS, EfficiencySettings, Evaluation, Task, Timing
from .gates import Gates
from .gguf import Budget, FileType, Gguf, TensorType
from .methods import (
    AutoRound,
    Awq,
    EndToEnd,
    Gptq,
    Hadamard,
    LlamaCppQuantizer,
    Method,
    Objective,
    Qat,
    Rtn,
    SmoothQuant,
    Transform,
    Tuned,
)
from .numbers import SUPER_BLOCK, Activations, BlockGrid, GgmlType, Grid, GroupSize, NumberType, ScaleSearch
from .readers import READERS, refusal
from .readers import notes as reader_notes
from .smoke import ServerName, Smoke
from .targets import Drafting, LlamaCpp, Ollama, Sglang, Target, TensorRtLlm, Tgi, Triton, Vllm
from .text import Bos, Calibration, Text

__all__ = [
    "GPUS",
    "READERS",
    "SUPER_BLOCK",
    "Activations",
    "AutoRound",
    "Awq",
    "BlockGrid",
    "Bos",
    "Budget",
    "Calibration",
    "Drafting",
    "EfficiencySettings",
    "EndToEnd",
    "Evaluation",
    "FileType",
    "FormatName",
    "Gates",
    "GgmlType",
    "Gguf",
    "Gptq",
    "Grid",
    "GroupSize",
    "Hadamard",
    "LlamaCpp",
    "LlamaCppQuantizer",
    "Method",
    "NumberType",
    "Objective",
    "Ollama",
    "Override",
    "PackedFormat",
    "Qat",
    "Recipe",
    "Rtn",
    "ScaleSearch",
    "ServerName",
    "Sglang",
    "Smoke",
    "SmoothQuant",
    "Strict",
    "Target",
    "Task",
    "TensorRtLlm",
    "TensorType",
    "Text",
    "Tgi",
    "Timing",
    "Transform",
    "Triton",
    "Tuned",
    "Vllm",
    "matches",
    "reader_notes",
    "refusal",
]
