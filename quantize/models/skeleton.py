"""The model as a skeleton: built on the meta device, with one decoder block materialised at a time.

The blocks are found in the transformers class, not listed by hand. Everything around them, the shell (embedding,
position encoding, masks, final norm, head), runs as the class itself runs it, with the blocks replaced by taps.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..core.errors import BadInput
from ..core.products import fast_16_bit_products
from ..core.transfers import Transfers
from .block_arguments import SAMPLES_FIRST, BlockArguments, Given, Handed, ModelArguments, marked, serves
from .building import set_buffers, stored_tensors
from .model_tensors import TensorReader
from .placed_model import LinearLayer, PlacedModel
from .towers import filled_where_called, without_head
from .weight_rows import WeightRows

_EMBEDDED_TOKENS = 4096  # embedded at a time


class Skeleton(PlacedModel):
    """A causal language model whose weights are read block by block.

    Of a multimodal model it is the text decoder, run in the whole model on text alone; `config` is the decoder's.

    Raises BadInput for an architecture that transformers does not know or that is not a stack of decoder blocks, and
    for tensors missing from the checkpoint.
    """

    def __init__(self, reader: TensorReader, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__(reader, dtype=dtype)
        self.device = device
        self._outputs = 0  # of a block; not known before the shell has run
        self._layout, self._width = SAMPLES_FIRST, torch.Size()
        self._seen: WeakValueDictionary[int, _Seen] = WeakValueDictionary()  # by seq_len
        self._reruns = False  # whether the shell must run again for each batch
        self._called: set[str] = set()  # of the towers, by the shell on text
        self._wide = _float32_modules(self.model, self.dtype)

    def round_inputs(self, linear: LinearLayer, how: Callable[[Tensor], Tensor]) -> None:
        """From now on `linear` multiplies its weight with what `how` makes of its inputs [..., in]."""
        module = self._blocks[linear.block].get_submodule(linear.module)
        module.register_forward_pre_hook(lambda _, args: (how(args[0]), *args[1:]))

    def read_block(self, k: int) -> dict[str, Tensor]:
        """Block `k`'s tensors by their name inside the block, in the model's dtype, on the CPU."""
        stored = stored_tensors(self._blocks[k])
        prefix = f"{self.blocks_name}.{k}."
        return {n: self._cast(prefix + n, self.reader.read(disk), stored[n]) for n, disk in self.block_names(k).items()}

    def weight_rows(self, linear: LinearLayer) -> WeightRows:
        """The weight of a linear as the block would have it, without the block being read."""
        inside = f"{linear.module}.weight"
        read = self.reader.rows(self.block_names(linear.block)[inside])
        if linear.transposed:
            read = read(slice(None)).T.contiguous().__getitem__
        placeholder = self._blocks[linear.block].get_parameter(inside)
        dtype = self._dtype_of(f"{self.blocks_name}.{linear.block}.{inside}", placeholder)
        dtype = self.served_dtype if self.served_dtype != self.dtype else dtype
        return WeightRows((linear.out_features, linear.in_features), dtype, read)

    def loaded_in(self, dtype: torch.dtype) -> list[str]:
        """The names in `reader` of what transformers would load in this type."""
        stored = stored_tensors(self.model)
        floats = {name: tensor for name, tensor in stored.items() if tensor.is_floating_point()}
        return [
            disk
            for name, disk in self.places().items()
            if name in floats and self._dtype_of(name, floats[name]) == dtype
        ]

    def _cast(self, name: str, tensor: Tensor, placeholder: Tensor) -> Tensor:
        """A tensor in the type in which transformers would load it."""
        return tensor.to(self._dtype_of(name, placeholder) if tensor.is_floating_point() else placeholder.dtype)

    def _dtype_of(self, name: str, placeholder: Tensor) -> torch.dtype:
        """The type in which transformers would load a tensor of floats."""
        return torch.float32 if any(pattern.search(name) for pattern in self._wide) else placeholder.dtype

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
        first, _ = next(self.model.named_parameters())  # whose device some models take for that of all
        self._fill_called({first, *self._called})
        self.model.tie_weights()
        left = [n for n, p in self.model.named_parameters() if p.is_meta and self._in_shell(n)]
        if left:
            raise BadInput(f"the checkpoint has no tensor {left[0]}")
        self.model.requires_grad_(False)
        if not self._outputs:
            filled_where_called(self.model, self._of_towers, self._fill_called, self._find_outputs)

    def _fill(self, places: Mapping[str, str], computed: Mapping[str, Tensor]) -> None:
        """Read what the model stores outside its blocks from the file, and set what it computes."""
        set_buffers(self.model, computed, self.device)
        stored = stored_tensors(self.model)
        state = {n: self._cast(n, self.reader.read(disk), stored[n]).to(self.device) for n, disk in places.items()}
        self.model.load_state_dict(state, assign=True, strict=False)

    def _fill_called(self, names: set[str]) -> None:
        self._called |= names
        self._fill({name: self._towers[name] for name in names if name in self._towers}, {})

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
        """Raise BadInput for a block that is not run, of whose inputs nothing would be known, or is run again."""
        loops = max(tap.calls for tap in taps)
        if loops > 1:
            raise BadInput(
                f"model_type {self.config.model_type!r} is not supported: it runs its blocks {loops} times over "
                "the same text, and here each is run once"
            )
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
        with self._taps(self._own_layout(hidden)), fast_16_bit_products():
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
    with torch.no_grad(), fast_16_bit_products():
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
        self.calls = 0

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        self.calls += 1
        out = hidden if self._result is None else self._result
        return out if self._outputs == 1 else (out, *map(Handed, range(1, self._outputs)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)
