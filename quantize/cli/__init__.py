"""The command line, a file for each group of commands: it parses, calls one function and prints."""

import sys

from ..core.errors import BadInput

try:
    from . import doctor, fitting, making, measuring, releasing, serving  # noqa: F401  each adds its commands to the app
    from .app import main
    from .process import command
except KeyboardInterrupt:  # while libraries were imported, before `main` could report it
    print("quantpress: stopped", file=sys.stderr)  # noqa: T201
    sys.exit(130)

except BadInput as error:  # a plug-in that cannot be loaded
    print(f"quantpress: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(2)

__all__ = ["command", "main"]
