"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

from . import build, choose, doctor, evaluate, export, gguf, measure, publish, reproduce, run, smoke  # noqa: F401
from .app import main  # the others add their commands to it

__all__ = ["main"]
