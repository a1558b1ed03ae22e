"""Perplexity and KL divergence from the original, streamed: one block of weights and a few rows of logits at a time.

Both models run block by block over the same windows; only their last hidden states are kept. Logits are computed for a
few hundred tokens at a time, never for all.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantpress.calibrate.tokens import Tokens, bos_id, cut, first_tokens, with_bos
from quantpress.core.errors import BadInput
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.recipe import Evaluation

from .sections import Bucket, Divergence, EvaluationText, Interval, NoiseFloor, Quality
from .statistics import Array, around, groups_of, quantile_interval, runs, standard_error

_ROWS = 256  # tokens whose logits are in memory at a time
_TILE = 400_000  # logits that one CPU thread compares at a time, so that they stay in its cache
BATCH_TOKENS = 4096
_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the buckets by the original's confidence


@dataclass(frozen=True)
class Windows:
    """Evaluation windows. tokens.ids [windows, window]; only the last `scored` targets of a window count."""

    tokens: Tokens
    scored: Tensor  # int64 [windows]
    bytes: int  # UTF-8 bytes of the scored tokens

    @property
    def runs(self) -> NDArray[np.int64]:
        """The run of neighbouring tokens that each scored token belongs to; see statistics.runs. int64 [tokens]."""
        return runs(int(self.scored.sum()))

    def targets(self) -> Tensor:
        """The scored tokens, int64 [tokens]."""
        return torch.cat([row[len(row) - int(n) :] for row, n in zip(self.tokens.ids, self.scored, strict=True)])

    def record(self) -> EvaluationText:
        ids = self.tokens.ids
        return EvaluationText(
            source=self.tokens.source,
            sha256=self.tokens.sha256,
            tokens=int(self.scored.sum()),
            bytes=self.bytes,
            windows=len(ids),
            window=ids.shape[1],
            stride=int(self.scored[-1]) if len(self.scored) > 1 else ids.shape[1],
            bos=self.tokens.bos,
        )


@dataclass(frozen=True)
class TokenScores:
    """Both models on each scored token: float64 [tokens], but `same` bool and `runs` int64."""

    original_nll: Array
    artifact_nll: Array
    kl: Array  # KL(original || artifact) of the next-token distributions, nats
    same: NDArray[np.bool_]  # whether both rank the same token first
    confidence: Array  # the probability of the original's most likely token
    runs: NDArray[np.int64]


def windows(tokenizer: Any, text: str, source: str, wanted: Evaluation) -> Windows:
    """The first `windows` windows of the text, each scored on the tokens that the one before has not scored.

    Raises BadInput for a text with fewer windows.
    """
    bos = bos_id(tokenizer, wanted.bos)
    body = wanted.window - (bos is not None)
    stride = min(wanted.stride or body, body)
    stream = first_tokens(tokenizer, text, body + stride * (wanted.windows - 1))
    ids = cut(stream, body, stride)[: wanted.windows]
    if len(ids) < wanted.windows:
        raise BadInput(
            f"evaluation text {source} gives {len(ids)} windows of {wanted.window} tokens, {wanted.windows} are asked "
            "for; lower evaluation.windows or evaluation.window"
        )
    first = body if bos is not None else body - 1  # the first token has no context to be predicted from
    scored = torch.full((len(ids),), min(stride, first), dtype=torch.int64)
    scored[0] = first
    size = sum(len(tokenizer.decode(row[len(row) - int(n) :]).encode()) for row, n in zip(ids, scored, strict=True))
    return Windows(Tokens(with_bos(ids, bos), source, bos is not None), scored, size)


def last_hidden(skeleton: Skeleton, tokens: Tensor, on_block: Callable[[], None]) -> Tensor:
    """Hidden states [windows, window, hidden] after the last block; leaves the shell open for `logits`."""
    skeleton.open_shell()
    hidden = skeleton.embed(tokens).cpu()
    arguments = skeleton.block_arguments(tokens)
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=skeleton.device, batch=batch)
        on_block()
    return hidden


def compare(models: tuple[Skeleton, Skeleton], hidden: tuple[Tensor, Tensor], text: Windows) -> TokenScores:
    """Scores of the original and the artifact from their last hidden states, [windows, window, hidden] each.

    The logits of both are computed from them, `_ROWS` tokens at a time; both shells have to be open.
    """
    ids = text.tokens.ids
    columns: list[list[Tensor]] = [[] for _ in range(5)]
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for window in range(len(ids)):
            first = ids.shape[1] - 1 - int(text.scored[window])
            for start in range(first, ids.shape[1] - 1, _ROWS):
                rows = slice(start, min(start + _ROWS, ids.shape[1] - 1))
                before, after = (m.logits(h[window, rows]) for m, h in zip(models, hidden, strict=True))
                target = ids[window, rows.start + 1 : rows.stop + 1].to(before.device)
                for column, part in zip(columns, _tiles(pool, before, after, target), strict=True):
                    column.append(part.cpu())
    first_nll, second_nll, kl, confidence = (torch.cat(column).double().numpy() for column in columns[:4])
    return TokenScores(first_nll, second_nll, kl, torch.cat(columns[4]).numpy(), confidence, text.runs)


def _tiles(pool: Executor, original: Tensor, artifact: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """`_compare` over logits [tokens, vocab]; on a CPU in tiles, one per thread of `pool`, which is several times
    faster than large operations that each use all threads.
    """
    if original.device.type != "cpu":
        return _compare(original, artifact, target)
    rows = max(1, _TILE // original.shape[1])
    parts = pool.map(_compare, *(torch.split(x, rows) for x in (original, artifact, target)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _compare(original: Tensor, artifact: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Both models' NLL of the target [tokens], KL, the original's largest probability, and if the top token agrees."""
    p, q = (torch.log_softmax(logits.float(), -1) for logits in (original, artifact))
    nll = [-log_probs.gather(1, target[:, None])[:, 0] for log_probs in (p, q)]
    (top, favourite), other = p.max(-1), q.argmax(-1)
    return *nll, kl_divergence(p, q), top.exp(), favourite == other


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log-probabilities [tokens, vocab], clamped at 0 against rounding."""
    kl: Tensor = torch.linalg.vecdot(p.exp(), p - q)
    return kl.clamp_(min=0)


def quality(nll: Array, text: Windows, size: int) -> Quality:
    """One model's perplexity from its NLL [tokens]; size: bytes of its weights."""
    mean, bits = float(nll.mean()), float(nll.sum()) / math.log(2) / max(1, text.bytes)
    return Quality(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        nll_stderr=standard_error(nll, text.runs),
        bits_per_byte=bits,
        byte_perplexity=2**bits if bits < 1000 else math.inf,
        bytes=size,
    )


