"""The types of the matrices that torch multiplies in the end, below every mode and every gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "convolution")}


class Multiplied(TorchDispatchMode):
    """While it is entered, notes in `types` the types of all that is multiplied in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _PRODUCTS:
            self.types |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))
