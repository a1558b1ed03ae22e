"""The recipe schema: what one YAML file may say. No torch here; loading.py reads it from disk."""

from ..core.schema import Strict, matches
from ..plugin import MethodSettings
from .budget import Budget
from .document import Override, Recipe
from .evaluation import GPUS, EfficiencySettings, Evaluation, Task, Timing
from .file_formats import FILE_FORMATS
from .gate_limits import Gates
from .gguf_file import FileType, Gguf, GgufBudget, TensorType
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
from .smoke import ServerName, Smoke
from .targets import Target
from .text import Bos, Calibration, Text

__all__ = [
    "FILE_FORMATS", "GPUS", "AutoRound", "Awq", "Bos", "Budget", "Calibration", "EfficiencySettings", "EndToEnd",
    "Evaluation", "FileType", "Gates", "Gguf", "GgufBudget", "Gptq", "Hadamard", "LlamaCppQuantizer", "Method",
    "MethodSettings", "Objective", "Override", "Qat", "Recipe", "Rtn", "ServerName", "Smoke", "SmoothQuant",
    "Strict", "Target", "Task", "TensorType", "Text", "Timing", "Transform", "Tuned", "matches",
]  # fmt: skip
