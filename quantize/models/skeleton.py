"""The model as a skeleton: built on the meta device, with one decoder block materialised at a time.

The blocks are found in the transformers class, not listed by hand. Everything around them, the shell (embedding,
position encoding, masks, final norm, head), runs as the class itself runs it, with the blocks replaced by taps.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput
from ..core.transfers import Transfers
from .architecture import check_outside_blocks, decoder_config, empty_model, model_config, stated_dtype
from .block_arguments import SAMPLES_FIRST, BlockArguments, Given, Handed, ModelArguments, marked, serves
from .building import computed_buffers, set_buffers
from .experts import CONTAINERS, Part, routers, split_experts
from .families import family_of
from .model_tensors import ModelTensors, TensorReader
from .names import TensorNames
from .towers import decoder_of, linears_on_disk, text_model, tower_names, without_head

_T = TypeVar("_T")
_ROUTER = "it chooses or weighs experts"
_FLOAT32 = {"deepseek_v4"}  # transformers' class multiplies float32 by what is loaded, and fails on 16 bit
_EMBEDDED_TOKENS = 4096  # embedded at a time


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer the recipe may quantize."""

    name: str  # on disk, without .weight
    module: str  # inside the block
    block: int
    out_features: int
    in_features: int
    transposed: bool  # Conv1D keeps its weight as [in, out]


