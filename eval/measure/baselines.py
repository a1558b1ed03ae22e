"""What a model has to predict better than to be called one: a uniform guess, and how often each token occurs.

An original below them is fed wrongly (a BOS token that it needs, a text in a language it does not know) or is damaged,
and what an artifact keeps of its quality means nothing then.
"""

import math

import torch
from torch import Tensor

from .formatting import number
from .results import Results
from .sections import EvaluationText

_ALPHAS = (1.0, 0.1, 0.01)  # added to each count; the best of them is taken


def unigram_nll(tokens: Tensor, vocabulary: int) -> float:
    """Mean NLL, nats per token, of `tokens` [n] under their own frequencies, each counted without itself.

    Additive smoothing over the vocabulary (Chen & Goodman 1996, section 2.1) with the best of a few constants.
    """
    counts = torch.bincount(tokens.reshape(-1), minlength=vocabulary).double()
    n = counts.sum()
    seen = counts[counts > 0]
    found = [-(seen * torch.log((seen - 1 + a) / (n - 1 + a * vocabulary))).sum() / n for a in _ALPHAS]
    return float(torch.stack(found).min())


def below(perplexity: float, text: EvaluationText | None) -> str | None:
    """The baseline that this perplexity does not beat, in words; None when it beats both, or they are not on record."""
    if text is None or text.vocabulary is None:
        return None
    uniform = float(text.vocabulary)
    if not perplexity < uniform:
        return f"a uniform guess over its vocabulary would (perplexity {number(uniform)})"
    unigram = math.exp(text.unigram_nll)
    if perplexity >= unigram:
        return f"counting how often each token occurs would (perplexity {number(unigram)})"
    return None


def doubt(results: Results) -> str | None:
    """Why nothing that was measured on the text can be believed, with the remedy; None where it can."""
    if results.original is None or (worse := below(results.original.perplexity, results.text)) is None:
        return None
    bos = results.text is not None and results.text.bos
    other = "without a BOS token (evaluation.bos: never)" if bos else "after a BOS token (evaluation.bos: always)"
    return (
        f"the original itself predicts the text worse than {worse}: its perplexity is "
        f"{number(results.original.perplexity)}. What was measured on that text says nothing about the artifact. "
        f"Measure {other}, on a text in a language and form that the model knows (evaluation.source), and see that the "
        "checkpoint is whole"
    )
