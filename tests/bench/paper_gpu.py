"""A GPU on paper: the program's own code on fake CUDA tensors, every kernel counted and timed by a roofline.

No GPU, no driver and no values: torch's FakeTensorMode makes tensors that know their shape, dtype and device. Each
operation is one launch (a factorisation or a sort several) and takes the longer of its bytes over the memory's rate and
its arithmetic over the unit's. The host queues launches and runs ahead; reading a value makes it wait. The estimate
compares designs; only a card gives times. Needs g++: a build of torch without CUDA has no guard for CUDA devices.
"""

import ctypes
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


@dataclass(frozen=True)
class Card:
    """Rates a program can reach, in operations, bytes and seconds; an H100 as measured and published."""

    arithmetic: dict[str, float] = field(
        default_factory=lambda: {"bfloat16": 590e12, "tf32": 300e12, "float32": 37e12, "float64": 37e12}
    )
    size: int = 80_000_000_000
    memory: float = 2.4e12
    pageable: float = 10e9  # PCIe from memory that is not pinned
    host: float = 20e9  # the host's own memory
    launch: float = 5e-6
    view: float = 1.5e-6  # the host's time for an operation that launches nothing
    wait: float = 25e-6
    shortest: float = 2e-6  # kernel
    library: float = 0.4  # share of the arithmetic that factorisations and triangular solves reach


@dataclass
class Part:
    seconds: float = 0.0
    launches: int = 0
    waits: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    took: dict[str, float] = field(default_factory=dict)  # seconds of the card, by operation


_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "_grouped_mm": 0,
}  # where the factors begin
_LIBRARY = ("cholesky", "triangular")
_GOLDEN = (5**0.5 - 1) / 2
_NOTHING = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "set_",
    "lift_fresh", "resize_", "_resize_output_",
}  # fmt: skip
_SEVERAL = {"sort": 4, "argsort": 4, "linalg_cholesky_ex": 6, "linalg_solve_triangular": 6, "searchsorted": 1}


class PaperGpu(TorchDispatchMode):
    """Counts what is run inside it. `now`: seconds since `reset`; peak: bytes of CUDA memory."""

    def __init__(self, card: Card | None = None) -> None:
        super().__init__()
        _device_guard()
        self.card = card or Card()
        self.parts: dict[str, Part] = {}
        self._stack = ["other"]
        self._host = self._device = 0.0
        self._memory = self.peak = 0
        self.peak_in = ""
        self._known: set[int] = set()

    def reset(self) -> None:
        """Count from here; what is in memory stays there."""
        self.parts.clear()
        self._host = self._device = 0.0
        self.peak, self.peak_in = self._memory, "before"

    @property
    def now(self) -> float:
        return max(self._host, self._device)

    @property
    def total(self) -> Part:
        parts = list(self.parts.values())
        return Part(self.now, sum(p.launches for p in parts), sum(p.waits for p in parts))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._stack.append(name)
        before, inner = self.now, sum(p.seconds for p in self.parts.values())
        try:
            yield
        finally:
            self._stack.pop()
            elsewhere = sum(p.seconds for p in self.parts.values()) - inner
            self._part(name).seconds += self.now - before - elsewhere

    def _part(self, name: str) -> Part:
        return self.parts.setdefault(name, Part())

    def kernel(
        self, name: str, nbytes: float, arithmetic: float = 0.0, kind: str = "float32", *, launches: int = 1,
        least: float = 0.0,
    ) -> None:  # fmt: skip
        """Launch a kernel. least: seconds it takes however fast the card, such as a chain of dependent steps."""
        part, card = self._part(self._stack[-1]), self.card
        part.launches += launches
        part.operations[name] += launches
        share = card.library if any(word in name for word in _LIBRARY) else 1.0
        took = max(nbytes / card.memory, arithmetic / (card.arithmetic[kind] * share), least, card.shortest)
        part.took[name] = part.took.get(name, 0.0) + took
        self._host += launches * card.launch
        self._device = max(self._device, self._host) + took

    def wait(self) -> None:
        """The host reads a value."""
        part = self._part(self._stack[-1])
        part.waits += 1
        part.operations["wait"] += 1
        self._host = self.now + self.card.wait

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_card = any(x.device.type == "cuda" for x in given)
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            if on_card:
                self.wait()
            return True if name != "_local_scalar_dense" or given[0].dtype == torch.bool else 1
        out = func(*args, **kwargs)
        made = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self._remember(made)
        on_card |= any(x.device.type == "cuda" for x in made)
        nbytes = sum(x.numel() * x.element_size() for x in {id(x): x for x in (*given, *made)}.values())
        if name == "index":  # reads what it gives, not all that there is
            nbytes = 2 * made[0].numel() * made[0].element_size()
        if _is_view(func) or name in _NOTHING or func is torch.ops.prim.device.default:
            self._host += self.card.view if on_card else 0.0
        elif not on_card:
            self._host += self.card.view + nbytes / self.card.host
        elif name in ("_to_copy", "copy_") and len({x.device.type for x in (*given, *made)}) == 2:
            self._crosses(given, made, kwargs.get("non_blocking", False))
        else:
            self.kernel(name, nbytes, *_arithmetic(name, args, given), launches=_SEVERAL.get(name, 1))
        return out

    def _crosses(self, given: list[Tensor], made: list[Tensor], overlaps: bool) -> None:
        """A copy between the host and the card; one that overlaps is from or to pinned memory."""
        if overlaps:
            self._host += self.card.launch
            return
        part = self._part(self._stack[-1])
        part.launches += 1
        self._device = max(self._device, self._host) + given[-1].numel() * given[-1].element_size() / self.card.pageable
        self.wait()

    def _remember(self, made: list[Tensor]) -> None:
        for x in made:
            if x.device.type != "cuda":
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._memory += storage.nbytes()
                if self._memory > self.peak:
                    self.peak, self.peak_in = self._memory, self._stack[-1]
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._memory -= nbytes