def perplexity_increase(before: Array, after: Array, text: Windows) -> tuple[float, Interval | None]:
    """Relative increase of the perplexity and its interval, from both models' NLL [tokens] of the same tokens."""
    difference = after - before
    mean = float(difference.mean())
    ends = around(mean, standard_error(difference, text.runs), groups_of(text.runs))
    return _growth(mean), None if ends is None else (_growth(ends[0]), _growth(ends[1]))


def _growth(nats: float) -> float:
    return math.expm1(nats) if nats < 700 else math.inf


def divergence(scores: TokenScores, noise: NoiseFloor | None = None) -> Divergence:
    """The divergence over all tokens, and by the original's confidence."""
    kl, same, groups = scores.kl, scores.same.astype(np.float64), groups_of(scores.runs)
    kl_stderr, top1_stderr = (standard_error(values, scores.runs) for values in (kl, same))
    median, p90, p99 = np.quantile(kl, [0.5, 0.9, 0.99]).tolist()
    buckets = []
    for low, high in pairwise(_EDGES):
        inside = (scores.confidence >= low) & ((scores.confidence < high) | (high == 1.0))
        if inside.any():
            run = np.unique(scores.runs[inside], return_inverse=True)[1]
            buckets.append(
                Bucket(
                    low=low,
                    high=high,
                    tokens=int(inside.sum()),
                    kl_mean=float(kl[inside].mean()),
                    kl_stderr=standard_error(kl[inside], run),
                    top1_agreement=float(same[inside].mean()),
                )
            )
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_stderr=kl_stderr,
        kl_interval=around(float(kl.mean()), kl_stderr, groups),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        kl_p99_interval=quantile_interval(kl, 0.99, scores.runs),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        top1_stderr=top1_stderr,
        top1_interval=around(float(same.mean()), top1_stderr, groups),
        confidence=tuple(buckets),
        noise=noise,
    )
