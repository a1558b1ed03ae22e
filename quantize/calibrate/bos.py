"""`bos: auto`: as the tokenizer does, unless the model plainly predicts text better after a BOS token.

Some tokenizers add none although their model was trained with one at the start of every text and predicts nothing
without it. Where a tokenizer has a BOS token and does not add it, the first window of the text is tried both ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import machine
from ..core.files import fingerprint, remembered
from ..models.skeleton import Skeleton, run_block
from ..recipe import Bos
from .tokens import bos_id, first_tokens

_TRIED = 512  # tokens, both ways; the first of them is scored in neither, as it has no context without a BOS token
_MARGIN = 0.1  # nats per token by which a BOS token has to be better: a tenth of the perplexity, far beyond noise
_ROWS = 128  # tokens whose logits are in memory at a time


@dataclass(frozen=True)
class BosTrial:
    """The model's perplexity of one window, with a BOS token before it and without."""

    after_bos: float
    without: float

    @property
    def bos(self) -> Bos:
        """What `auto` comes to: `always` where it is plainly better, else `auto`, which then adds none."""
        return "always" if math.log(self.after_bos) < math.log(self.without) - _MARGIN else "auto"

    def __str__(self) -> str:
        return f"one window has perplexity {self.after_bos:,.4g} after it and {self.without:,.4g} without"


def try_bos(
    folder: Path, open_model: Callable[[], Skeleton], tokenizer: Any, text: str, wanted: Bos, cache: Path
) -> BosTrial | None:
    """Both ways tried on the first tokens of `text`; None where nothing is to be decided, or the text is too short.

    folder: of the model that `open_model` opens; a trial is kept in `cache` for others of the same weights and text.
    """
    if wanted != "auto" or tokenizer.bos_token_id is None or bos_id(tokenizer, "auto") is not None:
        return None
    ids = first_tokens(tokenizer, text, _TRIED)[:_TRIED]
    if len(ids) < 16:
        return None
    bos = tokenizer.bos_token_id
    what = [fingerprint(folder), ids, bos, machine.libraries()]
    return BosTrial(*remembered(cache / "bos", what, lambda: _perplexities(open_model(), torch.tensor(ids), bos)))


@torch.no_grad()
def _perplexities(model: Skeleton, ids: Tensor, bos: int) -> list[float]:
    """Perplexity of ids[1:], after a BOS token and without, int64 [tokens]; 1e30 stands for more and for NaN.

    Of longer ids as many count as the model has positions.
    """
    model.open_shell()
    ids = ids[: getattr(model.config, "max_position_embeddings", None)]
    rows = torch.stack([torch.cat([torch.tensor([bos]), ids[:-1]]), ids])
    hidden = model.embed(rows).cpu()
    arguments = model.block_arguments(rows)
    for k, block in model.blocks():
        run_block(block, hidden, arguments[k], device=model.device, batch=2)
    out = []
    for states, start in ((hidden[0], 1), (hidden[1], 0)):
        total = 0.0
        for at in range(0, len(ids) - 1, _ROWS):
            target = ids[at + 1 : at + 1 + _ROWS].to(model.device)
            logits = model.logits(states[start + at : start + at + len(target)]).float()
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        mean = total / (len(ids) - 1)
        out.append(math.exp(mean) if mean < 69 else 1e30)
    model.close_shell()
    return out
