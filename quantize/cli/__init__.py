"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

from . import build, choose, doctor, evaluate, export, measure, reproduce, run, smoke  # noqa: F401  they add commands
from .app import main

__all__ = ["main"]
