"""How a check ends: it returns what it saw, or raises Failed or Skipped with the reason."""

import time
from collections.abc import Callable, Mapping

from quantpress.core.text import shortened

from .client import ServerError
from .record import Check


class Failed(Exception):
    """The server fails the check."""


class Skipped(Exception):
    """The check does not apply."""


def made(name: str, check: Callable[[], str], lacks: Mapping[str, str]) -> Check:
    """Make one check, timed; one that the server lacks is skipped."""
    started = time.perf_counter()
    status, reason = "skip", lacks.get(name, "")
    if name not in lacks:
        try:
            status, reason = "pass", check()
        except Skipped as why:
            reason = str(why)
        except (Failed, ServerError) as why:
            status, reason = "fail", str(why)
    return Check.model_validate(
        {"name": name, "status": status, "reason": reason, "seconds": time.perf_counter() - started}
    )


def quoted(text: str) -> str:
    """The beginning of a text, for a reason."""
    return repr(shortened(text, 60))
