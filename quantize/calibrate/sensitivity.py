"""How much errors in each weight change the model's predictions, measured block by block."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.block_arguments import BlockArguments, Slot
from ..models.skeleton import Skeleton, run_block
from ..models.towers import text_model
from .block_pass import BATCH_TOKENS

_STATES = "states"


@dataclass(frozen=True)
class Sensitivity:
    """Errors e in a weight [out, in] cause a KL divergence of about sum_rc rows_r columns_c e_rc^2 nats per token.

    columns float32 [in]: E[|g|^2 x_c^2] / E[|g|^2], squares of inputs x by how much their outputs' gradients g matter;
    rows float32 [out]: half of E[g_r^2 |x|^2] over the sum of columns. This is the divergence to second order for
    independent errors, with E[g_r^2 x_c^2] replaced by the product of its sums over rows and over columns.
    """

    rows: Tensor
    columns: Tensor

    def cost(self, error: Tensor, rows: Tensor) -> float:
        """The divergence in nats per token, from the errors [n, in] of a sample of `rows` [n]."""
        picked = self.rows[rows]
        return float((error.square() @ self.columns) @ picked) * float(self.rows.sum() / picked.sum().clamp(min=1e-30))


def measure(skeleton: Skeleton, tokens: Tensor, folder: Path, seed: int = 0) -> dict[str, list[Sensitivity]]:
    """The sensitivity of every linear and of the embedding, {on-disk name: one per use}, on tokens [samples, seq_len].

    With g the gradient of the loss on tokens drawn from the model's own predictions, E[g g^T] is the Fisher
    information; half of it is the second-order coefficient of the divergence. Blocks are loaded one at a time, first
    forwards, then backwards; in the backward pass each is recomputed from its inputs, which are kept in `folder`
    meanwhile. A tied head is the second use of the embedding.
    """
    count = tokens.numel()
    skeleton.open_shell()
    hidden = skeleton.embed(tokens).cpu()
    arguments = skeleton.block_arguments(tokens)
    skeleton.close_shell()
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    found: dict[str, list[Sensitivity]] = {}
    with tempfile.TemporaryDirectory(prefix="states-", dir=folder) as scratch:
        entered = [Path(scratch) / f"{k}.safetensors" for k in range(skeleton.n_blocks)]
        for k, block in skeleton.blocks():
            save_file({_STATES: hidden} | (arguments.carried(k - 1) if k else {}), entered[k])
            run_block(block, hidden, arguments[k], device=skeleton.device, batch=batch)
        gradient, head = _through_head(skeleton, tokens, hidden, seed)
        del hidden
        left: dict[Slot, Tensor] = {}
        for k, block in skeleton.blocks(backwards=True):
            linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == k}
            tensors = load_file(entered[k])
            if k:
                arguments.restore(k - 1, tensors)
            with _observed(linears) as seen:
                left = _through_block(block, tensors[_STATES], gradient, left, arguments[k], skeleton.device)
            if k:
                arguments.restore(k - 1, {})
            found |= {name: [sums.sensitivity(count)] for name, sums in seen.items()}
            entered[k].unlink()
    embedding, use = _through_embedding(skeleton, tokens, gradient)
    found[embedding] = [use]
    for name, use in head.items():
        found.setdefault(embedding if skeleton.tied else name, []).append(use)
    return found


class _Sums:
    """Sums over tokens of g^2 |x|^2 [out], x^2 |g|^2 [in] and |g|^2, of a linear's output gradients g and inputs x.

    So the few tokens with huge inputs count as much as their outputs matter, which is often nothing.
    """

    def __init__(self) -> None:
        self.rows: Tensor | float = 0.0
        self.columns: Tensor | float = 0.0
        self.gradients: Tensor | float = 0.0

    def note(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """A forward hook; sums grow when the backward pass reaches the output."""
        if not out.requires_grad:
            return  # of a constant, as the padding before the first token of a convolution
        inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float().square()  # now: a block may change x in place
        out.register_hook(lambda g: self._add(inputs, g))  # type: ignore[no-untyped-call]

    def _add(self, inputs: Tensor, g: Tensor) -> None:
        gradients = g.reshape(-1, g.shape[-1]).float().square()
        self.rows = self.rows + (inputs.sum(1) @ gradients).cpu()
        self.columns = self.columns + (gradients.sum(1) @ inputs).cpu()
        self.gradients = self.gradients + gradients.sum().cpu()

    def sensitivity(self, tokens: int) -> Sensitivity:
        """tokens: of the whole text, of which an expert sees a part."""
        columns = torch.as_tensor(self.columns / torch.as_tensor(self.gradients).clamp(min=1e-30))
        return Sensitivity(torch.as_tensor(self.rows / columns.sum().clamp(min=1e-30) / tokens / 2), columns)


@contextlib.contextmanager
def _observed(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, _Sums]]:
    sums = {name: _Sums() for name in linears}
    handles = [module.register_forward_hook(sums[name].note) for name, module in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _through_head(
    skeleton: Skeleton, tokens: Tensor, hidden: Tensor, seed: int
) -> tuple[Tensor, dict[str, Sensitivity]]:
    """The gradient [samples, seq_len, hidden] at the last block's output, and the sensitivity of the head."""
    skeleton.open_shell()
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.empty_like(hidden)
    output = text_model(skeleton.model).get_output_embeddings()
    heads = {name: m for name in skeleton.head_modules() if (m := skeleton.model.get_submodule(name)) is output}
    with _observed(heads) as seen:
        for i, states in enumerate(hidden):
            states = states.clone().requires_grad_()
            logits = skeleton.head(states).float()
            drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            (gradient[i],) = torch.autograd.grad(loss, states)
    skeleton.close_shell()
    names = {name: skeleton.disk_name(f"{name}.weight").removesuffix(".weight") for name in heads}
    return gradient, {names[name]: sums.sensitivity(tokens.numel()) for name, sums in seen.items()}


