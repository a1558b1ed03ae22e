"""Before any test: Triton's kernels are interpreted where there is no GPU to run them on. After all: what they told."""

import os
from collections.abc import Callable

import pytest
import torch

_TOLD = pytest.StashKey[list[str]]()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, Triton's own among them


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes lines that are shown at the end of all tests: what a campaign has tried, and how often what came of it."""
    return request.config.stash.setdefault(_TOLD, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_TOLD, []):
        terminalreporter.write_line(line)
