"""How well an artifact drafts for its original: speculative decoding, Leviathan et al., arXiv:2211.17192.

A draft model proposes a few tokens; the original checks them in one forward pass, keeps those before the first it
rejects, and adds one of its own. The draft changes the speed, never the text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quantpress.artifact.artifact import open_artifact, open_original
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.schema import Section
from quantpress.models.skeleton import Skeleton

from .divergence import Windows, last_hidden
from .reference import reference
from .sections import EvaluationText, Interval, Number
from .statistics import Array, around, groups_of, standard_error

DRAFTED = (1, 2, 3, 4, 6, 8)  # tokens drafted for each pass of the original
_ROWS = 128  # tokens whose logits are in memory at a time


class Accepted(Section):
    """How often the original accepts a drafted token.

    tokens_a_pass: tokens written per pass of the original, its own one included, by how many are drafted.
    """

    rate: Number
    stderr: Number
    interval: Interval | None
    tokens_a_pass: dict[int, Number]


class Draft(Section):
    """eval/draft.json. sampled: at temperature 1; greedy: at temperature 0.

    Both are measured with the tokens of the given text as context. Text that the models generate themselves is usually
    easier to predict, so acceptance in use is usually higher.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    text: EvaluationText
    sampled: Accepted
    greedy: Accepted
    original_bytes: int
    artifact_bytes: int


def measure_draft(
    original: Path, artifact: Path, text: Windows, cache: Path, on_block: Callable[[int], None] = lambda blocks: None
) -> Draft:
    """How often the model in `original` accepts what the one in `artifact` drafts; on_block(total) after each block.

    Raises BadInput when their vocabularies differ in size.
    """
    device = machine.device()
    source, plain = open_original(original, device)
    reader, quantized = open_artifact(artifact, device, plain.dtype)
    if quantized.config.vocab_size != plain.config.vocab_size:
        raise BadInput(f"{artifact} cannot draft for {original}: their vocabularies differ in size")
    total = plain.n_blocks + quantized.n_blocks
    hidden, _ = reference(plain, original, text, cache, lambda: on_block(total))
    drafted = last_hidden(quantized, text.tokens.ids, lambda: on_block(total))
    sampled, greedy = rates((plain, quantized), (hidden, drafted), text)
    return Draft(
        schema=1,
        text=text.record(),
        sampled=_accepted(sampled, text),
        greedy=_accepted(greedy, text),
        original_bytes=source.total_bytes,
        artifact_bytes=reader.total_bytes,
    )


def rates(models: tuple[Skeleton, Skeleton], hidden: tuple[Tensor, Tensor], text: Windows) -> tuple[Array, Array]:
    """The probability [tokens] that the first model accepts what the second drafts for each scored token.

    Sampled: sum over the vocabulary of min(p, q), their Theorem 3.5; greedy: 1 where both rank the same token first.
    hidden: [windows, window, hidden] of each model; both shells have to be open.
    """
    sampled: list[Tensor] = []
    greedy: list[Tensor] = []
    last = text.tokens.ids.shape[1] - 1  # the token after the last one is not known
    for window, scored in enumerate(text.scored.tolist()):
        for start in range(last - scored, last, _ROWS):
            rows = slice(start, min(start + _ROWS, last))
            p, q = (model.logits(h[window, rows]).float() for model, h in zip(models, hidden, strict=True))
            greedy.append((p.argmax(-1) == q.argmax(-1)).cpu())
            sampled.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).clamp_(max=1).cpu())
    return torch.cat(sampled).double().numpy(), torch.cat(greedy).double().numpy()


def tokens_a_pass(rate: Array, runs: list[int], drafted: int) -> float:
    """Tokens written per pass of the original when `drafted` tokens are drafted each time.

    rate: probability of acceptance [tokens]; runs: lengths of the consecutive stretches it is made of. The mean, over
    all positions with `drafted` tokens after them, of 1 + sum over k of the product of the next k rates. With one rate
    everywhere this is their equation 1, (1 - rate^(drafted + 1)) / (1 - rate); but hard tokens come in clusters.
    """
    found: list[Array] = []
    first = 0
    for length in runs:
        run = rate[first : first + length]
        first += length
        if length >= drafted:
            places = np.lib.stride_tricks.sliding_window_view(run, drafted)
            found.append(1 + np.cumprod(places, axis=1).sum(axis=1))
    return float(np.concatenate(found).mean()) if found else float("nan")


def _accepted(rate: Array, text: Windows) -> Accepted:
    mean, error = float(rate.mean()), standard_error(rate, text.runs)
    lengths = text.scored.tolist()
    return Accepted(
        rate=mean,
        stderr=error,
        interval=around(mean, error, groups_of(text.runs)),
        tokens_a_pass={n: tokens_a_pass(rate, lengths, n) for n in DRAFTED},
    )
