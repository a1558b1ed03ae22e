"""A rounded block tuned as a whole: gradient steps towards what the original block makes of the original inputs.

The rounded block gets the inputs it will really get, those the rounded blocks before it made; its target is the output
of the original model at the same place, so that it also makes up for errors already there.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ..artifact.manifest import LayerRecord
from ..calibrate.stages import BATCH_TOKENS
from ..core import machine
from ..methods import TUNERS, Tuner
from ..models.arguments import Arguments
from ..models.skeleton import Linear, run_block
from ..numbers.grid import QuantizedLinear
from ..recipe import Tuned
from .plan import TUNING_CHECKS
from .rounding import place, weight_of


class Tuning:
    """Block `k` on its way: made before the block is rounded, whose inputs and weights it keeps; run after."""

    def __init__(
        self, settings: Tuned, k: int, block: nn.Module, linears: Mapping[str, Linear], hidden: Tensor
    ) -> None:
        self._settings, self._k, self._block, self._linears = settings, k, block, linears
        self._inputs = hidden.clone()  # rounding replaces them by the outputs
        self._weights = {name: weight_of(block, linear) for name, linear in linears.items()}

    def run(
        self,
        rounded: dict[str, QuantizedLinear],
        records: dict[str, LayerRecord],
        hidden: dict[str, Tensor],
        arguments: Arguments,
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
        weights = {name: (self._weights[name], one.dequantize()) for name, one in rounded.items()}
        with output_errors(self._block, self._linears, weights) as errors:
            batch = max(1, BATCH_TOKENS // self._inputs.shape[1])
            run_block(self._block, self._inputs, arguments, device=device, batch=batch)
        for name in rounded:
            records[name] = records[name].changed(**errors[name], tuning=summary)
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
        self, block: nn.Module, inputs: Tensor, targets: Tensor, arguments: Arguments, device: torch.device
    ) -> None:
        native = all(p.dtype == torch.bfloat16 for p in block.parameters()) and machine.multiplies_bfloat16(device)
        self._products = torch.autocast(device.type, torch.bfloat16, enabled=native)
        self._block = copy.deepcopy(block).to(torch.float32)
        self._inputs, self._targets, self._device = inputs, targets, device
        self._arguments: Arguments = tree_map_only(
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


@contextmanager
def output_errors(
    block: nn.Module, linears: Mapping[str, Linear], weights: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure the linears of `block` on what passes through it inside; what the manifest says of each, once it ends.

    weights: of each the original one and what stands for it now, [out, in]. relative_error is the squared error over
    the squared output of the original weight, both for the inputs the linear gets here; loss the former a token.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in weights}  # error, output, tokens
    found: dict[str, dict[str, Any]] = {}

    def watch(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        before, now = (weight.to(torch.float32) for weight in weights[name])
        error, power = ((rows @ w.T).square().sum() for w in (now - before, before))
        sums[name] += torch.stack([error, power, error.new_tensor(len(rows))]).cpu()

    handles = [
        block.get_submodule(linears[name].module).register_forward_pre_hook(
            lambda _, args, name=name: watch(name, args[0])
        )
        for name in weights
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, (error, power, tokens) in ((name, total.tolist()) for name, total in sums.items()):
        found[name] = {
            "loss": error / tokens if tokens else None,
            "relative_error": error / power if power > 0 else 0.0,
            "tokens": int(tokens),
        }


def batches(samples: int, size: int, seed: int, k: int) -> Iterator[Tensor]:
    """Indices of `size` samples at a time, each pass over them in a new order; of block `k` alone, for a resume."""
    generator = torch.Generator().manual_seed((seed << 16) + k)
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))
