"""A checkpoint whose files are not here: for a plan, the names, shapes and types of its tensors are enough."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.untrusted import read_json
from ..formats.packed_weights import TensorType
from ..formats.statement import stated_quantization, without_quantization
from ..models.architecture import empty_model, model_config, stated_dtype
from ..models.checkpoint import Stored
from ..models.names import saved_tensors
from .original import OriginalCheckpoint

_NEXT_TOKENS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers")


class HeadersOnly(OriginalCheckpoint):
    """The tensors {name: type} of a model whose weights cannot be read.

    file: what they were learnt from. config: config.json; a quantization that it states is taken for that of the
    tensors. limits: what is not known so, for the plan.
    """

    def __init__(
        self, file: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorType], limits: tuple[str, ...] = ()
    ) -> None:
        self._given, self._limits = (dict(config), tensors), limits
        super().__init__(file)

    def _opened(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        config, tensors = self._given
        sizes = {name: math.prod(kind.shape) * kind.dtype.itemsize for name, kind in tensors.items()}
        file, self.folder = self.folder, self.folder.parent
        return config, {name: Stored(file, kind.dtype, kind.shape, 0, sizes[name]) for name, kind in tensors.items()}

    def _stated(self) -> dict[str, Any] | None:
        return stated_quantization(self.config, lambda name: None)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *self._limits)

    def read(self, name: str) -> Tensor:
        raise BadInput(f"{name}: no weights are there, only their names and shapes")

    def read_rows(self, name: str, rows: slice) -> Tensor:
        return self.read(name)


def headers_of_config(file: Path) -> HeadersOnly:
    """The unquantized checkpoint that transformers would write of the model in this config.json.

    Raises BadInput for a config that is no language model's.
    """
    said = read_json(file)
    config = without_quantization(said)
    dtype = getattr(torch, str(stated_dtype(config) or "float32").removeprefix("torch."))
    tensors = saved_tensors(empty_model(model_config(config), dtype))
    types = {name: TensorType(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return HeadersOnly(file, config, types, tuple(_unknown(said)))


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """What cannot be known without the files, a line each."""
    lines = [
        "from config.json alone: the names and shapes are those that transformers writes; whether the files have them, "
        "other tensors, NaN or a tokenizer that fits, only the checkpoint itself tells"
    ]
    stated = stated_quantization(config, lambda name: None)
    if stated is not None:
        lines.append(
            f"config.json says that the original is itself quantized ({stated.get('quant_method', 'unnamed')}); its "
            "size is counted as if it were not"
        )
    layers = next((n for key in _NEXT_TOKENS if (n := config.get(key))), None)
    if layers:
        lines.append(
            f"the layers that predict further tokens ({layers}) have no place in transformers' model: they are copied "
            "as they are, and not counted here"
        )
    return lines
