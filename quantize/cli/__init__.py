"""The command line, a file for each group of commands; the one part of quantize/ that knows eval/ and export/."""

from . import (  # noqa: F401  they add their commands to the app
    build,
    choose,
    doctor,
    evaluate,
    export,
    measure,
    publish,
    reproduce,
    run,
    smoke,
)
from .app import main

__all__ = ["main"]
