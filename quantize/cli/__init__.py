"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

import sys

try:
    from . import build, choose, doctor, evaluate, export, gguf, measure, publish, reproduce, run, smoke  # noqa: F401
    from .app import main  # the others add their commands to it
except KeyboardInterrupt:  # while libraries were imported, before `main` could say it
    print("quantpress: stopped", file=sys.stderr)  # noqa: T201
    sys.exit(130)

__all__ = ["main"]
