"""The command line, a file for each group of commands: it parses, calls one function and prints."""

import sys

try:
    from . import (  # noqa: F401
        comparing,
        doctor,
        exporting,
        making,
        measuring,
        publishing,
        reports,
        reproducing,
        running,
        smoking,
        to_gguf,
    )
    from .app import main  # the others add their commands to it
except KeyboardInterrupt:  # while libraries were imported, before `main` could say it
    print("quantpress: stopped", file=sys.stderr)  # noqa: T201
    sys.exit(130)

__all__ = ["main"]
