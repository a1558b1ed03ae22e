"""Facts about the machine and this process."""

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from . import memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE = 1 << 23  # bytes: of which most lies in whole huge pages, wherever it begins
_KEPT = 1 << 26  # bytes of freed memory that stay for the next small tensors: getting them back costs page faults


def device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flush_denormals() -> None:
    """Let numbers below 1e-38 count as zero; call it before torch starts its threads, which inherit the setting.

    Errors of weights that already lie on the grid shrink into that range as they are fed forward, where a CPU computes
    many times slower.
    """
    torch.set_flush_denormal(True)


def set_up_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed, and keep the others in one heap.

    Tensors of many sizes come and go here. Left to itself glibc keeps up to 32 MB of each, more in all than is in use;
    with every one of them mapped anew a forward pass spends a quarter of its time on page faults. So a tensor of 8 MB
    or more is mapped, in huge pages where the system gives them (the command line has torch ask): what lies outside of
    whole ones, up to 2 MB, costs a fault for every 4 KB. Smaller tensors share a heap, which `release_memory` gives
    back: one heap, for weights that one thread reads another frees.
    """
    if _glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on one thread: for loops of many operations that take a few microseconds each.

    Several threads would wait for each other after every one of them, on a busy machine far longer than they work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_LEFT_ALONE = False


@contextmanager
def collecting_only_what_is_new() -> Iterator[None]:
    """Have the garbage collector leave alone what is there already: libraries, which it would walk for every block.

    Within another one, the outer one holds.
    """
    global _LEFT_ALONE
    if _LEFT_ALONE:
        yield
        return
    _LEFT_ALONE = True
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _LEFT_ALONE = False


def release_memory(device: torch.device | None = None) -> None:
    """Give what is free back to the system, garbage in cycles included; on a GPU too, where one is given."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def python_version() -> str:
    return platform.python_version()


def cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_bytes() -> int:
    """The most resident memory this process has held, bytes."""
    # Linux also says it for the program alone; what is below counts what a parent held when it started this one.
    held = _status("VmHWM")
    if held is not None:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int | None:
    """A number of /proc/self/status, in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def rss_bytes() -> int:
    """Resident memory now, bytes."""
    rss: int = psutil.Process().memory_info().rss
    return rss


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping or passing a container's limit, bytes."""
    return memory.available_bytes()


def device_memory(where: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a GPU's memory; None for what is no GPU, or is not there."""
    if where.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(where)


def available_device_bytes(where: torch.device) -> int:
    """Memory that is free on a CUDA device, bytes."""
    free, _ = torch.cuda.mem_get_info(where)
    return free


def synchronize(where: torch.device) -> None:
    """Wait until a CUDA device has done all it was given; CPUs do it at once."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def describe(where: torch.device) -> dict[str, Any]:
    """The machine a figure was measured on."""
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"cpu": _cpu_name(), **cores, "device": name, "memory_bytes": psutil.virtual_memory().total}


def libraries() -> dict[str, str]:
    """The versions of the libraries that compute hidden states."""
    return {"torch": torch.__version__, "transformers": version("transformers")}


def numerics(where: torch.device) -> dict[str, Any]:
    """What hidden states depend on, to the last bit, beside the model, its dtype and the text."""
    found = libraries() | {"device": describe(where)["device"], "threads": torch.get_num_threads()}
    if where.type == "cuda":  # its kernels add in another order than torch's
        found["triton"] = str(import_module("triton").__version__) if runs_triton(where) else "none"
    return found


def runs_triton(where: torch.device) -> bool:
    """Whether kernels written in Triton can run on `where`: a GPU, and Triton is installed."""
    return where.type == "cuda" and find_spec("triton") is not None


def has_amx() -> bool:
    """Whether the CPU multiplies int8 tiles (Intel AMX), as far as the system says."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
