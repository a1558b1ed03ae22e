"""The model that is to be quantized, or was: a checkpoint whose weights are dequantized as they are read.

Many models are published only quantized (FP8, MXFP4, 4-bit integers). Read so, each looks like the unquantized
checkpoint it stands for: the same names, shapes and config, its weights in the model's 16-bit type.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.files import file_sha256
from ..core.untrusted import read_json
from ..formats.packed_weights import PackedWeight, TensorType, is_code, packed_weights
from ..formats.statement import stated_quantization, without_quantization
from ..models.checkpoint import FORMAT_FILES, Checkpoint
from ..models.skeleton import Skeleton

_TOLD_IN = (*FORMAT_FILES, "quant_config.json")  # files that say how weights are quantized; the last is AutoAWQ's
_CONV1D = ("gpt2", "openai-gpt")  # model types that keep the weights of their linears as [in, out]


class OriginalCheckpoint(Checkpoint):
    """A checkpoint as the unquantized model. One tensor is dequantized at a time, when it is read.

    config: without a quantization_config. quantization: what the checkpoint's weights are stored as, a few words, None
    where nothing is quantized. `nbytes` is that of the dequantized tensor, `total_bytes` what lies on disk. Inputs are
    not rounded, whatever the checkpoint's format says of them. Raises BadInput, when it is opened, for codes of a
    format that cannot be dequantized: they are never read as weights.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stated = self._stated()
        tensors = {name: TensorType(entry.shape, entry.dtype) for name, entry in self._entries.items()}
        conv1d = self.config.get("model_type") in _CONV1D
        try:
            found, self._beside = packed_weights(tensors, super().read, stated, conv1d)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None
        self._packed: dict[str, PackedWeight] = found
        self.config = without_quantization(self.config)
        self._kept: dict[str, Tensor] = {}
        self._dtype = _float_type(self.config, tensors)
        self._names = [*(n for n in self._entries if n not in self._beside and n not in found), *found]
        kinds = Counter(weight.kind for weight in found.values())
        self.quantization = ", ".join(kind for kind, _ in kinds.most_common()) or None

    def _stated(self) -> dict[str, Any] | None:
        """What the files say of how the weights are quantized."""
        return stated_of(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits every artifact that is made of these weights."""
        if self.quantization is None:
            return ()
        return (
            f"the original is itself quantized ({self.quantization}) and dequantized as it is read: what that lost "
            "stays lost, and figures compare with it, not with the model it was made from",
        )

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._packed or (name in self._entries and name not in self._beside)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape if name in self._packed else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._packed else super().dtype(name)

    def nbytes(self, name: str) -> int:
        if name not in self._packed:
            return super().nbytes(name)
        return int(torch.Size(self._packed[name].shape).numel()) * self._dtype.itemsize

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, or its codes."""
        return super().file_of(self._packed[name].parts[0] if name in self._packed else name)

    def read(self, name: str) -> Tensor:
        if name not in self._packed:
            return super().read(name)
        weight = self._packed[name]
        out = weight.decode(super().read, self._dtype)
        if tuple(out.shape) != weight.shape:
            raise BadInput(f"{self.folder}: {name} dequantizes to {list(out.shape)}, not {list(weight.shape)}")
        return out

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """As `read`, for a part along the first dimension; the two last weights that were dequantized for it are kept.

        The weights of a block's experts are asked for one expert after the other, each of two tensors.
        """
        if name not in self._packed:
            return super().read_rows(name, rows)
        kept = self._kept
        whole = kept[name] if name in kept else self.read(name)
        others = [(n, t) for n, t in kept.items() if n != name]
        self._kept = dict([*others[-1:], (name, whole)])
        return whole[rows]

    def file_hashes(self, known: Mapping[Path, str] = MappingProxyType({})) -> dict[str, str]:
        """As of any checkpoint, with the files that say how it is quantized."""
        told = [self.folder / name for name in _TOLD_IN if self.quantization and (self.folder / name).is_file()]
        return dict(sorted((super().file_hashes(known) | {file.name: file_sha256(file) for file in told}).items()))


def stated_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, from config.json or the files beside it; None when there is none."""

    def beside(name: str) -> dict[str, Any] | None:
        file = checkpoint.folder / name
        return read_json(file) if file.is_file() else None

    return stated_quantization(checkpoint.config, beside)


def check_no_codes(skeleton: Skeleton, reader: Checkpoint, but: Collection[str] = ()) -> None:
    """Raise BadInput for a parameter of the model that is stored as integers or in 8 bits: codes are no weights.

    but: linears, by on-disk name, whose codes a format reads.
    """
    inside = sorted(skeleton.on_disk_of_blocks() - skeleton.integers())
    for name in (*inside, *skeleton.shell_names().values()):
        if name in reader and name.removesuffix(".weight") not in but and is_code(kind := reader.dtype(name)):
            raise BadInput(
                f"{reader.folder}: {name} is a weight of the model, and {str(kind).removeprefix('torch.')} on disk: "
                "codes without anything that says what they stand for; give the original checkpoint"
            )


def _float_type(config: dict[str, Any], tensors: dict[str, TensorType]) -> torch.dtype:
    """The type that weights are dequantized to: the model's by config.json, else that of most of its 16-bit tensors."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for part in (config, inner or {}):
        stated = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if stated in ("bfloat16", "float16", "float32"):
            return getattr(torch, stated)  # type: ignore[no-any-return]
    wide = Counter(kind.dtype for kind in tensors.values() if kind.dtype in (torch.bfloat16, torch.float16))
    return wide.most_common(1)[0][0] if wide else torch.float32
