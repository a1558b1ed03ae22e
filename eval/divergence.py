"""Perplexity and divergence from the original, streamed: one block of weights and a few rows of logits at a time.

Both models run block by block over the same windows; only their last hidden states are kept. Logits exist for a few
hundred tokens at a time and are never held whole.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantpress.quantize.calibration import Tokens, bos_id, cut, encode, with_bos
from quantpress.quantize.errors import BadInput
from quantpress.quantize.model import Skeleton, run_block
from quantpress.quantize.recipe import Evaluation

_ROWS = 256  # tokens whose logits are in memory at a time
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Windows:
    """Evaluation windows. tokens.ids [windows, window]; only the last `scored` targets of a window count."""

    tokens: Tokens
    scored: Tensor  # int64 [windows]
    bytes: int  # UTF-8 bytes of the scored tokens


def windows(tokenizer: Any, text: str, source: str, wanted: Evaluation) -> Windows:
    """The first `windows` windows of the text, each scored on the tokens the one before has not scored.

    Raises BadInput when the text holds not even one window.
    """
    bos = bos_id(tokenizer, wanted.bos)
    body = wanted.window - (bos is not None)
    stride = min(wanted.stride or body, body)
    ids = cut(encode(tokenizer, text), body, stride)[: wanted.windows]
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
    """Hidden states [windows, window, hidden] that leave the last block; leaves the shell open for `logits`."""
    skeleton.open_shell()
    hidden = skeleton.embed(tokens).cpu()
    arguments = skeleton.block_arguments(tokens.shape[1])
    batch = max(1, _BATCH_TOKENS // tokens.shape[1])
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=skeleton.device, batch=batch)
        on_block()
    return hidden


def compare(
    original: Skeleton, artifact: Skeleton, text: Windows, on_block: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Perplexity of both and the divergence of `artifact` from `original`; results without sizes and gates."""
    started = time.monotonic()
    ids = text.tokens.ids
    hidden = [last_hidden(model, ids, on_block) for model in (original, artifact)]
    nll: tuple[list[Tensor], list[Tensor]] = ([], [])
    divergences, agreements = [], []
    for window in range(len(ids)):
        first = ids.shape[1] - 1 - int(text.scored[window])
        for start in range(first, ids.shape[1] - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, ids.shape[1] - 1))
            target = ids[window, rows.start + 1 : rows.stop + 1].to(original.device)
            p, q = (
                torch.log_softmax(model.logits(h[window, rows]).float(), -1)
                for model, h in zip((original, artifact), hidden, strict=True)
            )
            for log_probs, out in zip((p, q), nll, strict=True):
                out.append(-log_probs.gather(1, target[:, None])[:, 0].cpu())
            divergences.append(kl_divergence(p, q).cpu())
            agreements.append((p.argmax(-1) == q.argmax(-1)).cpu())
    return _results(original, text, [torch.cat(x).double() for x in nll], torch.cat(divergences).double(), torch.cat(
        agreements
    )) | {"seconds": time.monotonic() - started}  # fmt: skip


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats for each row of log-probabilities [tokens, vocab]; rounding never makes it negative."""
    return (p.exp() * (p - q)).sum(-1).clamp_(min=0)


def _results(model: Skeleton, text: Windows, nll: list[Tensor], kl: Tensor, same: Tensor) -> dict[str, Any]:
    tokens = text.tokens
    n = len(kl)
    sides = []
    for values in nll:
        mean = float(values.mean())
        bits = float(values.sum()) / math.log(2) / max(1, text.bytes)
        sides.append(
            {
                "perplexity": math.exp(mean) if mean < 700 else math.inf,
                "nll": mean,
                "nll_stderr": _standard_error(values),
                "bits_per_byte": bits,
                "byte_perplexity": 2**bits if bits < 1000 else math.inf,
            }
        )
    difference = nll[1] - nll[0]
    mean, error = float(difference.mean()), _standard_error(difference)
    quantiles = torch.quantile(kl, torch.tensor([0.5, 0.9, 0.99], dtype=kl.dtype)).tolist()
    return {
        "schema": 2,
        "text": {
            "source": tokens.source,
            "sha256": tokens.sha256,
            "tokens": n,
            "bytes": text.bytes,
            "windows": len(tokens.ids),
            "window": tokens.ids.shape[1],
            "stride": int(text.scored[-1]) if len(text.scored) > 1 else tokens.ids.shape[1],
            "bos": tokens.bos,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "original": sides[0],
        "artifact": sides[1],
        "perplexity_increase": math.expm1(mean),
        "perplexity_increase_interval": (math.expm1(mean - 1.96 * error), math.expm1(mean + 1.96 * error)),
        "divergence": {
            "kl_mean": float(kl.mean()),
            "kl_stderr": _standard_error(kl),
            "kl_median": quantiles[0],
            "kl_p90": quantiles[1],
            "kl_p99": quantiles[2],
            "kl_max": float(kl.max()),
            "top1_agreement": float(same.double().mean()),
            "top1_stderr": _standard_error(same.double()),
        },
    }


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