class Skeleton:
    """A causal language model whose weights are read block by block.

    Of a multimodal model it is the text decoder, run in the whole model on text alone; `config` is the decoder's.

    Raises BadInput for an architecture that transformers does not know or that is not a stack of decoder blocks, and
    for tensors missing from the checkpoint.
    """

    def __init__(self, reader: TensorReader, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        whole = model_config(reader.config)
        self.config = decoder_config(whole)
        self.family = family_of(self.config.model_type)
        stored = _dtype(reader.config)
        self.dtype = dtype or (torch.float32 if self.config.model_type in _FLOAT32 else stored)
        self.model: Any = empty_model(whole, self.dtype)
        self._outputs = 0  # of a block; not known before the shell has run
        self._layout, self._width = SAMPLES_FIRST, torch.Size()
        self._seen: WeakValueDictionary[int, _Seen] = WeakValueDictionary()  # by seq_len
        self._reruns = False  # whether the shell must run again for each batch
        self._wide = _float32_modules(self.model, self.dtype)
        self._of_towers, self._text = tower_names(self.model), text_model(self.model)
        counts = (self.config.num_hidden_layers, getattr(self.config, "num_layers", None))  # of attentions, of blocks
        self.blocks_name, self._blocks = _find_blocks(self.model, counts)
        self._names = TensorNames(self.model, reader.names())
        self.reader = ModelTensors(reader, self._names)
        self._missing: list[str] = []
        self._place_tensors()
        self._computed = [computed_buffers(block) for block in self._blocks]
        self._all_computed = computed_buffers(self.model)
        self._blocks.to("meta")
        self._routers = [routers(block) for block in self._blocks]
        self._check_names()
        outside = [self.disk_name(name) for name in self._unplaced_shell()]
        check_outside_blocks(self.config.model_type, outside, [f"{name}.weight" for name in self.head_names()])

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
        for name in _stored(self.model):
            if not name.startswith(f"{self.blocks_name}.") and (disk := self.reader.place(name)) is not None:
                (self._towers if name in self._of_towers else self._shell)[name] = disk
        self._disk = self._shell | self._towers
        for k, names in enumerate(self._inside):
            self._disk |= {f"{self.blocks_name}.{k}.{name}": disk for name, disk in names.items()}

    def _block_places(self, prefix: str, block: nn.Module, parts: Mapping[str, Part]) -> dict[str, str]:
        """The names in `reader` of what block `prefix` stores, by the names in the block."""
        stored = _stored(block)
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
        return int(self._text.get_input_embeddings().weight.shape[0])

    def block(self, k: int) -> nn.Module:
        """Block `k`; its weights are on the meta device unless `blocks` has materialised it."""
        return self._blocks[k]

    def linears(self) -> list[LinearLayer]:
        """Every linear inside the blocks, in order. Embeddings, head and routers are not among them."""
        found = []
        for k, block in enumerate(self._blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D) and not self._stays(k, name):
                    disk = self.disk_name(f"{self.blocks_name}.{k}.{name}.weight").removesuffix(".weight")
                    first, second = module.weight.shape
                    if isinstance(module, Conv1D):
                        found.append(LinearLayer(disk, name, k, second, first, True))
                    else:
                        found.append(LinearLayer(disk, name, k, first, second, False))
        return found

    def _stays(self, k: int, name: str) -> bool:
        """Whether linear `name` of block `k` is none that the recipe may quantize."""
        return name in self._routers[k] or (k, name) in self._shared

    def round_inputs(self, linear: LinearLayer, how: Callable[[Tensor], Tensor]) -> None:
        """From now on `linear` multiplies its weight with what `how` makes of its inputs [..., in]."""
        module = self._blocks[linear.block].get_submodule(linear.module)
        module.register_forward_pre_hook(lambda _, args: (how(args[0]), *args[1:]))

    def disk_name(self, name: str) -> str:
        """The checkpoint's name for a parameter or saved buffer of the model; its own where the checkpoint lacks it."""
        if name in self._disk:
            return self._disk[name]
        return name if name in self.reader else self._names.saved(name)

    def block_names(self, k: int) -> dict[str, str]:
        """Name in `reader` of each parameter and saved buffer of block `k`, by its name inside the block."""
        return self._inside[k]

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
            for name, tensor in _stored(block).items()
            if not tensor.is_floating_point() and name in self._inside[k]
            for disk in self.reader.on_disk(self._inside[k][name])
        }

    def left_out(self) -> list[tuple[str, int, str]]:
        """(on-disk name, number of weights, why) of what is in the blocks, is a matrix and no linear to quantize."""
        found = []
        for k, block in enumerate(self._blocks):
            linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
            for name, parameter in block.named_parameters():
                path = name.rpartition(".")[0]
                if parameter.dim() < 2 or (path in linears and not self._stays(k, path)):
                    continue
                why = _ROUTER if path in self._routers[k] else _why_no_linear(block.get_submodule(path), parameter)
                why = "it is part of several blocks" if (k, path) in self._shared else why
                found.append((self._inside[k][name], parameter.numel(), why))
        return found

    @property
    def unused(self) -> list[str]:
        """The tensors on disk that are of no part of the model."""
        placed = set(self._disk.values())
        return [name for name in self._names.unused if name not in placed]

    def experts_around(self, linear: LinearLayer) -> int | None:
        """The number of experts among which a linear's expert is chosen; None for a linear of no routed expert."""
        steps = linear.module.split(".")
        for i in range(len(steps)):
            part = self._blocks[linear.block].get_submodule(".".join(steps[:i]))
            if isinstance(part, CONTAINERS):
                return len(part)
        return None

    def read_block(self, k: int) -> dict[str, Tensor]:
        """Block `k`'s tensors by their name inside the block, in the model's dtype, on the CPU."""
        stored = _stored(self._blocks[k])
        prefix = f"{self.blocks_name}.{k}."
        return {n: self._cast(prefix + n, self.reader.read(disk), stored[n]) for n, disk in self.block_names(k).items()}

    def _cast(self, name: str, tensor: Tensor, placeholder: Tensor) -> Tensor:
        """A tensor in the type in which transformers would load it."""
        wide = tensor.is_floating_point() and any(pattern.search(name) for pattern in self._wide)
        return tensor.to(torch.float32 if wide else placeholder.dtype)

    def blocks(self, start: int = 0, keep: bool = False, backwards: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Number and module of each block from `start` on, on the device, while the next one is read from disk.

        A block returns to the meta device when the iteration moves on, unless `keep`.
        """
        order = list(range(start, self.n_blocks))
        order = order[::-1] if backwards else order
        transfers = Transfers(self.device)
        with ThreadPoolExecutor(1) as pool:

            def fetch(k: int) -> Future[Callable[[], dict[str, Tensor]]]:
                return pool.submit(lambda: transfers.fetch(self.read_block(k)))

            ahead = fetch(order[0])
            for i, k in enumerate(order):
                tensors = ahead.result()()
                if i + 1 < len(order):
                    ahead = fetch(order[i + 1])
                block = self._blocks[k]
                set_buffers(block, self._computed[k], self.device)
                block.load_state_dict(tensors, assign=True, strict=True)
                del tensors
                block.requires_grad_(False)
                yield k, block
                if not keep:
                    block.to("meta")

    def whole(self) -> Any:
        """The model with all its weights, which must fit in memory: for what cannot run block by block."""
        self.open_shell()
        self._fill(self._towers, {n: b for n, b in self._all_computed.items() if n in self._of_towers})
        for _ in self.blocks(keep=True):
            pass
        return self.model

    def open_shell(self) -> None:
        """Materialise the shell: embeddings, final norm, head."""
        self._fill(self._shell, {n: b for n, b in self._all_computed.items() if self._in_shell(n)})
        first, _ = next(self.model.named_parameters())
        if first in self._towers:  # whose device some models take for that of all
            self._fill({first: self._towers[first]}, {})
        self.model.tie_weights()
        left = [n for n, p in self.model.named_parameters() if p.is_meta and self._in_shell(n)]
        if left:
            raise BadInput(f"the checkpoint has no tensor {left[0]}")
        self.model.requires_grad_(False)
        if not self._outputs:
            self._find_outputs()

    def _fill(self, places: Mapping[str, str], computed: Mapping[str, Tensor]) -> None:
        """Read what the model stores outside its blocks from the file, and set what it computes."""
        set_buffers(self.model, computed, self.device)
        stored = _stored(self.model)
        state = {n: self._cast(n, self.reader.read(disk), stored[n]).to(self.device) for n, disk in places.items()}
        self.model.load_state_dict(state, assign=True, strict=False)

    @torch.no_grad()
    def _find_outputs(self) -> None:
        """Find what a block returns, and the axes of its states, from the shapes that arrive further on."""
        ids = torch.zeros(3, 5, dtype=torch.long, device=self.device)
        for self._outputs in (1, 2, 3):
            try:
                with self._taps() as taps:
                    out = self._text.base_model(input_ids=ids, use_cache=False)[0]
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                continue
            self._check_all_run(taps)
            shape = taps[0].hidden.shape
            axis = next((i for i in range(len(shape) - 1) if shape[i : i + 2] == ids.shape), None)
            if axis is not None and all(t.hidden.shape == shape for t in taps) and out.shape[:-1] == ids.shape:
                self._layout, self._width = (axis, axis + 1), shape[:axis] + shape[axis + 2 :]
                return
        raise BadInput(
            f"model_type {self.config.model_type!r} is not supported: it does not call its blocks one after another, "
            "each with the hidden states of the one before"
        )

    def _check_all_run(self, taps: list["_Tap"]) -> None:
        """Raise BadInput for a block that the model passes over: nothing would be known of its inputs."""
        skipped = [k for k, tap in enumerate(taps) if tap.hidden is None]
        if skipped:
            raise BadInput(
                f"model_type {self.config.model_type!r} is not supported: its block {skipped[0]} is not run on text "
                "alone, and calibration is on text"
            )

    def close_shell(self) -> None:
        """Return the shell to the meta device; all but the head stays where it computes what blocks are given."""
        kept = set(self._text.base_model.modules()) if self._reruns else set()
        for name, module in self.model.named_modules():
            if not name.startswith(self.blocks_name) and module not in kept:
                for key, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def head_names(self) -> list[str]:
        """On-disk names of the linears outside the blocks: the output head."""
        return [self.disk_name(f"{name}.weight").removesuffix(".weight") for name in self.head_modules()]

    def head_modules(self) -> list[str]:
        """As `head_names`, by the names of the transformers class."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and self._in_shell(f"{name}.weight")
        ]

    def unquantized_modules(self) -> list[str]:
        """Names of modules that stay in 16 bit though a reader may take them for linears: head, routers, towers, and
        what the model has no place for. On disk, and as transformers calls those that are linears there.
        """
        routers = [f"{self.blocks_name}.{k}.{name}" for k, names in enumerate(self._routers) for name in names]
        routers += [f"{self.blocks_name}.{k}.{name}" for k, name in sorted(self._shared)]
        towers = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" in self._of_towers
        ]
        on_disk = [self.disk_name(f"{name}.weight").removesuffix(".weight") for name in routers]
        inside = dict.fromkeys(n for t in towers for n in self.reader.on_disk(self.disk_name(f"{t}.weight")))
        on_disk += [name.removesuffix(".weight") for name in inside]
        own = [name for name in routers + towers if isinstance(self.model.get_submodule(name), nn.Linear)]
        own += self.head_modules()
        beyond = linears_on_disk({name: len(self.reader.shape(name)) for name in self.unused})
        return list(dict.fromkeys([*self.head_names(), *on_disk, *own, *beyond]))

    def tower_tensors(self) -> dict[str, int]:
        """The tensors of the file that the towers are made of, and how many weights each has."""
        names = dict.fromkeys(disk for name in self._towers.values() for disk in self.reader.on_disk(name))
        return {name: math.prod(self.reader.shape(name)) for name in names}

    def by_all_names(self, schemes: dict[str, _T]) -> dict[str, _T]:
        """`schemes`, by on-disk names and by what readers call the linears.

        That is transformers' name and, for regular expressions on a multimodal model, vLLM's: it maps only whole names
        to its own. Experts have no others.
        """
        found = dict(schemes)
        for linear in self.linears():
            if linear.name in schemes and self.experts_around(linear) is None:
                found[f"{self.blocks_name}.{linear.block}.{linear.module}"] = schemes[linear.name]
                if self._of_towers:
                    found[f"language_model.model.layers.{linear.block}.{linear.module}"] = schemes[linear.name]
        return found

    @property
    def tied(self) -> bool:
        """Whether config.json, or transformers' default for the model, ties the head to the embedding."""
        return bool(getattr(self._text.config, "tie_word_embeddings", False))

    @torch.no_grad()
    def embed(self, tokens: Tensor, make: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
        """The hidden states [samples, seq_len, hidden] that enter the first block, for tokens [samples, seq_len].

        They lie on the device, or in the memory that `make` gives for such states of a number of samples.
        """
        out = None
        batch = max(1, _EMBEDDED_TOKENS // tokens.shape[1])
        for start in range(0, tokens.shape[0], batch):
            states = self.embedding(tokens[start : start + batch])
            if out is None:
                n = tokens.shape[0]
                out = states.new_empty(n, *states.shape[1:]) if make is None else make(states, n)
            out[start : start + batch] = states
        assert out is not None
        return out

    def embedding(self, tokens: Tensor) -> Tensor:
        """As `embed`, differentiable and for few tokens."""
        with self._taps() as taps:
            self._text.base_model(input_ids=tokens.to(self.device), use_cache=False)
        return self.samples_first(taps[0].hidden)

    def samples_first(self, hidden: Tensor) -> Tensor:
        """States as the blocks of the class return them, as [samples, tokens, ...]; known once the shell is open."""
        return hidden.movedim(self._layout, SAMPLES_FIRST)

    def block_arguments(self, tokens: Tensor) -> ModelArguments:
        """What the model passes each block besides the hidden states, for tokens [samples, seq_len]."""
        seen = self._seen.get(tokens.shape[1]) or self._look(tokens.shape[1])
        rerun = self._arguments if self._reruns else None
        return ModelArguments(tokens, self.device, seen, rerun, self._layout, self._width)

    def _look(self, seq_len: int) -> "_Seen":
        """The arguments of all blocks for one sequence, compared with those for others."""
        ids = torch.arange(3, device=self.device)[:, None].repeat(1, seq_len)  # 3 sequences of a repeated token
        seen = _Seen(self._arguments(ids[:1]))
        if not self.family.feeds and not self._reruns:  # families with a row are known to be independent of them
            others = self._arguments(ids[1:])
            self._reruns = not all(map(serves, seen, others))
            if not self._reruns:
                seen = _Seen(map(marked, seen, others))
        self._seen[seq_len] = seen
        return seen

    @torch.no_grad()
    def _arguments(self, tokens: Tensor) -> list[Given]:
        with self._taps() as taps:
            self._text.base_model(input_ids=tokens.to(self.device), use_cache=False)
        return [(tap.args, tap.kwargs) for tap in taps]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocab] for hidden states [tokens, hidden] that leave the last block."""
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """As `logits`, differentiable."""
        with self._taps(self._own_layout(hidden)):
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=self.device)
            logits: Tensor = self._text(input_ids=ids, use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The head's inputs [tokens, hidden], after the final norm, for hidden states that leave the last block."""
        with self._taps(self._own_layout(hidden)):
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = without_head(self._text)(input_ids=ids, use_cache=False).last_hidden_state[0]
        return out

    def _own_layout(self, hidden: Tensor) -> Tensor:
        """States of one sequence [tokens, ...] as the blocks of the class return them."""
        return hidden[None].to(self.device).movedim(SAMPLES_FIRST, self._layout)

    @contextmanager
    def _taps(self, result: Tensor | None = None) -> Iterator[list["_Tap"]]:
        """The model with its blocks replaced by taps that record their arguments and return `result` or their input."""
        parent, _, attribute = self.blocks_name.rpartition(".")
        owner = self.model.get_submodule(parent)
        taps = [_Tap(block, result, self._outputs) for block in self._blocks]
        setattr(owner, attribute, nn.ModuleList(taps))
        try:
            yield taps
        finally:
            setattr(owner, attribute, self._blocks)

    def check_shapes(self, shape: Callable[[str], tuple[int, ...] | None]) -> None:
        """Raise BadInput unless every parameter has the model's shape on disk.

        shape: the shape on disk by on-disk name; None for a packed weight, which is not checked.
        """
        for k, block in enumerate(self._blocks):
            stored = _stored(block)
            for name, disk in self._inside[k].items():
                self.reader.check_shape(disk, tuple(stored[name].shape), shape)
        stored = _stored(self.model)
        for name, disk in (self._shell | self._towers).items():
            self.reader.check_shape(disk, tuple(stored[name].shape), shape)

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

    def _unplaced_shell(self) -> list[str]:
        inside = f"{self.blocks_name}."
        return [n for n in _stored(self.model) if not n.startswith(inside) and n not in self._disk]

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


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module; of tied parameters the first."""
    saved = set(module.state_dict())
    return dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n in saved}


def _float32_modules(model: Any, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """What the names of tensors hold that transformers keeps in float32 when it loads the model in `dtype`."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return [re.compile(pattern.replace("*", ".*")) for pattern, wanted in plan.items() if wanted == torch.float32]


def run_block(
    block: nn.Module,
    hidden: Tensor,
    arguments: BlockArguments,
    *,
    device: torch.device,
    batch: int,
) -> None:
    """Run `block` over hidden [samples, seq_len, hidden] in place, `batch` samples at a time."""
    with torch.no_grad():
        for start in range(0, hidden.shape[0], batch):
            samples = slice(start, start + batch)
            hidden[samples] = arguments.call(block, hidden[samples].to(device), samples)


class _Seen(list[Given]):
    """The arguments of all blocks; a list that can be referred to weakly."""


class _Tap(nn.Module):
    """Stands in for a block: records its arguments, returns `result` or the hidden states unchanged, and a `Handed` for
    each further output."""

    def __init__(self, block: nn.Module, result: Tensor | None, outputs: int) -> None:
        super().__init__()
        self._outputs = outputs
        self._block = (block,)  # a tuple, so that the block does not become a submodule
        self._result = result
        self.hidden: Any = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        out = hidden if self._result is None else self._result
        return out if self._outputs == 1 else (out, *map(Handed, range(1, self._outputs)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = stated_dtype(config) or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadInput(f"config.json: dtype {name!r} is not bfloat16, float16 or float32")
    return dtype  # type: ignore[no-any-return]


_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_experts_per_token")


def experts_per_token(config: Any) -> int | None:
    """How many experts a model sends each token to; None where its config does not say, or says it layer by layer."""
    settings = config.to_dict()
    settings |= settings.get("ffn_config") or {}
    chosen = next((settings[name] for name in _PER_TOKEN if settings.get(name) is not None), None)
    return chosen if isinstance(chosen, int) else None


def _find_blocks(model: Any, counts: Sequence[int | None]) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with one entry a hidden layer, of the text decoder in a multimodal model."""
    decoder = {id(module) for module in decoder_of(text_model(model)).modules()}
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists.sort(key=lambda found: id(found[1]) not in decoder)
    for n in counts:
        for name, module in lists:
            if len(module) == n:
                return name, module
    raise BadInput(
        f"{type(model).__name__} has no list of {counts[0]} decoder blocks; its architecture is not supported"
    )
