"""The model as a skeleton: built on the meta device, with one decoder block materialised at a time.

The blocks are found in the transformers class, not listed by hand. Everything around them, the shell (embedding,
position encoding, masks, final norm, head), runs as the class itself runs it, with the blocks replaced by taps.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput
from .architecture import check_outside_blocks, empty_model, text_config
from .block_arguments import BlockArguments, check_same
from .experts import split_experts
from .families import UNLISTED, family_of

_EMBEDDED_TOKENS = 4096  # embedded at a time


class TensorReader(Protocol):
    """A source of tensors by on-disk name: a checkpoint, or an artifact that dequantizes as it reads."""

    config: dict[str, Any]

    def __contains__(self, name: object) -> bool: ...
    def read(self, name: str) -> Tensor: ...


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

    Raises BadInput for an architecture that transformers does not know or that is not a stack of decoder blocks, and
    for tensors missing from the checkpoint.
    """

    def __init__(self, reader: TensorReader, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.reader, self.device = reader, device
        self.config = text_config(reader.config)
        self.family = family_of(self.config.model_type)
        self.dtype = dtype or _dtype(reader.config)
        self.model: Any = empty_model(self.config, self.dtype)
        self.model.requires_grad_(False)
        self.blocks_name, self._blocks = _find_blocks(self.model, self.config.num_hidden_layers)
        if self.family.experts is not None:
            for block in self._blocks:
                split_experts(block, self.family.experts, self.family.expert_names)
        self._shell_names = [n for n, _ in self.model.named_parameters() if not n.startswith(self.blocks_name + ".")]
        self._check_names()
        outside = [disk for disk in map(self.disk_name, self._shell_names) if disk not in reader]
        check_outside_blocks(self.config.model_type, outside, [f"{name}.weight" for name in self.head_names()])

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding of tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def block(self, k: int) -> nn.Module:
        """Block `k`; its weights are on the meta device unless `blocks` has materialised it."""
        return self._blocks[k]

    def linears(self) -> list[LinearLayer]:
        """Every linear inside the blocks, in order. Embeddings, head and routers are not among them."""
        found = []
        for k, block in enumerate(self._blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D) and name not in self.family.routers:
                    disk = self.disk_name(f"{self.blocks_name}.{k}.{name}.weight").removesuffix(".weight")
                    first, second = module.weight.shape
                    if isinstance(module, Conv1D):
                        found.append(LinearLayer(disk, name, k, second, first, True))
                    else:
                        found.append(LinearLayer(disk, name, k, first, second, False))
        return found

    def round_inputs(self, linear: LinearLayer, how: Callable[[Tensor], Tensor]) -> None:
        """From now on `linear` multiplies its weight with what `how` makes of its inputs [..., in]."""
        module = self._blocks[linear.block].get_submodule(linear.module)
        module.register_forward_pre_hook(lambda _, args: (how(args[0]), *args[1:]))

    def disk_name(self, name: str) -> str:
        """The checkpoint's name for a parameter of the model."""
        if name not in self.reader:
            name = self.family.disk_name(name)
        prefix = f"{self.model.base_model_prefix}."
        if name not in self.reader and name.startswith(prefix) and name.removeprefix(prefix) in self.reader:
            return name.removeprefix(prefix)
        return name

    def block_names(self, k: int) -> dict[str, str]:
        """On-disk name of each parameter of block `k`, by its name inside the block."""
        return {n: self.disk_name(f"{self.blocks_name}.{k}.{n}") for n, _ in self._blocks[k].named_parameters()}

    def shell_names(self) -> dict[str, str]:
        """On-disk name of each parameter outside the blocks; a tied head that is not on disk is left out."""
        names = {n: self.disk_name(n) for n in self._shell_names}
        return {n: disk for n, disk in names.items() if disk in self.reader}

    def read_block(self, k: int) -> dict[str, Tensor]:
        """Block `k`'s tensors by their name inside the block, in the model's dtype, on the CPU."""
        return {n: self.reader.read(disk).to(self.dtype) for n, disk in self.block_names(k).items()}

    def blocks(self, start: int = 0, keep: bool = False, backwards: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Number and module of each block from `start` on, on the device, while the next one is read from disk.

        A block returns to the meta device when the iteration moves on, unless `keep`.
        """
        order = list(range(start, self.n_blocks))
        order = order[::-1] if backwards else order
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[dict[str, Tensor]] = pool.submit(self.read_block, order[0])
            for i, k in enumerate(order):
                tensors = ahead.result()
                if i + 1 < len(order):
                    ahead = pool.submit(self.read_block, order[i + 1])
                block = self._blocks[k]
                _fill_buffers(self.model, block, self.device)
                block.load_state_dict({n: t.to(self.device) for n, t in tensors.items()}, assign=True, strict=True)
                block.requires_grad_(False)
                yield k, block
                if not keep:
                    block.to("meta")

    def whole(self) -> Any:
        """The model with all its weights, which must fit in memory: for what cannot run block by block."""
        self.open_shell()
        for _ in self.blocks(keep=True):
            pass
        return self.model

    def open_shell(self) -> None:
        """Materialise the shell: embeddings, final norm, head."""
        for name, module in self.model.named_modules():
            if not name.startswith(self.blocks_name):
                _fill_buffers(self.model, module, self.device, recurse=False)
        state = {n: self.reader.read(disk).to(self.device, self.dtype) for n, disk in self.shell_names().items()}
        self.model.load_state_dict(state, assign=True, strict=False)
        self.model.tie_weights()
        left = [n for n, p in self.model.named_parameters() if p.is_meta and n in self._shell_names]
        if left:
            raise BadInput(f"the checkpoint has no tensor {left[0]}")
        self.model.requires_grad_(False)

    def close_shell(self) -> None:
        """Return the shell to the meta device."""
        for name, module in self.model.named_modules():
            if not name.startswith(self.blocks_name):
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
            if isinstance(module, nn.Linear) and not name.startswith(f"{self.blocks_name}.")
        ]

    def unquantized_modules(self) -> list[str]:
        """On-disk names of modules that stay in 16 bit though a server may take them for linears: head and routers."""
        routers = [
            self.disk_name(f"{self.blocks_name}.{k}.{name}.weight").removesuffix(".weight")
            for k, block in enumerate(self._blocks)
            for name, module in block.named_modules()
            if name in self.family.routers or ("Router" in type(module).__name__ and hasattr(module, "weight"))
        ]
        return [*self.head_names(), *routers]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states [samples, seq_len, hidden] that enter the first block, for tokens [samples, seq_len]."""
        out = []
        for rows in torch.split(tokens, max(1, _EMBEDDED_TOKENS // tokens.shape[1])):
            out.append(self.embedding(rows))
        return torch.cat(out)

    def embedding(self, tokens: Tensor) -> Tensor:
        """As `embed`, differentiable and for few tokens."""
        with self._taps() as taps:
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        return taps[0].hidden

    @torch.no_grad()
    def block_arguments(self, seq_len: int) -> list[BlockArguments]:
        """What the model passes each block besides the hidden states: positions and masks for `seq_len` tokens.

        Raises BadInput when they depend on the tokens or on the number of sequences.
        """
        ids = torch.arange(3, device=self.device)[:, None].repeat(1, seq_len)  # 3 sequences of a repeated token
        arguments = self._arguments(ids[:1])
        if self.family is UNLISTED:  # families with a row are known to be independent of them
            for one, other in zip(arguments, self._arguments(ids[1:]), strict=True):
                check_same(self.config.model_type, one, other)
        return arguments

    def _arguments(self, tokens: Tensor) -> list[BlockArguments]:
        with self._taps() as taps:
            self.model.base_model(input_ids=tokens, use_cache=False)
        return [(tap.args, tap.kwargs) for tap in taps]

    def check_arguments(self) -> None:
        """Raise BadInput early where `block_arguments` would; reads the shell unless the family has a row."""
        if self.family is UNLISTED:
            self.open_shell()
            self.block_arguments(8)
            self.close_shell()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocab] for hidden states [tokens, hidden] that leave the last block."""
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """As `logits`, differentiable."""
        with self._taps(hidden[None].to(self.device)):
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=self.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The head's inputs [tokens, hidden], after the final norm, for hidden states that leave the last block."""
        with self._taps(hidden[None].to(self.device)):
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=self.device)
            out: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return out

    @contextmanager
    def _taps(self, result: Tensor | None = None) -> Iterator[list["_Tap"]]:
        """The model with its blocks replaced by taps that record their arguments and return `result` or their input."""
        parent, _, attribute = self.blocks_name.rpartition(".")
        owner = self.model.get_submodule(parent)
        taps = [_Tap(block, result) for block in self._blocks]
        setattr(owner, attribute, nn.ModuleList(taps))
        try:
            yield taps
        finally:
            setattr(owner, attribute, self._blocks)

    def check_shapes(self, shape: Callable[[str], tuple[int, ...] | None]) -> None:
        """Raise BadInput unless every parameter has the model's shape on disk.

        shape: the shape on disk by on-disk name; None for a packed weight, which is not checked.
        """
        for k in range(self.n_blocks):
            block = dict(self._blocks[k].named_parameters())
            for name, disk in self.block_names(k).items():
                _same_shape(disk, shape(disk), block[name])
        shell = dict(self.model.named_parameters())
        for name, disk in self.shell_names().items():
            _same_shape(disk, shape(disk), shell[name])

    def _check_names(self) -> None:
        wanted = [disk for k in range(self.n_blocks) for disk in self.block_names(k).values()]
        missing = [name for name in wanted if name not in self.reader]
        if missing:
            raise BadInput(
                f"{self.config.model_type}: the checkpoint lacks {len(missing)} tensors, the first {missing[0]}; "
                "is config.json the one that belongs to these weights?"
            )


def _same_shape(name: str, stored: tuple[int, ...] | None, parameter: Tensor) -> None:
    if stored is not None and stored != tuple(parameter.shape):
        raise BadInput(
            f"{name}: shape {list(stored)} on disk, {list(parameter.shape)} by config.json; "
            "is it the one that belongs to these weights?"
        )


def run_block(
    block: nn.Module,
    hidden: Tensor,
    arguments: BlockArguments,
    *,
    device: torch.device,
    batch: int,
) -> None:
    """Run `block` over hidden [samples, seq_len, hidden] in place, `batch` samples at a time."""
    args, kwargs = arguments
    with torch.no_grad():
        for start in range(0, hidden.shape[0], batch):
            result = block(hidden[start : start + batch].to(device), *args, **kwargs)
            hidden[start : start + batch] = result[0] if isinstance(result, tuple) else result


class _Tap(nn.Module):
    """Stands in for a block: records its arguments, returns `result` or the hidden states unchanged."""

    def __init__(self, block: nn.Module, result: Tensor | None) -> None:
        super().__init__()
        self._block = (block,)  # a tuple, so that the block does not become a submodule
        self._result = result

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return hidden if self._result is None else self._result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadInput(f"config.json: dtype {name!r} is not bfloat16, float16 or float32")
    return dtype  # type: ignore[no-any-return]


def _find_blocks(model: nn.Module, n: int) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with one entry a hidden layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return name, module
    raise BadInput(f"{type(model).__name__} has no list of {n} decoder blocks; its architecture is not supported")


def _fill_buffers(model: Any, module: nn.Module, device: torch.device, recurse: bool = True) -> None:
    """Give buffers that are not in the checkpoint (rotary frequencies, masks) their initial values.

    Called before the weights are loaded: the class's initialisation does nothing to parameters on the meta device, and
    would overwrite real ones.
    """
    for part in module.modules() if recurse else (module,):
        empty = [n for n, b in part.named_buffers(recurse=False) if b.is_meta]
        for name in empty:
            part.register_buffer(name, torch.empty_like(getattr(part, name), device=device), persistent=False)
        if empty:
            model._init_weights(part)
