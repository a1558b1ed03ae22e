"""Norms and gates of a block on a GPU, each by one kernel in place of several operations.

Such parts wait for memory: a norm of bfloat16 states as models write it moves nine times the bytes. Nothing is told
about an architecture: a module that looks like one the kernels compute is tried on random numbers beside its own code,
and keeps that where the two differ by more than a rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.machine import runs_triton

Forward = Callable[..., Any]
_ROWS = 64  # of the trial
_SAME, _NEAR = 0.98, 2.0**-7  # a sum in another order moves few results, by one unit in the last of bfloat16's places
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@contextmanager
def fused(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, `block` and copies of it compute norms and gates by kernels where they are not asked for gradients."""
    changed: list[nn.Module] = []
    if runs_triton(device):
        for module in block.modules():
            by_kernel = _by_kernel(module)
            if by_kernel is not None and "forward" not in vars(module) and _agrees(module, by_kernel):
                module.forward = partial(_forward, module, by_kernel)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


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


def _norm(module: Any, x: Tensor) -> Tensor:
    from .fused_kernels import rms_norm  # needs Triton

    eps = _eps(module)
    assert eps is not None
    return rms_norm(x, module.weight, eps)


def _gated(module: Any, x: Tensor) -> Any:
    from .fused_kernels import silu_times  # needs Triton

    return module.down_proj(silu_times(module.gate_proj(x), module.up_proj(x)))


@torch.no_grad()
def _agrees(module: nn.Module, by_kernel: Forward) -> bool:
    """Whether a kernel does what a module does, for numbers of all sizes: some clamp large ones."""
    random = torch.Generator().manual_seed(0)
    weight = next(module.parameters())
    x = torch.randn(_ROWS, weight.shape[-1], generator=random) + 0.5  # not centred: no norm that subtracts a mean
    x = (x * torch.logspace(-2, 4, _ROWS)[:, None]).to(weight.device, weight.dtype)
    try:
        want, got = type(module).forward(module, x), by_kernel(module, x)
        near = (want - got).abs() <= _NEAR * torch.maximum(want.abs(), _NEAR * want.abs().amax(-1, keepdim=True))
        return bool(near.all() & ((want == got).float().mean() >= _SAME))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of Triton, its compiler or the driver: the block's own code does without them
        return False
