"""Which parameters of a checkpoint make up each tensor of a GGUF file, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ..core.errors import BadInput
from ..models.skeleton import Skeleton
from .hyperparameters import form_of
from .tensor_map import EXPERT, Changes, by_rows, names_of, places_of, to_gguf

_FLOAT32 = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "ssm_conv1d.weight",
    "shortconv.conv.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file.

    parameters: on-disk HF names of what it is made of: one, or one per expert, stacked along a new first dimension;
    none where that is not known, in a file that llama.cpp's converter made. shape: in the file, the columns last.
    whole: whether it is all that is made of its parameters.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    changes: Changes = ()
    whole: bool = True

    @property
    def by_rows(self) -> bool:
        """Whether its parameters can be quantized, row by row, before they become this tensor."""
        return bool(self.parameters) and self.whole and by_rows(self.changes)

    @property
    def stacked(self) -> bool:
        """Whether it holds one matrix per expert."""
        return bool(self.parameters) and EXPERT.search(self.parameters[0]) is not None

    @property
    def matrix(self) -> bool:
        """Whether its type follows from the file type; all other tensors are float32, as llama.cpp requires."""
        return len(self.shape) > 1 and self.name.endswith(".weight") and not self.name.endswith(_FLOAT32)

    def read(self, read: Callable[[str], Tensor], config: Any) -> Tensor:
        """The tensor in its shape; `read` returns a parameter by its name."""
        parts = [to_gguf(self.changes, read(name), config) for name in self.parameters]
        return torch.stack(parts) if self.stacked else parts[0]


def layout(skeleton: Skeleton) -> list[Entry]:
    """The tensors of a GGUF file of this model, in the model's order.

    Raises BadInput for an architecture that cannot be written, and a parameter without a GGUF name.
    """
    config = skeleton.config
    form = form_of(config)
    names = names_of(form, config.num_hidden_layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    disk = dict(skeleton.shell_names())
    for k in range(skeleton.n_blocks):
        prefix = f"{skeleton.blocks_name}.{k}."
        disk |= {f"{prefix}{name}": on_disk for name, on_disk in skeleton.block_names(k).items()}
    if config.tie_word_embeddings:
        output = skeleton.model.get_output_embeddings()
        heads = [f"{name}.weight" for name, module in skeleton.model.named_modules() if module is output]
        disk = {name: on_disk for name, on_disk in disk.items() if name not in heads}
    grouped: dict[str, list[tuple[str, Changes, bool]]] = {}
    for name in disk:
        places = places_of(form, names, name)
        if not places:
            raise BadInput(f"{name}: GGUF has no name for this tensor in its architecture")
        for tensor, changes in places:
            grouped.setdefault(tensor, []).append((name, changes, len(places) == 1))
    entries = []
    for tensor, parts in grouped.items():
        name, changes, whole = parts[0]
        shape = tuple(to_gguf(changes, torch.empty(shapes[name], device="meta"), config).shape)
        shape = (len(parts), *shape) if EXPERT.search(name) else shape
        entries.append(Entry(tensor, tuple(disk[part] for part, _, _ in parts), shape, changes, whole))
    if form.untied and config.tie_word_embeddings:
        twin = next(entry for entry in entries if entry.name == "token_embd.weight")
        entries.append(Entry("output.weight", twin.parameters, twin.shape))
    return entries


def float_type(entry: Entry, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of an entry in a file of this float type."""
    return kind if entry.matrix else GGMLQuantizationType.F32
