"""Which parameters of a checkpoint make up each tensor of a GGUF file, and how."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ..core.errors import BadInput
from ..models.family import GgufForm, TensorChange
from ..models.skeleton import Skeleton
from .hyperparameters import form_of
from .tensor_map import change_of, names_of, to_gguf

EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file.

    parameters: on-disk HF names of what it is made of: one, or one per expert, stacked along a new first dimension.
    shape: in the file, the columns last.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    change: TensorChange | None = None

    @property
    def stacked(self) -> bool:
        """Whether it holds one matrix per expert."""
        return EXPERT.search(self.parameters[0]) is not None

    @property
    def matrix(self) -> bool:
        """Whether its type follows from the file type; all other tensors are float32, as llama.cpp requires."""
        return len(self.shape) > 1 and self.name.endswith(".weight") and not self.name.endswith(_FLOAT32)

    def read(self, read: Callable[[str], Tensor], config: Any) -> Tensor:
        """The tensor in its shape; `read` returns a parameter by its name."""
        parts = [to_gguf(self.change, read(name), config) for name in self.parameters]
        return torch.stack(parts) if self.stacked else parts[0]


def layout(skeleton: Skeleton) -> list[Entry]:
    """The tensors of a GGUF file of this model, in the model's order.

    Raises BadInput for an architecture that cannot be written, and a parameter without a GGUF name.
    """
    config = skeleton.config
    form = form_of(config)
    names = names_of(form, config.num_hidden_layers)
    shapes = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters(remove_duplicate=False)}
    disk = dict(skeleton.shell_names())
    for k in range(skeleton.n_blocks):
        prefix = f"{skeleton.blocks_name}.{k}."
        disk |= {f"{prefix}{name}": on_disk for name, on_disk in skeleton.block_names(k).items()}
    if config.tie_word_embeddings:
        heads = skeleton.head_modules()
        disk = {name: on_disk for name, on_disk in disk.items() if name.removesuffix(".weight") not in heads}
    grouped: dict[str, list[str]] = {}
    for name in disk:
        grouped.setdefault(gguf_name(names, name), []).append(name)
    entries = [_entry(form, tensor, parts, disk, shapes) for tensor, parts in grouped.items()]
    if form.untied and config.tie_word_embeddings:
        twin = next(entry for entry in entries if entry.name == "token_embd.weight")
        entries.append(Entry("output.weight", twin.parameters, twin.shape))
    return entries


def gguf_name(names: gguf.TensorNameMap, parameter: str) -> str:
    """The GGUF tensor that holds a parameter of the model; raises BadInput when there is none."""
    merged = EXPERT.sub(".experts.", parameter)
    if ".experts.w" in merged:  # Mixtral: the map knows the names of its first checkpoints
        merged = re.sub(r"^model\.(layers\.\d+)\.(mlp|block_sparse_moe)\.", r"\1.feed_forward.", merged)
    found = names.get_name(merged, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise BadInput(f"{parameter}: GGUF has no name for this tensor in its architecture")
    return str(found)


def _entry(
    form: GgufForm, tensor: str, parts: list[str], disk: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Entry:
    change, shape = change_of(form, parts[0]), shapes[parts[0]]
    if change == "transposed":
        shape = shape[::-1]
    if EXPERT.search(parts[0]):
        shape = (len(parts), *shape)
    return Entry(tensor, tuple(disk[part] for part in parts), shape, change)


def float_type(entry: Entry, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of an entry in a file of this float type."""
    return kind if entry.matrix else GGMLQuantizationType.F32
