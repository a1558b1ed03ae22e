"""The fused experts of a mixture, split into linears: the form in which they are calibrated, rounded and stored."""

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) for x [tokens, hidden]; its three linears have the checkpoint's names."""

    def __init__(self, hidden: int, intermediate: int, names: tuple[str, str, str], act: nn.Module) -> None:
        super().__init__()
        self._names, self._act = names, (act,)
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(up, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False))

    @property
    def last(self) -> nn.Module:
        """The down projection."""
        return self.get_submodule(self._names[2])

    def inner(self, x: Tensor) -> Tensor:
        """What the down projection receives [tokens, intermediate] for x [tokens, hidden]."""
        gate, up = (self.get_submodule(name) for name in self._names[:2])
        out: Tensor = self._act[0](gate(x)) * up(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(x))
        return out


class SplitExperts(nn.ModuleList):
    """Experts as linears of their own, so that each is calibrated and rounded on the tokens routed to it.

    Every expert is called, even with zero tokens, so that each pass reaches the same linears in the same order whatever
    the routing.
    """

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The chosen experts' weighted sum, for hidden [tokens, hidden]; index and weights are [tokens, chosen]."""
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self):
            token, position = self.tokens_of(e, top_k_index)
            result = expert(hidden[token]) * top_k_weights[token, position, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out

    @staticmethod
    def tokens_of(e: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that expert `e` is chosen for, in the order it gets them, and its rank among those of each token.

        top_k_index: the experts chosen for each token, [tokens, chosen].
        """
        token, position = torch.where(top_k_index == e)
        return token, position


def split_experts(block: nn.Module, where: str, names: tuple[str, str, str]) -> None:
    """Replace the fused experts at `where` in a block on the meta device by `SplitExperts`; a dense block stays."""
    parent, _, attribute = where.rpartition(".")
    owner = block.get_submodule(parent)
    fused: Any = getattr(owner, attribute, None)
    if not hasattr(fused, "gate_up_proj"):
        return  # some families mix dense and sparse blocks
    n, hidden, intermediate = fused.down_proj.shape
    with torch.device("meta"):
        experts = [Expert(hidden, intermediate, names, fused.act_fn) for _ in range(n)]
    setattr(owner, attribute, SplitExperts(experts))
