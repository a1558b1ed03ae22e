"""Where everything of a model lies on disk: its blocks, their linears and experts, what is around them, and the towers.

The model is transformers' class on the meta device. Its blocks are found in it, not listed by hand.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput
from .architecture import (
    check_block_count,
    check_outside_blocks,
    decoder_config,
    empty_model,
    experts_per_token,
    model_config,
    stated_dtype,
)
from .building import computed_buffers, stored_tensors, to_meta
from .experts import CONTAINERS, Part, SplitExperts, routers, split_experts
from .families import family_of
from .model_tensors import ModelTensors, TensorReader
from .names import TensorNames
from .towers import decoder_of, linears_on_disk, runs_as_a_whole, text_model, tower_names

_T = TypeVar("_T")
_NUMBERED = re.compile(r"\.\d+\.")
_ROUTER = "it chooses or weighs experts"
_FLOAT32 = {"deepseek_v4", "xlstm"}  # transformers' class multiplies float32 by what is loaded, and fails on 16 bit


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer the recipe may quantize."""

    name: str  # on disk, without .weight
    module: str  # inside the block
    block: int
    out_features: int
    in_features: int
    transposed: bool  # Conv1D keeps its weight as [in, out]
    experts: int | None = None  # among which its expert is chosen; None for one of no routed expert


