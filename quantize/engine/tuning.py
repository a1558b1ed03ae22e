"""A rounded block tuned as a whole: gradient steps towards what the original block makes of the original inputs.

The rounded block gets the inputs it will really get, those the rounded blocks before it made; its target is the output
of the original model at the same place, so that it also makes up for errors already there.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ..artifact.manifest import LayerRecord
from ..calibrate.block_pass import BATCH_TOKENS, paired_batches
from ..core import machine
from ..methods import TUNERS, Tuner
from ..methods.layer_error import LayerError, layer_error_of_rows
from ..models.block_arguments import BlockArguments
from ..models.skeleton import LinearLayer
from ..numbers.grid import QuantizedLinear
from ..recipe import Tuned
from .plan import TUNING_CHECKS
from .rounding import place, weight_of, with_weights


class Tuning:
    """Block `k` on its way: made before the block is rounded, whose inputs and weights it keeps; run after."""

    def __init__(
        self, settings: Tuned, k: int, block: nn.Module, linears: Mapping[str, LinearLayer], hidden: dict[str, Tensor]
    ) -> None:
        self._settings, self._k, self._block, self._linears = settings, k, block, linears
        self._inputs, self._reference = hidden["hidden"].clone(), hidden["reference"].clone()  # rounding replaces both
        self._weights = {name: weight_of(block, linear) for name, linear in linears.items()}

    def run(
        self,
        rounded: dict[str, QuantizedLinear],
        records: dict[str, LayerRecord],
        hidden: dict[str, Tensor],
        arguments: BlockArguments,
        device: torch.device,
    ) -> None:
        """Tune the block; replaces the linears in `rounded` and in the block, their records and hidden["hidden"].

        hidden["reference"] [samples, seq_len, hidden]: what the original model has after this block.
        """
        passes = Passes(self._block, self._inputs, hidden["reference"], arguments, device)
        start = {
            name: TUNERS[self._settings.name](self._settings, self._weights[name], one) for name, one in rounded.items()
        }
        best, summary = self._descend(start, passes)
        rounded.update(best)
        for name, one in rounded.items():
            place(self._block, self._linears[name], one)
        original = with_weights(self._block, {self._linears[name]: weight for name, weight in self._weights.items()})
        passing = paired_batches(
            self._block, original, {name: self._block.get_submodule(self._linears[name].module) for name in rounded},
            self._inputs, self._reference, arguments,
            device=device, batch=max(1, BATCH_TOKENS // self._inputs.shape[1]),
        )  # fmt: skip
        now = {name: one.dequantize() for name, one in rounded.items()}
        before = {name: weight.to(torch.float32) for name, weight in self._weights.items()}
        errors = measured_errors(now, before, passing)
        for name in rounded:
            records[name] = records[name].changed(**errors.get(name, {}), tuning=summary)
        hidden["hidden"] = self._inputs

    def _descend(
        self, tuners: Mapping[str, Tuner], passes: "Passes"
    ) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
        """The best of the iterates looked at, the start among them, and the block's loss before and after."""
        settings, n = self._settings, passes.samples

        def weights() -> dict[str, Tensor]:
            return {self._parameter(name): self._turned(name, one.weight) for name, one in tuners.items()}

        kept = {name: one.result for name, one in tuners.items()}
        first = least = passes.loss(weights())
        steps, found = settings.n_steps, 0
        interval = -(-steps // TUNING_CHECKS)
        picks = batches(n, settings.batch_size, settings.seed, self._k)
        for done in range(1, steps + 1):
            gradients = passes.gradients(weights(), next(picks))
            for name, one in tuners.items():
                gradient = gradients[self._parameter(name)]
                if gradient is not None:  # no token of the batch reached it
                    one.step(self._turned(name, gradient), (done - 1) / steps)
            if done % interval and done < steps:
                continue
            loss = passes.loss(weights())
            if loss < least:
                least, found = loss, done
                kept = {name: one.result for name, one in tuners.items()}
            elif settings.patience is not None and done - found >= settings.patience:
                break
        return kept, {"loss_before": first, "loss_after": least, "steps": found}

    def _parameter(self, name: str) -> str:
        return f"{self._linears[name].module}.weight"

    def _turned(self, name: str, matrix: Tensor) -> Tensor:
        """Between [out, in] and the way the module keeps its weight; its own inverse."""
        return matrix.T if self._linears[name].transposed else matrix


class Passes:
    """A block's forward and backward passes, with weights [out, in] handed in, against fixed targets.

    Hidden states, losses and gradients are float32. Products take their factors in bfloat16 where that is the model's
    own type, which the artifact computes in too, and the device multiplies it natively: twice as fast or more.
    """

    def __init__(
        self, block: nn.Module, inputs: Tensor, targets: Tensor, arguments: BlockArguments, device: torch.device
    ) -> None:
        native = all(p.dtype == torch.bfloat16 for p in block.parameters()) and machine.multiplies_bfloat16(device)
        self._products = torch.autocast(device.type, torch.bfloat16, enabled=native)
        self._block = copy.deepcopy(block).to(torch.float32)
        self._inputs, self._targets, self._device = inputs, targets, device
        self._arguments: BlockArguments = tree_map_only(
            Tensor, lambda x: x.to(torch.float32) if x.is_floating_point() else x, arguments
        )
        self._batch = max(1, BATCH_TOKENS // inputs.shape[1])

    @property
    def samples(self) -> int:
        return self._inputs.shape[0]

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean squared error of the block's output over all samples."""
        total = 0.0
        with torch.no_grad():
            for part in torch.split(torch.arange(self.samples), self._batch):
                total += float(self._squared_error(weights, part))
        return total / self._targets.numel()

    def gradients(self, weights: Mapping[str, Tensor], picked: Tensor) -> dict[str, Tensor | None]:
        """Of the mean squared error over the samples `picked`, by each weight; None where no token came."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        share = 1 / (picked.numel() * self._targets[0].numel())
        with torch.enable_grad():
            for part in torch.split(picked, self._batch):
                (self._squared_error(leaves, part) * share).backward()  # type: ignore[no-untyped-call]
        return {name: leaf.grad for name, leaf in leaves.items()}

    def _squared_error(self, weights: Mapping[str, Tensor], picked: Tensor) -> Tensor:
        args, kwargs = self._arguments
        x = self._inputs[picked].to(self._device, torch.float32)
        with self._products:
            result = functional_call(self._block, dict(weights), (x, *args), kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return (output - self._targets[picked].to(self._device, torch.float32)).square().sum()


def measured_errors(
    rounded: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    passing: Iterable[tuple[tuple[str, ...], Tensor, Tensor | None]],
) -> dict[str, dict[str, Any]]:
    """What the manifest says of the error of each linear, as its inputs pass (`paired_batches`).

    rounded, weights: what stands in the place of each original weight, and that one, [out, in] float32.
    """
    sums: dict[str, LayerError] = {}
    tokens = dict.fromkeys(weights, 0)
    for names, x, original in passing:
        rows = x.to(torch.float32)
        before = None if original is None else original.to(torch.float32)
        for name in names:
            error = layer_error_of_rows(weights[name], rounded[name], rows, before)
            sums[name] = sums[name] + error if name in sums else error
            tokens[name] += len(rows)
    return {name: sums[name].record(tokens[name]) | {"tokens": tokens[name]} for name in sums}


def batches(samples: int, size: int, seed: int, k: int) -> Iterator[Tensor]:
    """Indices of `size` samples at a time, each pass over them in a new order; of block `k` alone, for a resume."""
    generator = torch.Generator().manual_seed((seed << 16) + k)
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))
