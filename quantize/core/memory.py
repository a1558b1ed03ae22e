"""Memory: what is free where a container limits it, and its end told in one line."""

import errno
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from .errors import OutOfMemory
from .text import size

_MOUNT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 says a number near 2^63
_SIGNS = (  # in the errors of torch and the libraries below it, which have no type of their own
    "DefaultCPUAllocator", "could not create a primitive", "CUDA out of memory", "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED", "std::bad_alloc", "Cannot allocate memory", "can't start new thread",
)  # fmt: skip
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def doing(what: Callable[[], str], lower: str, device: torch.device | None = None) -> Iterator[None]:
    """Raise OutOfMemory where memory ends inside. what: says, then, what was being done; lower: what to do about it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(told(error, what(), lower, device)) from error


def told(error: BaseException, what: str, lower: str, device: torch.device | None = None) -> str:
    """One line: memory ended while `what`; how much was asked for, as far as `error` says so, and how much is free."""
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    free = min([available_bytes(), *_left_to_address()])
    if on_gpu and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
    found = _ASKED.search(str(error))
    asked = f"{size(float(found[1]) * _UNITS[found[2]])} more asked for, " if found else ""
    kind = "GPU memory" if on_gpu else "memory"
    return f"out of {kind} while {what} ({asked}{size(free)} free); {lower}"


def available_bytes() -> int:
    """Memory that can be taken without swapping, and without a container's limit being passed, bytes."""
    available: int = psutil.virtual_memory().available
    return min([available, *_below_limits(_MOUNT, _OWN)])


def _left_to_address() -> Iterator[int]:
    """What a limit on the process's address space (ulimit -v) leaves it, bytes."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        yield max(0, most - int(psutil.Process().memory_info().vms))


def _below_limits(mount: Path, own: Path) -> Iterator[int]:
    """What each control group that this process is in leaves it, bytes; cgroup version 1 or 2.

    Pages of files count as free: the kernel drops them for what is asked for.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            yield from _levels(mount, path, "memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in kinds.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _levels(mount / "memory", path, *files, ("total_inactive_file", "total_active_file"))


def _levels(mount: Path, path: str, limit: str, used: str, cached: tuple[str, str]) -> Iterator[int]:
    """What the group at `path` leaves, and each around it. In a container its own may lie at `mount` itself."""
    place = mount / path.lstrip("/")
    for folder in (place, *place.parents):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None and most < _UNLIMITED:
            yield max(0, most - now + sum(_numbers(folder / "memory.stat").get(name, 0) for name in cached))
        if folder == mount:
            break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there; `max`
        return None


def _numbers(path: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
