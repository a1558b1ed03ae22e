"""A transformers model without its weights: parameters on the meta device, buffers computed as the class does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, initialization

from ..core.errors import BadInput

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
# torch's, and transformers' own, which stand in for them while it fills weights in.
_FILLS = frozenset(
    getattr(where, name)
    for where in (nn.init, initialization)
    for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "constant_")
)
_LARGE = 1 << 26  # elements; no buffer that a model computes is as large
_MOST_PARAMETERS = 300_000  # of a model; the largest have 100,000


def auto_class(config: Any) -> Any:
    """The transformers auto class that makes the language model of `config`; None where it has none.

    A config with a text part is a multimodal model, also where transformers could make a text model of that part.
    """
    of_text = config.get_text_config(decoder=True) is config
    classes = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    for auto in (AutoModelForCausalLM, *classes) if of_text else classes:
        if type(config) in auto._model_mapping:
            return auto
    return None


def build_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The language model of `config`, towers and all, its parameters on the meta device and its buffers on the CPU.

    transformers itself builds all on the meta device and has `_init_weights` fill in the buffers, which not every class
    provides for; here a buffer is what the constructor of its module makes it.
    """
    with _parameters_on_meta(), _LargeOnMeta():
        model = auto_class(config).from_config(config, **({} if dtype is None else {"dtype": dtype})).eval()
    return model.requires_grad_(False)


class _LargeOnMeta(TorchFunctionMode):
    """What is too large for a buffer is created on the meta device at once, and what lies there is not filled: that
    takes torch longer than all else that a constructor does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _FILLS and (filled := args[0] if args else given["tensor"]).is_meta:
            return filled
        if func in _FACTORIES and given.get("device") is None and _elements(args) > _LARGE:
            given["device"] = "meta"
        if func is torch.arange and any(isinstance(n, int | float) and abs(n) > _LARGE for n in args):
            raise BadInput(f"config.json describes a model that numbers {max(args)} places; is it of a real one?")
        return func(*args, **given)


def _elements(args: tuple[Any, ...]) -> int:
    sizes = args[0] if args and isinstance(args[0], list | tuple | torch.Size) else args
    n = 1
    for size in sizes:
        n *= int(size)
    return n


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile lose their memory."""
    register, count = nn.Module.register_parameter, 0

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > _MOST_PARAMETERS:
            raise BadInput(
                f"config.json describes a model of more than {_MOST_PARAMETERS} tensors; is it of a real one?"
            )
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that are not saved in checkpoints, by their names in it."""
    return {n: b for n, b in module.named_buffers(remove_duplicate=False) if not _is_saved(module, n)}


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module; of tied parameters the first."""
    return dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if _is_saved(module, n)}


def _is_saved(module: nn.Module, buffer: str) -> bool:
    """As `module.state_dict()` has it, which takes far longer to ask of a mixture of thousands of experts."""
    path, _, own = buffer.rpartition(".")
    return own not in module.get_submodule(path)._non_persistent_buffers_set


def to_meta(module: nn.Module) -> None:
    """Move all of a module to the meta device. torch's own `to` makes anew what is there already."""
    part: Any
    for part in module.modules():
        tensors = (*part._parameters.values(), *part._buffers.values())
        if any(tensor is not None and not tensor.is_meta for tensor in tensors):
            part._apply(lambda tensor: tensor.to("meta"), recurse=False)


def set_buffers(module: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Give computed buffers copies of these values on `device`."""
    for name, value in buffers.items():
        path, _, own = name.rpartition(".")
        module.get_submodule(path).register_buffer(own, value.to(device, copy=True), persistent=False)
