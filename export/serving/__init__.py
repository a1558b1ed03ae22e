"""Artifacts on real servers: started, talked to, compared with our own forward, timed, and always ended."""

from .containers import composed, lacking
from .process import ServerFailed
from .record import Check, Serving, read
from .smoke_test import Listener, smoke
from .starting import Options, Running, installed, reach, serve

__all__ = [
    "Check",
    "Listener",
    "Options",
    "Running",
    "ServerFailed",
    "Serving",
    "composed",
    "installed",
    "lacking",
    "reach",
    "read",
    "serve",
    "smoke",
]
