"""Norms, gates and rotary embeddings of a block on a GPU, each by one kernel in place of several operations.

Such parts wait for memory: a norm of bfloat16 states as models write it moves nine times the bytes. Nothing is told
about an architecture: a module or function that looks like one the kernels compute is tried on random numbers beside
its own code, and keeps that where the two differ by more than a rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from ..core.machine import runs_triton

Forward = Callable[..., Any]
_ROWS, _TOKENS = 64, 8  # of a trial
_SAME, _NEAR = 0.98, 2.0**-7  # a sum in another order moves few results, by one unit in the last of bfloat16's places
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROTATES = "apply_rotary_pos_emb"  # as transformers' models call it, a function beside their classes


@contextmanager
def fused(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, `block` and copies of it compute such parts by kernels where they are not asked for gradients."""
    changed: list[nn.Module] = []
    rotating: list[tuple[dict[str, Any], Forward]] = []
    if runs_triton(device):
        here = next((x.device for x in block.parameters()), device)
        for module in block.modules():
            by_kernel = _by_kernel(module)
            if by_kernel is not None and "forward" not in vars(module) and _agrees(module, by_kernel):
                module.forward = partial(_forward, module, by_kernel)
                changed.append(module)
            names = _names(module)
            own = names.get(_ROTATES)
            if callable(own) and not isinstance(own, partial) and _rotates(own, here):
                names[_ROTATES] = partial(_rotated, own)
                rotating.append((names, own))
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for names, own in rotating:
            names[_ROTATES] = own


def _forward(module: nn.Module, by_kernel: Forward, *given: Any, **named: Any) -> Any:
    """In the place of `module.forward`; a copy of the module gets a copy of this, with itself."""
    if torch.is_grad_enabled() or named or len(given) != 1 or given[0].dtype != torch.bfloat16:
        return type(module).forward(module, *given, **named)
    return by_kernel(module, *given)


def _by_kernel(module: nn.Module) -> Forward | None:
    """What computes a module that looks like one of those known here."""
    if any(x.dtype != torch.bfloat16 for x in module.parameters()):
        return None
    own, inside = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    if not inside and own.keys() == {"weight"} and own["weight"].dim() == 1 and _eps(module) is not None:
        return _norm
    if not own and inside.keys() == _GATED and isinstance(inside["act_fn"], nn.Module) and _is_silu(inside["act_fn"]):
        return _gated
    return None


def _eps(module: nn.Module) -> float | None:
    found = vars(module).get("variance_epsilon", vars(module).get("eps"))
    return found if isinstance(found, float) else None


def _is_silu(act: nn.Module) -> bool:
    return type(act).__name__ in ("SiLU", "SiLUActivation")


def _names(module: nn.Module) -> dict[str, Any]:
    """What the code of a module calls by name."""
    return getattr(unwrap(type(module).forward), "__globals__", {})


def _rotated(own: Forward, *given: Any, **named: Any) -> Any:
    """In the place of `own` (q, k, cos, sin), q and k [samples, heads, seq_len, size]."""
    plain = len(given) == 4 and not named and not torch.is_grad_enabled()
    if not plain or not all(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in given):
        return own(*given, **named)
    q, k, cos, sin = given
    turned = cos.shape == sin.shape and cos.dim() == 3 and len(cos) in (1, len(q))
    if not turned or any(x.dim() != 4 or len(x) != len(q) or x.shape[2:] != cos.shape[1:] for x in (q, k)):
        return own(*given)
    from .fused_kernels import rotate  # needs Triton

    return rotate(q, cos, sin), rotate(k, cos, sin)


def _norm(module: Any, x: Tensor) -> Tensor:
    from .fused_kernels import rms_norm  # needs Triton

    eps = _eps(module)
    assert eps is not None
    return rms_norm(x, module.weight, eps)


def _gated(module: Any, x: Tensor) -> Any:
    from .fused_kernels import silu_times  # needs Triton

    return module.down_proj(silu_times(module.gate_proj(x), module.up_proj(x)))


def _agrees(module: nn.Module, by_kernel: Forward) -> bool:
    """Whether a kernel does what a module does, for numbers of all sizes: some clamp large ones."""
    weight = next(module.parameters())
    x = _numbers(_ROWS, weight.shape[-1]) + 0.5  # not centred: no norm that subtracts a mean
    x = (x * torch.logspace(-2, 4, _ROWS)[:, None]).to(weight.device, weight.dtype)
    return _same(lambda: type(module).forward(module, x), lambda: by_kernel(module, x))


@cache
def _rotates(own: Forward, device: torch.device) -> bool:
    """Whether a function turns pairs of numbers as `rotate` does: some models pair neighbours, or turn a part."""
    numbers = _numbers(2, 6, _TOKENS, 32).to(device, torch.bfloat16)
    q, k, cos, sin = numbers[:, :3], numbers[:, 3:4], numbers[:1, 4], numbers[:1, 5]
    return _same(lambda: torch.cat(own(q, k, cos, sin), 1), lambda: torch.cat(_rotated(own, q, k, cos, sin), 1))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _same(wanted: Callable[[], Tensor], found: Callable[[], Tensor]) -> bool:
    """Whether two computations differ by no more than a rounding here and there."""
    try:
        want, got = wanted(), found()
        near = (want - got).abs() <= _NEAR * torch.maximum(want.abs(), _NEAR * want.abs().amax(-1, keepdim=True))
        return bool(near.all() & ((want == got).float().mean() >= _SAME))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of Triton, its compiler or the driver: the block's own code does without them
        return False
