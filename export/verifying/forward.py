"""A short forward pass: whether an artifact predicts text at all, where no original says what its weights should be."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate.tokens import encode, open_tokenizer
from quantpress.core import machine
from quantpress.models.skeleton import Skeleton

from ..serving.forward import last_states, log_probabilities
from ..serving.reference import Paragraph, find_reference, read_reference

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
_AS_RECORDED = 0.05  # nats a token by which the same weights may differ on another machine
_POOR = 0.05  # of a linear's output power lost in the middle layer: with GPTQ 0.008 at 4 bits, 0.025 at 3, 0.08 at 2
_POOR_BITS = 2  # by which that is known where nothing records it


def forward_problem(folder: Path, where: Path) -> tuple[str | None, str]:
    """What is wrong with the artifact's predictions (None: nothing), and the perplexities in words.

    folder: of the artifact; where: the run or export that holds it. A perplexity has to be the one that its evaluation
    recorded (reference.json); where nothing was evaluated, better than guessing, unless the manifest records that
    rounding left little. Blocks are read one at a time, on the GPU where there is one.
    """
    tokenizer = open_tokenizer(folder)
    artifact, skeleton = open_artifact(folder, machine.device(), torch.float32)
    recorded = _recorded(folder, where)
    if recorded is not None:
        (found,), wanted = _losses(skeleton, [recorded.ids], recorded.start), -fmean(recorded.artifact)
        words = f"perplexity {_perplexity(found):.4g} of a paragraph, {_perplexity(wanted):.4g} when it was evaluated"
        wrong = not abs(found - wanted) <= _AS_RECORDED * max(1.0, wanted / 4)
        return (f"a short forward pass is not as it was: {words}" if wrong else None), words
    bos = tokenizer.bos_token_id
    ids = [([bos] if bos is not None else []) + encode(tokenizer, text)[:_TOKENS] for text in TEXTS]
    losses = _losses(skeleton, [one for one in ids if len(one) > 8])
    best, rows = _perplexity(min(losses, default=math.nan)), skeleton.vocabulary
    words = f"perplexity {best:.4g} of the best of {len(losses)} built-in texts; guessing has {rows}"
    if not math.isfinite(best):
        return "a short forward pass gives NaN or inf: the model predicts nothing", words
    if rows >= _SMALLEST and best > rows * _GUESSING:
        why = _poor(folder, artifact)
        if why is None:
            return f"a short forward pass predicts as if it guessed: {words}", words
        words += f": as good as none, which is no damage that can be told without the original: {why}"
    return None, words


def _losses(skeleton: Skeleton, sequences: Sequence[Sequence[int]], start: int = 1) -> list[float]:
    """Mean negative log-likelihood of each sequence from token `start` on, in nats; inf where it is no number."""
    found = []
    states = last_states(skeleton, [torch.tensor(one) for one in sequences])
    for one, hidden in zip(sequences, states, strict=True):
        rows = log_probabilities(skeleton, hidden[start - 1 : -1])
        right = rows.gather(1, torch.tensor(one[start:])[:, None])
        found.append(-float(right.mean()) if bool(right.isfinite().all()) else math.inf)
    return found


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 100.0)) if math.isfinite(loss) else math.inf


def _recorded(folder: Path, where: Path) -> Paragraph | None:
    """The paragraph that the evaluation of these very files has recorded, if there is one."""
    manifest = own_manifest(where) or own_manifest(folder)
    file = find_reference(where)
    if manifest is None or file is None:
        return None
    reference = read_reference(file)
    return reference.paragraph if reference.artifact == manifest.artifact.digest else None


def _poor(folder: Path, artifact: Artifact) -> str | None:
    """Why the artifact may predict as little as a guess although it is as it was made; None where it should not."""
    manifest = own_manifest(folder)
    errors = [] if manifest is None else [x.relative_error for x in manifest.layers if x.relative_error is not None]
    if errors:
        lost = median(errors)
        return f"its manifest records {lost:.0%} lost in the middle layer" if lost >= _POOR else None
    bits = [grid.bits for grid in artifact.linears.values()]
    return f"its weights have {_POOR_BITS} bits" if bits and median(bits) <= _POOR_BITS else None