class PaperValues:
    """What fake tensors cannot answer: values that are read, addresses, and attention as one kernel.

    Booleans are True; floats lie between 1 and 2, none like those near it, so that an error is not taken for all of an
    output; whole numbers read at once are bounds in the sequence searched last, evenly spaced.
    """

    def __init__(self, gpu: PaperGpu) -> None:
        self._gpu, self._searched = gpu, 0

    def patches(self) -> Iterator[Callable[[], None]]:
        """Put the answers in place; the results take them away."""
        yield replaced(FakeTensor, "tolist", lambda old: lambda x: self._read(x))
        yield replaced(Tensor, "pin_memory", lambda old: lambda x: x)
        yield replaced(Tensor, "data_ptr", lambda old: lambda x: _address(x) if isinstance(x, FakeTensor) else old(x))
        yield replaced(torch, "searchsorted", self._noted)
        yield replaced(torch.nn.functional, "scaled_dot_product_attention", lambda old: self._attention)

    def _noted(self, search: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(sorted_sequence: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._searched = sorted_sequence.numel()
            return search(sorted_sequence, *args, **kwargs)

        return noted

    def _read(self, x: Tensor) -> Any:
        if x.is_cuda:
            self._gpu.wait()
        return self._values(x)

    def _values(self, x: Tensor) -> Any:
        if x.dim() > 1:
            return [self._values(x[i]) for i in range(len(x))]
        if x.dtype == torch.bool:
            return [True] * len(x)
        if x.dtype.is_floating_point:
            return [1 + i * _GOLDEN % 1 for i in range(len(x))]
        return [i * self._searched // (len(x) - 1) for i in range(len(x))]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out, (batch, heads, length, size) = torch.empty_like(q), q.shape
        nbytes = sum(x.numel() * x.element_size() for x in (q, k, v, out))
        self._gpu.kernel("attention", nbytes, 1.5 * 2 * batch * heads * length * k.shape[2] * size, "bfloat16")
        return out


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata + x.storage_offset() * x.element_size()


def _arithmetic(name: str, args: Sequence[Any], given: list[Tensor]) -> tuple[float, str]:
    """Operations and the unit that does them."""
    if name in _PRODUCTS:
        left, right = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
        return 2.0 * left.numel() * right.shape[-1], _unit(left.dtype)
    n = given[0].shape[-1] if given and given[0].dim() else 0
    if "cholesky" in name:
        return given[0].numel() * n / 3, "float32"
    if "triangular" in name:
        return float(given[1].numel() * n), "float32"
    return 0.0, "float32"


def _unit(dtype: torch.dtype) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"
    if dtype == torch.float64:
        return "float64"
    gpu: Any = torch.backends.cuda.matmul
    return "tf32" if gpu.fp32_precision == "tf32" else "float32"


def _is_view(func: Any) -> bool:
    schema = func._schema
    if schema.is_mutable:
        return False
    return any(a.alias_info is not None for a in schema.arguments) and any(r.alias_info for r in schema.returns)


@cache
def _device_guard() -> None:
    """Register a guard for CUDA devices that does nothing, where torch has none."""
    if torch.version.cuda is not None:
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(_GUARD)
    at = Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{at}/include", "guard.cpp", "-o", "guard.so",
               f"-L{at}/lib", "-lc10"]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


def replaced(owner: Any, name: str, new: Callable[[Callable[..., Any]], Any]) -> Callable[[], None]:
    """Put `new(old)` in the place of an attribute; the result puts the old one back."""
    old = getattr(owner, name)
    setattr(owner, name, new(old))
    return lambda: setattr(owner, name, old)
