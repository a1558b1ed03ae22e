"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

from . import build, choose, evaluate, measure, publish, reproduce  # noqa: F401  they add their commands to the app
from .app import main

__all__ = ["main"]
