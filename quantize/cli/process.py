"""The command line as a process of its own."""

import atexit
import ctypes
import os
import sys

from .app import main


def command() -> None:
    """`main`, after which the process ends at once.

    Left to itself Python takes apart all that torch and transformers have built, object by object, which takes seconds
    and changes nothing. Threads are waited for and what others have registered is called as ever.
    """
    status: int | None = None

    def leave() -> None:
        if status is not None:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # closed by whoever started this
                    stream.flush()
            ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
            os._exit(status)

    atexit.register(leave)  # the first, so that it is called last
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, int):
            status = stop.code
        raise
