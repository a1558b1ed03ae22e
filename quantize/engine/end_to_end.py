"""E2E-QP of EfficientQAT (arXiv:2407.11062, 3.3): training the scales of a whole quantized model together.

The paper minimises the next-token loss. On a text that is new to the model it then learns the text and drifts away from
the original; the divergence from the original's predictions (objective kl) does not pull it away.

Codes and zeros are fixed. Blocks run one after another in float32 with activation checkpointing: only a block's input
is kept for the gradient, and the block is recomputed in the backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from ..calibrate.block_pass import paired_batches
from ..calibrate.tokens import Tokens
from ..formats import FORMATS
from ..methods.adam import Direction
from ..methods.fake_quant import storable
from ..models.block_arguments import BlockArguments
from ..models.placed_model import LinearLayer
from ..models.shards import write_part
from ..models.skeleton import Skeleton, run_block
from ..numbers.grid import QuantizedLinear
from ..recipe import Objective, Qat
from .block_weights import weight_of, with_weights
from .job import Job
from .journal import Journal
from .plan import TUNING_CHECKS, held_out
from .tuning import batches, measured_errors

_WHOLE = (1 << 16) - 1  # stands for the block's number in the seed of the sequences' order

Scales = dict[str, Tensor]  # [out, groups] float32 of each quantized linear


@dataclass(frozen=True)
class _Block:
    """A decoder block without the weights of its quantized linears, and its arguments beside the hidden states."""

    module: nn.Module
    linears: tuple[LinearLayer, ...]
    arguments: BlockArguments


class QuantizedModel:
    """The quantized model, computing in float32 with scales that are passed in.

    skeleton: of the original, in float32. parts: the on-disk tensors of each block. quantized: their linears, unpacked.
    ids [samples, seq_len]: the training tokens. For objective kl the original runs over them once, and the states that
    leave its last block are kept.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        parts: Sequence[Mapping[str, Tensor]],
        quantized: Mapping[str, QuantizedLinear],
        ids: Tensor,
        objective: Objective = "kl",
    ) -> None:
        self._skeleton, self.quantized, self._ids = skeleton, dict(quantized), ids
        device = skeleton.device
        self._numbers = {  # code - zero, in at most 9 bits
            name: (q.codes.to(torch.int16) - q.zeros.to(torch.int16)[:, q.column_groups()]).to(device)
            for name, q in quantized.items()
        }
        skeleton.open_shell()
        arguments = skeleton.block_arguments(ids)
        self._targets = skeleton.embed(ids).cpu() if objective == "kl" else None
        self._blocks = []
        for k, block in skeleton.blocks():
            if self._targets is not None:
                run_block(block, self._targets, arguments[k], device=device, batch=1)
            linears = tuple(x for x in skeleton.linears() if x.block == k and x.name in quantized)
            for linear in linears:
                module: Any = block.get_submodule(linear.module)
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
            own = deepcopy(block)
            for name, disk in skeleton.block_names(k).items():
                # Not the original's: a transform may have changed it. Quantized linears are packed and not among them.
                if disk in parts[k] and disk.removesuffix(".weight") not in quantized:
                    own.state_dict()[name].copy_(parts[k][disk])
            self._blocks.append(_Block(own, linears, arguments[k]))

    @property
    def device(self) -> torch.device:
        return self._skeleton.device

    @property
    def samples(self) -> int:
        return self._ids.shape[0]

    def loss(self, scales: Scales, i: int) -> Tensor:
        """The loss of sequence `i` in nats per token: next token, or divergence from the original's predictions.

        Differentiable with respect to `scales`.
        """
        x = self._skeleton.embed(self._ids[i : i + 1])
        for block in self._blocks:
            own = [scales[linear.name] for linear in block.linears]
            x = checkpoint(self._run, block, i, x, *own, use_reentrant=False)
        logits = self._skeleton.head(x[0])
        if self._targets is None:
            return cross_entropy(logits[:-1], self._ids[i, 1:].to(x.device))
        wanted = self._skeleton.logits(self._targets[i])
        return kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)

    @torch.no_grad()
    def errors(self, scales: Scales, transformed: Callable[[int], Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
        """For the manifest, the error of each linear with `scales`, measured in one pass over all sequences.

        transformed: the weights [out, in] of block k before rounding where a transform has changed them; the others
        are read from the original.
        """
        hidden = self._skeleton.embed(self._ids).cpu()
        reference = hidden.clone()
        found: dict[str, dict[str, Any]] = {}
        for k, original in self._skeleton.blocks():
            block = self._blocks[k]
            stored = self._weights(block, [scales[linear.name] for linear in block.linears])
            changed = transformed(k)
            before = [changed[x.name] if x.name in changed else weight_of(original, x) for x in block.linears]
            before = [weight.to(self.device, torch.float32) for weight in before]
            rounded, unrounded = (
                with_weights(block.module, dict(zip(block.linears, weights, strict=True)))
                for weights in (stored, before)
            )
            names = [x.name for x in block.linears]
            passing = paired_batches(
                rounded, unrounded, {x.name: rounded.get_submodule(x.module) for x in block.linears},
                hidden, reference, block.arguments, device=self.device, batch=1,
            )  # fmt: skip
            found |= measured_errors(
                dict(zip(names, stored, strict=True)), dict(zip(names, before, strict=True)), passing
            )
        return found

    def _weights(self, block: _Block, scales: Sequence[Tensor]) -> list[Tensor]:
        """The weight [out, in] of each linear of `block`, differentiable with respect to its scales [out, groups]."""
        return [
            (self._numbers[linear.name].to(torch.float32).view(*scale.shape, -1) * scale[:, :, None]).flatten(1)
            for linear, scale in zip(block.linears, scales, strict=True)
        ]

    def _run(self, block: _Block, i: int, x: Tensor, *scales: Tensor) -> Tensor:
        weights = {
            f"{linear.module}.weight": weight.T if linear.transposed else weight
            for linear, weight in zip(block.linears, self._weights(block, scales), strict=True)
        }

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, weights, args, kwargs)

        return block.arguments.call(run, x, slice(i, i + 1))


def train_scales(model: QuantizedModel, settings: Qat) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
    """Train the scales; returns the linears with the best ones, at worst those they had, and the loss before and after.

    The best are those with the least loss on the last sequences, which are not trained on.
    """
    chosen = settings.end_to_end
    assert chosen is not None
    n = model.samples - held_out(model.samples)
    unseen = range(n, model.samples)
    start = {name: q.scales.to(model.device, torch.float32) for name, q in model.quantized.items()}
    master = {name: scale.clone() for name, scale in start.items()}
    directions = {name: Direction(scale) for name, scale in start.items()}

    def stored() -> Scales:
        return {name: storable(scale, model.quantized[name].scales.dtype) for name, scale in master.items()}

    kept, found = start, 0
    first = least = _loss(model, start, unseen)
    interval = -(-chosen.steps // TUNING_CHECKS)
    picks = batches(n, chosen.batch_size, settings.seed, _WHOLE)
    for done in range(1, chosen.steps + 1):
        rate = chosen.lr * (1 - (done - 1) / chosen.steps)
        for name, gradient in _gradients(model, stored(), next(picks).tolist()).items():
            master[name] -= rate * start[name] * directions[name].follow(gradient)
        if done % interval and done < chosen.steps:
            continue
        loss = _loss(model, stored(), unseen)
        if loss < least:
            least, found, kept = loss, done, stored()
    best = {name: replace(q, scales=kept[name].to("cpu", q.scales.dtype)) for name, q in model.quantized.items()}
    return best, {"loss_before": first, "loss_after": least, "steps": found}


def _loss(model: QuantizedModel, scales: Scales, samples: Sequence[int]) -> float:
    with torch.no_grad():
        return sum(float(model.loss(scales, i)) for i in samples) / len(samples)


def _gradients(model: QuantizedModel, scales: Scales, samples: Sequence[int]) -> dict[str, Tensor]:
    """The gradient of the mean loss over `samples` for each linear; linears that no token reached are left out."""
    leaves = {name: scale.detach().requires_grad_() for name, scale in scales.items()}
    with torch.enable_grad():
        for i in samples:
            (model.loss(leaves, i) / len(samples)).backward()  # type: ignore[no-untyped-call]
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@dataclass(frozen=True)
class Trained:
    """The blocks' files with their SHA-256, in order; after end-to-end training its losses (summary) and the error of
    each linear (errors).
    """

    parts: Mapping[Path, str]
    summary: dict[str, float] | None = None
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def train_end_to_end(job: Job, tokens: Tokens | None, journal: Journal) -> Trained:
    """Train the scales of all blocks together where the recipe asks for it; otherwise the blocks' files as they are.

    The journal's files are not touched, so a run killed during training repeats it with the same result.
    """
    parts = journal.parts()
    method, format = job.recipe.method, FORMATS[job.recipe.formats[0]]
    if not isinstance(method, Qat) or method.end_to_end is None or tokens is None:
        return Trained(parts)
    tensors = [load_file(part) for part in parts]
    quantized = {
        x.name: format.unpack(x.name, tensors[x.block].__getitem__, grid, (x.out_features, x.in_features))
        for x in job.linears
        if (grid := job.schemes[x.name]) is not None
    }
    skeleton = Skeleton(job.reader, device=job.skeleton.device, dtype=torch.float32)
    model = QuantizedModel(skeleton, tensors, quantized, tokens.ids, method.end_to_end.objective)
    best, summary = train_scales(model, method)
    for x in job.linears:
        if x.name in best:
            tensors[x.block] |= format.pack(x.name, best[x.name])
    places = [journal.folder / f"trained-{k:05d}.safetensors" for k in range(len(parts))]
    trained = {path: write_part(path, one, sync=False) for path, one in zip(places, tensors, strict=True)}

    def transformed(k: int) -> Mapping[str, Tensor]:
        path = journal.transformed(k)
        return load_file(path) if path.exists() else {}

    scales = {name: q.scales.to(model.device, torch.float32) for name, q in best.items()}
    return Trained(trained, summary, model.errors(scales, transformed))


def trains_end_to_end(job: Job) -> bool:
    return isinstance(job.recipe.method, Qat) and job.recipe.method.end_to_end is not None
