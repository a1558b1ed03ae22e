"""Log-likelihoods and greedy generation of any model that a skeleton reads.

Log-likelihoods are computed block by block, all requests through one block before the next is read, so the model need
not fit in memory. Generation needs the whole model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.products import fast_16_bit_products
from quantpress.models.skeleton import Skeleton, run_block

from .divergence import BATCH_TOKENS

_ROWS = 256  # tokens whose logits are in memory at a time
_MULTIPLE = 16  # lengths are rounded up to a multiple of it, so that requests share batches and masks
_SHARE = 8  # hidden states take at most one part in this many of the free memory
_WRITTEN_AT_ONCE = 16  # prompts continued in one batch

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


@dataclass(frozen=True)
class _Batch:
    """Requests of similar length; ids [requests, tokens], padded on the right, which causal attention never sees."""

    requests: list[int]
    ids: Tensor


@dataclass(frozen=True)
class Room:
    """How many tokens a model has room for.

    scored: of a context and its continuation together, when log-probabilities are asked for. written: of a prompt and
    what is generated after it.
    """

    scored: int
    written: int

    def pair(self, pair: Pair) -> list[int]:
        """Context and continuation as one sequence; a context that is too long loses its beginning.

        Raises BadInput for a continuation that leaves no room for a token of context.
        """
        context, continuation = pair
        if len(continuation) >= self.scored:
            most = self.scored - 1
            raise BadInput(f"a continuation of {len(continuation)} tokens: the model takes {most} at most")
        return (context + continuation)[-self.scored :]

    def prompt(self, ids: list[int], new_tokens: int) -> list[int]:
        """The prompt, cut at its beginning so that `new_tokens` fit after it; raises BadInput where no prompt would."""
        if new_tokens >= self.written:
            raise BadInput(f"{new_tokens} new tokens leave no room for a prompt in {self.written} positions")
        return ids[-(self.written - new_tokens) :]


class Scorer:
    """A model that answers lm-eval's requests in this process.

    room: by default all that the model has; the last token of a continuation is predicted, not read, and needs none.
    on_block(done, total) is called as blocks finish, on_block(0, 0) before something without a number of steps.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokenizer: Any,
        on_block: Callable[[int, int], None] = lambda done, total: None,
        room: Room | None = None,
    ) -> None:
        self._skeleton, self._tokenizer, self._on_block = skeleton, tokenizer, on_block
        self._positions = int(getattr(skeleton.config, "max_position_embeddings", None) or 2048)
        self.room = room or Room(self._positions + 1, self._positions)

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding would give exactly this continuation."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        self._skeleton.open_shell()
        chunks = list(self._chunks(pairs))
        done, total = 0, len(chunks) * self._skeleton.n_blocks
        for chunk in chunks:
            hidden = [self._skeleton.embed(batch.ids).cpu() for batch in chunk]
            arguments = [self._skeleton.block_arguments(batch.ids) for batch in chunk]
            for k, block in self._skeleton.blocks():
                for states, given in zip(hidden, arguments, strict=True):
                    run_block(block, states, given[k], device=self._skeleton.device, batch=len(states))
                done += 1
                self._on_block(done, total)
            for batch, states in zip(chunk, hidden, strict=True):
                for row, request in enumerate(batch.requests):
                    length = len(self.room.pair(pairs[request])) - 1
                    out[request] = self._score(states[row, :length], pairs[request][1])
        return out

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        target = torch.tensor(continuation, device=self._skeleton.device)
        rows = hidden[len(hidden) - len(target) :]
        total, greedy = 0.0, True
        for part, wanted in zip(torch.split(rows, _ROWS), torch.split(target, _ROWS), strict=True):
            log_probs = torch.log_softmax(self._skeleton.logits(part).float(), -1)
            total += float(log_probs.gather(1, wanted[:, None]).double().sum())
            greedy = greedy and bool((log_probs.argmax(-1) == wanted).all())
        return total, greedy

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[list[_Batch]]:
        """All requests, longest first, in batches, grouped into chunks that fit in memory."""
        width = self._skeleton.config.hidden_size * self._skeleton.dtype.itemsize
        room = max(machine.available_memory_bytes() // _SHARE, BATCH_TOKENS * width)
        chunk: list[_Batch] = []
        used = 0
        for batch in self._batches(pairs):
            if chunk and used + batch.ids.numel() * width > room:
                yield chunk
                chunk, used = [], 0
            chunk.append(batch)
            used += batch.ids.numel() * width
        if chunk:
            yield chunk

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[_Batch]:
        inputs = [self.room.pair(pair)[:-1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -len(inputs[i]))
        while order:
            longest = len(inputs[order[0]])
            width = min(-(-longest // _MULTIPLE) * _MULTIPLE, max(longest, self._positions))
            count = max(1, BATCH_TOKENS // width)
            now, order = order[:count], order[count:]
            ids = torch.zeros(len(now), width, dtype=torch.int64)
            for row, i in enumerate(now):
                ids[row, : len(inputs[i])] = torch.tensor(inputs[i])
            yield _Batch(now, ids)

    @fast_16_bit_products()
    def write(self, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
        """The greedy continuation of each prompt, up to the end of text, a stop string or `new_tokens` tokens.

        Raises BadInput when the whole model does not fit in memory.
        """
        fits_or_fails(self._skeleton)
        self._on_block(0, 0)
        model = self._skeleton.whole()
        end = self._tokenizer.eos_token_id
        pad = end or 0  # masked; any id will do
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=end,
            stop_strings=list(stop) or None,
        )
        out: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), _WRITTEN_AT_ONCE):
            now = order[start : start + _WRITTEN_AT_ONCE]
            given = [self.room.prompt(prompts[i], new_tokens) for i in now]
            width = max(map(len, given))
            ids = torch.full((len(now), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(given):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            device = self._skeleton.device
            written = model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config,
                tokenizer=self._tokenizer if stop else None,
            )  # fmt: skip
            for i, row in zip(now, written[:, width:].tolist(), strict=True):
                out[i] = row[: row.index(end) + 1] if end in row else row
        return out

    def continue_text(self, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str]) -> list[str]:
        """As `write`, decoded to text."""
        written = self.write(prompts, new_tokens, stop)
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def fits_or_fails(skeleton: Skeleton) -> None:
    """Raise BadInput when the whole model does not fit in free memory."""
    needed, on_gpu = whole_bytes(skeleton), skeleton.device.type == "cuda"
    free = machine.available_device_bytes(skeleton.device) if on_gpu else machine.available_memory_bytes()
    if needed * 1.1 > free:
        raise BadInput(f"generating needs the whole model, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def whole_bytes(skeleton: Skeleton) -> int:
    """Bytes of all weights in the dtype the skeleton computes in."""
    return sum(p.numel() * p.element_size() for p in skeleton.model.parameters())
