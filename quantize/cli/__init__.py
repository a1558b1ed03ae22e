"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

from . import run, build, evaluate, reproduce, export, smoke, measure, doctor  # noqa: F401, I001  they add commands
from .app import main

__all__ = ["main"]
