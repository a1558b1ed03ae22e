"""The recipe: what one YAML file may say. No torch here; loading.py reads it from disk."""

from ..core.schema import Strict, matches
from .document import Override, Recipe
from .evaluation import GPUS, EfficiencySettings, Evaluation, Task, Timing
from .file_formats import FILE_FORMATS, FileFormat
from .gate_limits import Gates
from .gguf_file import Budget, FileType, Gguf, TensorType
from .methods import (
    AutoRound,
    Awq,
    EndToEnd,
    Gptq,
    Hadamard,
    LlamaCppQuantizer,
    Method,
    MethodSettings,
    Objective,
    Qat,
    Rtn,
    SmoothQuant,
    Transform,
    Tuned,
)
from .readers import READERS, refusal
from .readers import notes as reader_notes
from .smoke_test import ServerName, Smoke
from .targets import Drafting, LlamaCpp, Ollama, Sglang, Target, TensorRtLlm, Tgi, Triton, Vllm
from .text import Bos, Calibration, Text

__all__ = [
    "FILE_FORMATS",
    "GPUS",
    "READERS",
    "AutoRound",
    "Awq",
    "Bos",
    "Budget",
    "Calibration",
    "Drafting",
    "EfficiencySettings",
    "EndToEnd",
    "Evaluation",
    "FileFormat",
    "FileType",
    "Gates",
    "Gguf",
    "Gptq",
    "Hadamard",
    "LlamaCpp",
    "LlamaCppQuantizer",
    "Method",
    "MethodSettings",
    "Objective",
    "Ollama",
    "Override",
    "Qat",
    "Recipe",
    "Rtn",
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
