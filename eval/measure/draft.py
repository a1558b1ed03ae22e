"""How well an artifact drafts for its original: speculative decoding, Leviathan et al., arXiv:2211.17192.

A draft model writes a few tokens, the original checks them in one pass and keeps those up to the first it rejects,
then adds one of its own. What is drafted changes the speed and never what is written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quantpress.artifact.artifact import open_artifact
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.models.skeleton import Skeleton

from .divergence import Windows, last_hidden
from .reference import reference
from .results import EvaluationText, Interval, Number, Record
from .statistics import Array, around, groups_of, standard_error

DRAFTED = (1, 2, 3, 4, 6, 8)  # tokens drafted for each pass of the original
_ROWS = 128  # tokens whose logits are in memory at a time


class Accepted(Record):
    """How often the original accepts a drafted token; tokens_a_pass: how many it then writes a pass, by how many are
    drafted, its own one included."""

    rate: Number
    stderr: Number
    interval: Interval | None
    tokens_a_pass: dict[int, Number]


class Draft(Record):
    """eval/draft.json. sampled: at temperature 1; greedy: at temperature 0. Both on the given text, every token of it
    in its place: what the models would write themselves is as a rule easier to guess."""

    schema_: Literal[1] = Field(1, alias="schema")
    text: EvaluationText
    sampled: Accepted
    greedy: Accepted
    original_bytes: int
    artifact_bytes: int


def measure_draft(
    original: Path, artifact: Path, text: Windows, cache: Path, on_block: Callable[[int], None] = lambda blocks: None
) -> Draft:
    """Acceptance of the artifact's folder as the draft of the original's; `on_block(total)` as blocks of either run.

    Raises BadInput when the two do not share their vocabulary.
    """
    device = machine.device()
    source, plain = open_artifact(original, device)
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

    Sampled: sum over the vocabulary of min(p, q), their Theorem 3.5; greedy: 1 where both like the same token best.
    hidden [windows, window, hidden]; the shells of both have to be open.
    """
    sampled: list[Tensor] = []
    greedy: list[Tensor] = []
    last = text.tokens.ids.shape[1] - 1  # what follows the last token is not known
    for window, scored in enumerate(text.scored.tolist()):
        for start in range(last - scored, last, _ROWS):
            rows = slice(start, min(start + _ROWS, last))
            p, q = (model.logits(h[window, rows]).float() for model, h in zip(models, hidden, strict=True))
            greedy.append((p.argmax(-1) == q.argmax(-1)).cpu())
            sampled.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).clamp_(max=1).cpu())
    return torch.cat(sampled).double().numpy(), torch.cat(greedy).double().numpy()


def tokens_a_pass(rate: Array, runs: list[int], drafted: int) -> float:
    """Tokens the original writes a pass when `drafted` are drafted from each place of `runs` neighbours in turn.

    1 + sum over k of the product of the next k rates, averaged over the places with as many after them. With one rate
    everywhere this is their equation 1, (1 - rate^(drafted + 1)) / (1 - rate); hard places lie together, though.
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
