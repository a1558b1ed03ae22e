"""Tuning a rounded block as a whole, by gradient steps towards the original block's output.

The rounded block is given the inputs it will get in the quantized model. The target is what the original model has
after this block, so that tuning also compensates for errors of the blocks before.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..artifact.manifest import LayerRecord
from ..calibrate.block_pass import BATCH_TOKENS, paired_batches
from ..core.products import multiplies
from ..methods import TUNERS, Tuner
from ..methods.layer_error import LayerError, layer_error_of_rows
from ..models.block_arguments import BlockArguments
from ..models.placed_model import LinearLayer
from ..numbers.grid import QuantizedLinear
from ..recipe import Tuned
from .block_weights import place, weight_of, with_weights
from .plan import TUNING_CHECKS


class Tuning:
    """Tuning of block `k`. Made before the block is rounded, to keep its inputs and weights; run afterwards."""

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
        """Tune the block; replaces its linears, here and in `rounded`, their records and hidden["hidden"].

        hidden["reference"] [samples, seq_len, hidden]: the original model's states after this block.
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
        """The linears with the least loss among those checked, the start included; and the loss before and after."""
        settings, n = self._settings, passes.samples

        def weights() -> dict[str, Tensor]:
            return {self._parameter(name): self._as_stored(name, one.weight) for name, one in tuners.items()}

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
                    one.step(self._as_stored(name, gradient), (done - 1) / steps)
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

    def _as_stored(self, name: str, matrix: Tensor) -> Tensor:
        """A matrix [out, in] as the module stores it, and back: Conv1D keeps [in, out]."""
        return matrix.T if self._linears[name].transposed else matrix


class Passes:
    """Forward and backward passes of a block against fixed targets, with weights [out, in] that are passed in.

    Hidden states, losses and gradients are float32. Matrix products are in bfloat16 where the model is, as in the
    artifact, and the device supports it natively: at least twice as fast.
    """

    def __init__(
        self, block: nn.Module, inputs: Tensor, targets: Tensor, arguments: BlockArguments, device: torch.device
    ) -> None:
        native = all(p.dtype == torch.bfloat16 for p in block.parameters()) and multiplies(torch.bfloat16, device)
        self._products = torch.autocast(device.type, torch.bfloat16, enabled=native)
        self._block = copy.deepcopy(block).to(torch.float32)
        self._inputs, self._targets, self._device = inputs, targets, device
        self._arguments = arguments
        self._batch = max(1, BATCH_TOKENS // inputs.shape[1])

    @property
    def samples(self) -> int:
        return self._inputs.shape[0]

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean squared error of the block's output over all samples."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for part in torch.split(torch.arange(self.samples), self._batch):
                total += self._squared_error(weights, part)
        return float(total) / self._targets.numel()  # read once: a GPU waits for it

    def gradients(self, weights: Mapping[str, Tensor], picked: Tensor) -> dict[str, Tensor | None]:
        """The gradient for each weight of the mean squared error over the samples `picked`; None if no token came."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        share = 1 / (picked.numel() * self._targets[0].numel())
        with torch.enable_grad():
            for part in torch.split(picked, self._batch):
                (self._squared_error(leaves, part) * share).backward()  # type: ignore[no-untyped-call]
        return {name: leaf.grad for name, leaf in leaves.items()}

    def _squared_error(self, weights: Mapping[str, Tensor], picked: Tensor) -> Tensor:
        x = self._inputs[picked].to(self._device, torch.float32)

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._block, dict(weights), args, kwargs)

        with self._products:
            output = self._arguments.call(run, x, picked, keep=False, dtype=torch.float32)
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
    """Endless batches of `size` sample indices, shuffled each epoch; seeded by block `k`, so a resume repeats them."""
    generator = torch.Generator().manual_seed((seed << 16) + k)
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))
