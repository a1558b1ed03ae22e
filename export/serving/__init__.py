"""The smoke test: a real server is started on an artifact, queried, compared with our forward, timed and stopped."""

from .containers import composed, lacking
from .process import ServerFailed
from .record import Check, Serving, read
from .smoke_test import Listener, smoke
from .starting import Options, Running, installed, reach, serve

__all__ = [
    "Check", "Listener", "Options", "Running", "ServerFailed", "Serving", "composed", "installed", "lacking",
    "reach", "read", "serve", "smoke",
]  # fmt: skip