class PlacedModel:
    """A causal language model without weights, and the on-disk name of each of its tensors.

    Of a multimodal model it is the text decoder; `config` is the decoder's. served_dtype: in which servers run it, also
    where transformers' class needs float32. experts_per_token: to how many experts it sends each token; None where its
    config does not say, or says it layer by layer.

    Raises BadInput for an architecture that transformers does not know or that is not a stack of decoder blocks, and
    for tensors missing from the checkpoint.
    """

    def __init__(self, reader: TensorReader, *, dtype: torch.dtype | None = None) -> None:
        whole = model_config(reader.config)
        self.config = decoder_config(whole)
        check_block_count(self.config, len(reader.names()))
        self.family = family_of(self.config.model_type)
        stated = _dtype(reader.config)
        self.dtype = dtype or (torch.float32 if self.config.model_type in _FLOAT32 else stated)
        self.served_dtype = dtype or stated
        self.model: Any = empty_model(whole, self.dtype)
        self._of_towers, self._text = tower_names(self.model), text_model(self.model)
        counts = (self.config.num_hidden_layers, getattr(self.config, "num_layers", None))  # of attentions, of blocks
        self.blocks_name, self._blocks = _find_blocks(self.model, counts)
        self._names = TensorNames(self.model, reader.names())
        self.reader = ModelTensors(reader, self._names)
        self._missing: list[str] = []
        inside = f"{self.blocks_name}."
        stored = stored_tensors(self.model)
        self._around = {name: tuple(tensor.shape) for name, tensor in stored.items() if not name.startswith(inside)}
        self._place_tensors()
        self._computed = [computed_buffers(block) for block in self._blocks]
        self._all_computed = computed_buffers(self.model)
        to_meta(self._blocks)
        self._routers = [routers(block) for block in self._blocks]
        self._experts = [
            {path: len(part) for path, part in block.named_modules() if isinstance(part, CONTAINERS)}
            for block in self._blocks
        ]
        self.experts_per_token = experts_per_token(self.config)
        self._linears = self._find_linears()
        self._check_names()
        outside = [self.disk_name(name) for name in self._around if name not in self._disk]
        check_outside_blocks(self.config.model_type, outside, [f"{name}.weight" for name in self.head_names()])

    @property
    def is_called_by_part(self) -> bool:
        """Whether transformers' class runs its text model by itself, and never the whole."""
        return not runs_as_a_whole(self.model)

    def _place_tensors(self) -> None:
        """Split the experts and find the on-disk name of every parameter and saved buffer."""
        self._inside: list[dict[str, str]] = []
        self._shared: set[tuple[int, str]] = set()  # modules by block whose weights are those of another block too
        self.fused_experts: set[str] = set()  # classes that have no files with a tensor for each expert
        self.padded_experts = False  # whether transformers wants weights for experts that have none
        for k, block in enumerate(self._blocks):
            prefix = f"{self.blocks_name}.{k}."
            kinds = {path: type(module).__name__ for path, module in block.named_modules()}
            parts = split_experts(block, self._names.expert_names)
            fused = {part.fused for part in parts.values() if not self._names.expert_names(part.fused)}
            self.fused_experts |= {kinds[name.rpartition(".")[0]] for name in fused}
            self.padded_experts |= any(getattr(m, "identities", 0) for m in block.modules())
            self._inside.append(self._block_places(prefix, block, parts))
        self._shell: dict[str, str] = {}
        self._towers: dict[str, str] = {}
        for name in self._around:
            if (disk := self.reader.place(name)) is not None:
                (self._towers if name in self._of_towers else self._shell)[name] = disk
        self._disk = self._shell | self._towers
        for k, names in enumerate(self._inside):
            self._disk |= {f"{self.blocks_name}.{k}.{name}": disk for name, disk in names.items()}

    def _block_places(self, prefix: str, block: nn.Module, parts: Mapping[str, Part]) -> dict[str, str]:
        """The names in `reader` of what block `prefix` stores, by the names in the block."""
        stored = stored_tensors(block)
        places: dict[str, str | None] = {
            n: self.reader.place(prefix + n) or self._of_other_block(prefix, n) for n in stored if n not in parts
        }
        on_disk = next((d.removesuffix(n) for n, d in places.items() if d and d.endswith(n)), prefix)
        for name, part in parts.items():
            likely = tuple(dict.fromkeys((on_disk + name, prefix + name)))
            shape = tuple(stored[name].shape)
            places[name] = self.reader.place_part(likely, prefix + part.fused, part, shape)
        self._missing += [self._names.saved(prefix + name) for name, disk in places.items() if disk is None]
        return {name: disk for name in stored if (disk := places[name]) is not None}

    def _of_other_block(self, prefix: str, name: str) -> str | None:
        """The name in `reader` of a parameter of block `prefix` that is another block's too."""
        other = self.model.all_tied_weights_keys.get(prefix + name)
        if other is None or not other.startswith(f"{self.blocks_name}."):
            return None
        k, _, inside = other.removeprefix(f"{self.blocks_name}.").partition(".")
        self._shared |= {(int(k), inside.rpartition(".")[0]), (len(self._inside), name.rpartition(".")[0])}
        return self.reader.place(other)

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding of tokens."""
        return int(self.embeddings.weight.shape[0])

    @property
    def embeddings(self) -> Any:
        """The module that embeds tokens."""
        return self._text.get_input_embeddings()

    def block(self, k: int) -> nn.Module:
        """Block `k`; its weights are on the meta device unless `blocks` has materialised it."""
        return self._blocks[k]

    def linears(self) -> list[LinearLayer]:
        """Every linear inside the blocks, in order. Embeddings, head and routers are not among them."""
        return list(self._linears)

    def _find_linears(self) -> list[LinearLayer]:
        found = []
        for k, block in enumerate(self._blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D) and not self._stays(k, name):
                    disk = self.disk_name(f"{self.blocks_name}.{k}.{name}.weight").removesuffix(".weight")
                    first, second = module.weight.shape
                    transposed = isinstance(module, Conv1D)
                    n_out, n_in = (second, first) if transposed else (first, second)
                    found.append(LinearLayer(disk, name, k, n_out, n_in, transposed, self._experts_around(k, name)))
        return found

    def _experts_around(self, k: int, module: str) -> int | None:
        return next((n for path, n in self._experts[k].items() if module.startswith(f"{path}.")), None)

    def _stays(self, k: int, name: str) -> bool:
        """Whether linear `name` of block `k` is none that the recipe may quantize."""
        return name in self._routers[k] or (k, name) in self._shared

    def disk_name(self, name: str) -> str:
        """The checkpoint's name for a parameter or saved buffer of the model; its own where the checkpoint lacks it."""
        if name in self._disk:
            return self._disk[name]
        return name if name in self.reader else self._names.saved(name)

    def places(self) -> dict[str, str]:
        """Name in `reader` of each parameter and saved buffer of the model that the file has."""
        return self._disk

    def block_names(self, k: int) -> dict[str, str]:
        """Name in `reader` of each parameter and saved buffer of block `k`, by its name inside the block."""
        return self._inside[k]

    @cached_property
    def nbytes(self) -> int:
        """Of all tensors of the file, as they are read."""
        return sum(self.reader.nbytes(name) for name in self.reader.names())

    @property
    def parameters(self) -> int:
        """How many weights the checkpoint has."""
        return sum(math.prod(self.reader.shape(name)) for name in self.reader.names())

    @cached_property
    def bytes_of_blocks(self) -> list[int]:
        """Of the tensors of each block, as they are read."""
        return [sum(map(self.reader.nbytes, self.block_names(k).values())) for k in range(self.n_blocks)]

    def written_with(self, k: int) -> dict[str, str]:
        """As `block_names`, without what is an earlier block's too."""
        earlier = {disk for names in self._inside[:k] for disk in names.values()} if self._shared else set()
        return {name: disk for name, disk in self._inside[k].items() if disk not in earlier}

    def shell_names(self) -> dict[str, str]:
        """On-disk name of each parameter and saved buffer outside the blocks; a tied head that is not on disk is left
        out."""
        return self._shell

    def parameters_on_disk(self) -> list[str]:
        """The names in `reader` of all parameters and saved buffers of the text model, in order."""
        inside = (name for names in self._inside for name in names.values())
        return list(dict.fromkeys([*self._shell.values(), *inside]))

    def on_disk_of_blocks(self) -> set[str]:
        """The tensors of the file that the blocks are made of."""
        return {disk for names in self._inside for name in names.values() for disk in self.reader.on_disk(name)}

    def integers(self) -> set[str]:
        """The tensors of the file that are integers in the blocks of the model too."""
        return {
            disk
            for k, block in enumerate(self._blocks)
            for name, tensor in stored_tensors(block).items()
            if not tensor.is_floating_point() and name in self._inside[k]
            for disk in self.reader.on_disk(self._inside[k][name])
        }

    def left_out(self) -> list[tuple[str, int, str]]:
        """(on-disk name, number of weights, why) of what is in the blocks, is a matrix and no linear to quantize.

        What several blocks share is there once.
        """
        return self._left_out

    @cached_property
    def _left_out(self) -> list[tuple[str, int, str]]:
        found: dict[str, tuple[str, int, str]] = {}
        for k, block in enumerate(self._blocks):
            linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
            for name, parameter in block.named_parameters():
                path = name.rpartition(".")[0]
                if parameter.dim() < 2 or (path in linears and not self._stays(k, path)):
                    continue
                why = _ROUTER if path in self._routers[k] else _why_no_linear(block.get_submodule(path), parameter)
                why = "it is part of several blocks" if (k, path) in self._shared else why
                disk = self._inside[k][name]
                found.setdefault(disk, (disk, parameter.numel(), why))
        return list(found.values())

    def joined(self, written: Iterable[str]) -> dict[str, list[str]]:
        """The patterns of all tensors that transformers makes one parameter of as it loads them, by tensor: those of
        the file and, one for many alike, those that are `written` in their place.
        """
        return {name: converter.source_patterns for name, converter in self._names.converters(written).items()}

    @property
    def unused(self) -> list[str]:
        """The tensors on disk that are of no part of the model."""
        placed = set(self._disk.values())
        return [name for name in self._names.unused if name not in placed]

    @property
    def experts_names(self) -> set[str]:
        """What the modules are called that hold experts, in their own block's or attention's module."""
        return {path.rpartition(".")[2] for containers in self._experts for path in containers}

    @property
    def tells_experts_apart(self) -> bool:
        """Whether every expert of the model is given plain hidden states, of any tokens one likes."""
        modules = (module for block in self._blocks for module in block.modules())
        return all(isinstance(module, SplitExperts) for module in modules if isinstance(module, CONTAINERS))

    def head_names(self) -> list[str]:
        """On-disk names of the linears outside the blocks: the output head."""
        return [self.disk_name(f"{name}.weight").removesuffix(".weight") for name in self.head_modules()]

    def head_modules(self) -> list[str]:
        """As `head_names`, by the names of the transformers class."""
        return [name for name in self._linears_around if f"{name}.weight" not in self._of_towers]

    @cached_property
    def _linears_around(self) -> list[str]:
        """The names of the linears outside the blocks: heads and those of towers."""
        inside, named = f"{self.blocks_name}.", self.model.named_modules()
        return [name for name, module in named if isinstance(module, nn.Linear) and not name.startswith(inside)]

    def unquantized_modules(self, but: Collection[str] = ()) -> list[str]:
        """Names of modules that stay in 16 bit though a reader may take them for linears: head, routers, towers, and
        what the model has no place for. On disk, and as transformers calls those that are linears there.

        but: on-disk names of what is quantized of it.
        """
        routers = [f"{self.blocks_name}.{k}.{name}" for k, names in enumerate(self._routers) for name in names]
        routers += [f"{self.blocks_name}.{k}.{name}" for k, name in sorted(self._shared)]
        towers = [name for name in self._linears_around if f"{name}.weight" in self._of_towers]
        on_disk = [self.disk_name(f"{name}.weight").removesuffix(".weight") for name in routers]
        inside = dict.fromkeys(n for t in towers for n in self.reader.on_disk(self.disk_name(f"{t}.weight")))
        on_disk += [name.removesuffix(".weight") for name in inside]
        own = [name for name in routers + towers if isinstance(self.model.get_submodule(name), nn.Linear)]
        own += self.head_modules()
        beyond = linears_on_disk({name: len(self.reader.shape(name)) for name in self.unused})
        taken = {*but, *(name for name, disk in self.tower_linears().items() if disk in but)}
        return [n for n in dict.fromkeys([*self.head_names(), *on_disk, *own, *beyond]) if n not in taken]

    def tower_tensors(self) -> dict[str, int]:
        """The tensors of the file that the towers are made of, and how many weights each has."""
        names = dict.fromkeys(disk for name in self._towers.values() for disk in self.reader.on_disk(name))
        return {name: math.prod(self.reader.shape(name)) for name in names}

    def tower_linears(self) -> dict[str, str]:
        """On-disk name of each linear in the numbered blocks of the towers, by its name in the transformers class.

        Only those that are one tensor of the file, and that are called as linears.
        """
        found = {}
        for name in self._linears_around:
            module = self.model.get_submodule(name)
            if type(module) is nn.Linear and f"{name}.weight" in self._towers and _NUMBERED.search(name):
                disk = self._towers[f"{name}.weight"]
                if self.reader.on_disk(disk) == [disk] and disk.endswith(".weight"):
                    found[name] = disk.removesuffix(".weight")
        return found

    def by_all_names(self, schemes: dict[str, _T]) -> dict[str, _T]:
        """`schemes`, by on-disk names and by what readers call the linears.

        That is transformers' name and, for regular expressions on a multimodal model, vLLM's: it maps only whole names
        to its own. Experts have no others.
        """
        others = ((other, name) for name, several in self._other_names.items() for other in several)
        return schemes | {other: schemes[name] for other, name in others if name in schemes}

    @cached_property
    def _other_names(self) -> dict[str, list[str]]:
        """What else the linears are called that belong to no expert, by on-disk name."""
        parents = [self.blocks_name, *(["language_model.model.layers"] if self._of_towers else [])]
        single = (linear for linear in self._linears if linear.experts is None)
        return {x.name: [f"{parent}.{x.block}.{x.module}" for parent in parents] for x in single}

    @property
    def tied(self) -> bool:
        """Whether config.json, or transformers' default for the model, ties the head to the embedding."""
        return bool(getattr(self._text.config, "tie_word_embeddings", False))

    def check_shapes(self, shape: Callable[[str], tuple[int, ...] | None]) -> None:
        """Raise BadInput unless every parameter has the model's shape on disk.

        shape: the shape on disk by on-disk name; None for a packed weight, which is not checked.
        """
        for k, block in enumerate(self._blocks):
            stored = stored_tensors(block)
            for name, disk in self._inside[k].items():
                self.reader.check_shape(disk, tuple(stored[name].shape), shape)
        for name, disk in (self._shell | self._towers).items():
            self.reader.check_shape(disk, self._around[name], shape)

    def _check_names(self) -> None:
        if missing := self._missing:
            other = ""
            if self.unused:
                other = f" and has {len(self.unused)} that the model does not have, the first {self.unused[0]}"
            raise BadInput(
                f"{self.config.model_type}: the checkpoint lacks {len(missing)} tensors, the first {missing[0]}"
                f"{other}; "
                "is config.json the one that belongs to these weights?"
            )

    def _in_shell(self, name: str) -> bool:
        """Whether a parameter or buffer of the model is neither in a block nor in a tower."""
        return not name.startswith(f"{self.blocks_name}.") and name not in self._of_towers


def _why_no_linear(module: nn.Module, parameter: Tensor) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    stacked = f"weights stacked in a way that is not known ({kind})"
    return stacked if parameter.dim() > 2 else f"a parameter of {kind}, not a linear layer"


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = stated_dtype(config) or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadInput(f"config.json: dtype {name!r} is not bfloat16, float16 or float32")
    return dtype  # type: ignore[no-any-return]


def _find_blocks(model: Any, counts: Sequence[int | None]) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with one entry a hidden layer, of the text decoder in a multimodal model."""
    decoder = {id(module) for module in decoder_of(text_model(model)).modules()}
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    text = (type(model.config), type(decoder_config(model.config)))
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) not in text)
    towers = {id(module) for part in parts for module in part.modules()}
    lists.sort(key=lambda found: (id(found[1]) not in decoder, id(found[1]) in towers))
    for n in counts:
        for name, module in lists:
            if len(module) == n:
                return name, module
    raise BadInput(
        f"{type(model).__name__} has no list of {counts[0]} decoder blocks; its architecture is not supported"
    )
