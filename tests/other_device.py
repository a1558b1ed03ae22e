"""A device that is not the CPU, for machines without one: tensors that say they are there and are computed here.

An operation on tensors of both devices is refused, as the real one would refuse it. What a GPU's own kernels answer is
not shown, nor anything that trains: autograd copies tensors past what stands in for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from .forked import run_python

DEVICE = torch.device("privateuseone:0")  # the one device a build of torch has room for beside those it knows
_aten: Any = torch.ops.aten
_MOVES = (_aten._to_copy.default, _aten.copy_.default)
# A GPU's tensor may be indexed by what lies in the host's memory.
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)


class Elsewhere(Tensor):
    """A tensor on that device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE, requires_grad=here.requires_grad,
        )  # fmt: skip
        made.here = here
        return made

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees every operation, those that make a tensor out of nothing too."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = [*_tensors(args), *_tensors(kwargs.values())]
    elsewhere = any(isinstance(x, Elsewhere) for x in given)
    target = kwargs.get("device")
    host = [x for x in given if not isinstance(x, Elsewhere) and x.dim() > 0 and not x.is_meta]
    allowed = func in _MOVES or (func in _INDEXED and isinstance(args[0], Elsewhere))
    if elsewhere and host and not allowed:
        raise RuntimeError(f"{func}: tensors on {DEVICE} and one of shape {tuple(host[0].shape)} on the CPU")
    there = elsewhere if target is None else torch.device(target).type == DEVICE.type
    if func is _aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    inner_args = [_mapped(_here, x) for x in args]
    inner_kwargs = {name: _mapped(_here, x) for name, x in kwargs.items()}
    if target is not None and there:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if not there:
        return args[0] if func is _aten.copy_.default else out
    out = _mapped(_moved, out)
    written = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in _written(func)]
    written = [x for x in written if x is not None]
    if written and isinstance(out, Tensor):
        return written[0]
    return out


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Place and name of each argument that the operation writes to, by its schema."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments, which are lists at most; torch's own walk of trees takes five times as long
    as the operations.
    """
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, list | tuple):
        return type(x)([_mapped(change, one) for one in x])
    return change(x)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, Elsewhere) else x


def _moved(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) and not x.is_meta else x


def _empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Elsewhere:
    """What torch.tensor(…, device=…) asks the device itself for, past every mode."""
    return Elsewhere(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _copy_from(values: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _here(to).copy_(_here(values))
    return to


def run_there(module: str, function: str, *arguments: object) -> None:
    """Call `function` of a test module with strings, in a process of its own, where the device is one to compute on.

    Its own, because torch does not forget a device, and much that looks for one would find it from then on.
    """
    code = (
        "import importlib, sys\nfrom tests.other_device import other_device\n"
        f"wanted = importlib.import_module({module!r}).{function}\nwith other_device():\n    wanted(*sys.argv[1:])"
    )
    with TemporaryDirectory() as folder:
        done = run_python(Path(folder), code, [str(one) for one in arguments])
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def products_of_torch() -> Iterator[None]:
    """Within, the CPU multiplies 16-bit floats by torch's kernels, as that device does, whatever its instructions."""
    able = torch.cpu.get_capabilities
    torch.cpu.get_capabilities = lambda: able() | {"avx512_bf16": True, "avx512_fp16": True}
    try:
        yield
    finally:
        torch.cpu.get_capabilities = able


@contextmanager
def other_device() -> Iterator[None]:
    """Within, DEVICE is a device one can compute on."""
    _setup_privateuseone_for_python_backend()
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    with _Mode(), products_of_torch():
        yield