def _through_block(
    block: nn.Module,
    hidden: Tensor,
    gradient: Tensor,
    left: Mapping[Slot, Tensor],
    arguments: BlockArguments,
    device: torch.device,
) -> dict[Slot, Tensor]:
    """Propagate gradients back through the block, a sequence at a time; returns those for what earlier blocks left.

    hidden, gradient: [samples, seq_len, hidden], the latter changed in place. left: the gradients [samples, ...] for
    what there is for later blocks after this one, such as keys and values that several share.
    """
    before: dict[Slot, Tensor] = {}
    for i in range(len(hidden)):
        one = slice(i, i + 1)
        of_left = {slot: tensor[one].to(device) for slot, tensor in left.items()}
        back, passed = arguments.gradients(block, hidden[one].to(device), one, gradient[one].to(device), of_left)
        gradient[i] = back[0]
        for slot, g in passed.items():
            before.setdefault(slot, torch.zeros(len(hidden), *g.shape[1:]))[i] = g[0]
    return before


def _through_embedding(skeleton: Skeleton, tokens: Tensor, gradient: Tensor) -> tuple[str, Sensitivity]:
    """Name and sensitivity of the embedding: rows weigh as often as their token occurs, columns by their gradient."""
    skeleton.open_shell()
    module = skeleton.embeddings
    name = next(n for n, m in skeleton.model.named_modules() if m is module)
    squares = torch.zeros(module.embedding_dim)
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: kept.append(out.requires_grad_()))
    for row, g in zip(tokens, gradient, strict=True):
        kept.clear()
        hidden = skeleton.embedding(row[None])
        (back,) = torch.autograd.grad(hidden, kept[0], g[None].to(hidden.device))
        squares += back[0].float().square().sum(0).cpu()
    handle.remove()
    skeleton.close_shell()
    rows = torch.bincount(tokens.reshape(-1), minlength=module.num_embeddings).float() / tokens.numel()
    return skeleton.disk_name(f"{name}.weight").removesuffix(".weight"), Sensitivity(rows, squares / tokens.numel() / 2)
