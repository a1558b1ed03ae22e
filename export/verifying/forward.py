"""A short forward pass: whether an artifact predicts text at all, where no original says what its weights should be."""

import math
from pathlib import Path

import torch

from quantpress.artifact.artifact import open_artifact
from quantpress.calibrate.tokens import encode, open_tokenizer
from quantpress.core import machine

from ..serving.forward import last_states, log_probabilities

# A model need not know each; it has to know one.
TEXTS = (
    "The sun rises in the east and sets in the west. Every morning the farmer walks down to the river to fetch water "
    "for his animals, and every evening he comes back along the same path. In winter the days are short and the nights "
    "are long, so he has to get up before the light. His wife bakes bread on Saturdays, and the children carry it to "
    "the neighbours, who give them milk and eggs in return.",
    "太阳从东方升起,在西方落下。每天早上,农夫走到河边为他的动物取水,每天晚上,他沿着同一条路回来。冬天白天短,夜晚长,"
    "所以他必须在天亮之前起床。他的妻子在星期六烤面包,孩子们把面包送给邻居。",
    "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n\n\n"
    "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return total(values) / len(values)\n",
)
_TOKENS = 160  # of each text
_GUESSING = 1 / 4  # of the vocabulary: a perplexity above is as good as none
_SMALLEST = 1000  # tokens of a vocabulary of which that can be said


def forward_problem(folder: Path) -> tuple[str | None, str]:
    """What is wrong with the artifact's predictions (None: nothing), and the perplexities in words.

    Blocks are read one at a time, on the GPU where there is one.
    """
    tokenizer = open_tokenizer(folder)
    _, skeleton = open_artifact(folder, machine.device(), torch.float32)
    bos = tokenizer.bos_token_id
    ids = [([bos] if bos is not None else []) + encode(tokenizer, text)[:_TOKENS] for text in TEXTS]
    ids = [one for one in ids if len(one) > 8]
    found = []
    for states, tokens in zip(last_states(skeleton, [torch.tensor(one) for one in ids]), ids, strict=True):
        right = log_probabilities(skeleton, states[:-1]).gather(1, torch.tensor(tokens[1:])[:, None])
        found.append(math.exp(min(-float(right.mean()), 100.0)) if bool(right.isfinite().all()) else math.inf)
    best, rows = min(found, default=math.nan), skeleton.vocabulary
    words = f"perplexity {best:.4g} of the best of {len(found)} built-in texts; guessing has {rows}"
    if not math.isfinite(best):
        return "a short forward pass gives NaN or inf: the model predicts nothing", words
    if rows >= _SMALLEST and best > rows * _GUESSING:
        return f"a short forward pass predicts as if it guessed: {words}", words
    return None, words
