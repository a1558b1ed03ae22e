"""Before any test: Triton's kernels are interpreted where there is no GPU to run them on, and the garbage collector
leaves alone what is there for all tests. After all: what they told.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

_TOLD = pytest.StashKey[list[str]]()
_LOADED = pytest.StashKey[int]()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, Triton's own among them


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes lines that are shown at the end of all tests: what a campaign has tried, and how often what came of it."""
    return request.config.stash.setdefault(_TOLD, []).append


@pytest.fixture(scope="session", autouse=True)
def _collecting_only_what_is_new() -> Iterator[None]:
    """Every run collects garbage, and would walk libraries and 5,000 tests for it: a fourth of the tests' time."""
    from quantpress.core import machine  # not before the environment is set

    with machine.collecting_only_what_is_new():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What tests have imported since is there for all of them, too."""
    loaded = len(sys.modules)
    if loaded != item.config.stash.get(_LOADED, 0):
        gc.collect()
        gc.freeze()
        item.config.stash[_LOADED] = loaded


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_TOLD, []):
        terminalreporter.write_line(line)
