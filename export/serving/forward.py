"""Our own forward pass over a few sequences of unlike lengths, block by block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantpress.models.skeleton import Skeleton, run_block


@torch.no_grad()
def last_states(
    skeleton: Skeleton, sequences: Sequence[Tensor], on_block: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """Hidden states [len, ...] after the last block of each sequence [len]; each block is read once.

    Leaves the shell open for `skeleton.logits`.
    """
    skeleton.open_shell()
    hidden = [skeleton.embed(ids[None]).cpu() for ids in sequences]
    arguments = [skeleton.block_arguments(ids[None]) for ids in sequences]
    for k, block in skeleton.blocks():
        for states, given in zip(hidden, arguments, strict=True):
            run_block(block, states, given[k], device=skeleton.device, batch=1)
        on_block()
    return [states[0] for states in hidden]


def log_probabilities(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Next-token log-probabilities [rows, vocab], float32 on the CPU, of the states [rows, ...] of `last_states`."""
    return skeleton.logits(hidden).float().log_softmax(-1).cpu()
