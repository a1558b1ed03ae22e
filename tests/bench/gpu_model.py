"""One decoder block of known models by GPTQ on a GPU that exists on paper: `make gpu-model`, see paper_gpu.py.

A JSON line a model: seconds, launches, syncs, peak_gb of GPU memory and the most that `plan` says, and the seconds of
each part. Calibrated on 128 x 2048 tokens with error correction, on a card of 80 GB that is used as a run uses it; the
block is on the GPU already and so is the next one, packed tensors leave beside the next block's work.
"""

import argparse
import contextlib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantpress.calibrate import block_pass, picked_rows
from quantpress.calibrate.tokens import Tokens
from quantpress.core import machine
from quantpress.core.products import exact_float32_products
from quantpress.engine import blocks, rounding
from quantpress.engine.needs import find_needs
from quantpress.engine.room import Room, choose
from quantpress.methods import gptq_batch, upper_factors
from quantpress.models import fused, fused_kernels
from quantpress.models import skeleton as skeletons
from quantpress.models.block_arguments import SAMPLES_FIRST, Given, ModelArguments
from quantpress.models.model_tensors import ModelTensors
from quantpress.numbers import fitting
from quantpress.recipe import Recipe

from .paper_gpu import PaperGpu, PaperValues, replaced

CUDA = torch.device("cuda", 0)
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
MODELS: dict[str, dict[str, Any]] = {
    "llama8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama70b": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "llama405b": _LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
}  # fmt: skip
RECIPE = {"method": {"name": "gptq"}, "weights": {"bits": 4, "group_size": 128, "symmetric": False}}


class _Reader:
    """A checkpoint of which only names and shapes are known."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        self._shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        return list(self._shapes)

    def on_disk(self, name: str) -> list[str]:
        return [name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def nbytes(self, name: str) -> int:
        return 2 * math.prod(self._shapes[name])


def _read_block(skeleton: Any, k: int) -> dict[str, Tensor]:
    block, names = skeleton.block(k), skeleton.block_names(k)
    return {name: torch.empty(x.shape, dtype=x.dtype) for name, x in block.state_dict().items() if name in names}


class _Transfers:
    """Copies that overlap: nobody waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def has(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type

    def fetch(self, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        return lambda: {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def store(self, values: Tensor, into: Tensor) -> None:
        into.copy_(values, non_blocking=True)

    def hand_over(self, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        return lambda: dict(tensors)

    def settle(self) -> None:
        pass


class _Run(blocks._Run):
    """A run whose hidden states are already there."""

    def _states(self, tokens: Any) -> Any:
        samples, seq_len = tokens.ids.shape
        config = self._skeleton.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        hidden = torch.empty(
            samples, seq_len, config.hidden_size, dtype=torch.bfloat16, device=CUDA if self._room.on_device else None
        )
        turn = torch.empty(1, seq_len, size, dtype=torch.bfloat16, device=CUDA)
        position = torch.empty(1, seq_len, dtype=torch.int64, device=CUDA)
        given: Given = (), {"attention_mask": None, "position_ids": position, "position_embeddings": (turn, turn)}
        seen = [given] * self._skeleton.n_blocks
        arguments = ModelArguments(tokens.ids, CUDA, seen, None, SAMPLES_FIRST, (config.hidden_size,))
        names = ("hidden", "reference") if self._job.recipe.paired else ("hidden",)
        return {name: hidden.clone() for name in names}, arguments


def one_block(name: str, recipe: Recipe, room: Room | None) -> tuple[PaperGpu, Room, int]:
    """Quantize the first block of a model. Returns the room chosen for it, if none is given, and the bytes planned."""
    config = MODELS[name] | {"num_hidden_layers": 1, "dtype": "bfloat16", "tie_word_embeddings": False}
    reader = _Reader(config)
    gpu = PaperGpu()
    with contextlib.ExitStack() as stack:
        for undo in _patches(gpu):
            stack.callback(undo)
        stack.enter_context(exact_float32_products())
        stack.enter_context(torch.no_grad())
        skeleton: Any = skeletons.Skeleton(reader, device=CUDA)  # type: ignore[arg-type]
        linears = skeleton.linears()
        schemes = recipe.schemes({x.name: x.in_features for x in linears})
        needs = find_needs(recipe, skeleton, linears, schemes)
        room = choose(needs, CUDA) if room is None else room
        job: Any = types.SimpleNamespace(
            recipe=recipe, skeleton=skeleton, linears=linears, schemes=schemes,
            backend=types.SimpleNamespace(importance={}, keep_final=lambda states: {}),
            plan=types.SimpleNamespace(room=room),
        )  # fmt: skip
        journal: Any = types.SimpleNamespace(
            batch_tokens=None, done=[], keeps_hidden=False, settle=lambda: None, commit=lambda *args, **kwargs: None
        )
        settings: Any = types.SimpleNamespace(on_block=lambda done: None, on_note=lambda note: None)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for undo in PaperValues(gpu).patches():
            stack.callback(undo)
        stack.enter_context(gpu)
        ids = torch.empty(recipe.calibration.samples, recipe.calibration.seq_len, dtype=torch.int64, device="cpu")
        run = _Run(job, Tokens(ids, "", bos=False), journal)
        reading = skeleton.blocks()
        k, block = next(reading)
        following = [parameter.clone() for parameter in block.parameters()]
        gpu.reset()
        run.block(k, block, settings)
        del following
    return gpu, room, needs.on_device(room)


def _patches(gpu: PaperGpu) -> Iterator[Callable[[], None]]:
    """What stands in for a driver, and the parts that time is counted under."""

    def under(name: str) -> Callable[[Callable[..., Any]], Any]:
        def around(old: Callable[..., Any]) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                with gpu.part(name):
                    return old(*args, **kwargs)

            return call

        return around

    for module in (block_pass, blocks, skeletons):
        yield replaced(module, "Transfers", lambda old: _Transfers)
    batch, passing, rounds = block_pass.PairedBatch, block_pass.BlockPass, rounding.BlockRounding
    for owner, attributes, name in (
        (batch, ("advance", "original_input", "original_output", "let_go", "rest", "finish"), "forward"),
        (passing, ("_shared_inputs",), "moments"),
        (rounds, ("round", "finish"), "rounding"),
        (blocks, ("_block_tensors",), "packing"),
    ):
        for attribute in attributes:
            yield replaced(owner, attribute, under(name))
    yield replaced(machine, "device_memory", lambda old: lambda where: (gpu.card.size, gpu.card.size))
    yield replaced(rounding, "kernels_refused", lambda old: lambda *what: None)
    yield replaced(skeletons.Skeleton, "read_block", lambda old: _read_block)
    yield replaced(ModelTensors, "read", lambda old: lambda self, name: torch.empty(0))
    for cached in (fitting._constant, picked_rows._constants):
        yield cached.cache_clear
        cached.cache_clear()
    yield replaced(fused, "_same", lambda old: lambda *what: gpu.wait() is None)
    yield replaced(fused_kernels, "rms_norm", lambda old: partial(_elementwise, gpu, "rms_norm", 1))
    yield replaced(fused_kernels, "silu_times", lambda old: partial(_elementwise, gpu, "silu_times", 2))
    yield replaced(fused_kernels, "rotate", lambda old: partial(_elementwise, gpu, "rotate", 1))
    for attribute, name in (("factor", "factors"), ("pull_of", "error correction"), ("lead_of", "error correction")):
        yield replaced(gptq_batch, attribute, under(name))
    yield replaced(upper_factors, "split_in_halves", lambda old: partial(_split_in_halves, gpu))
    yield replaced(gptq_batch, "columns_first", lambda old: partial(_columns_first, gpu))
    yield replaced(gptq_batch, "rows_first", lambda old: partial(_rows_first, gpu))
    yield replaced(gptq_batch, "solve_columns", lambda old: partial(_solve_columns, gpu))
    yield replaced(gptq_batch, "fit_scales", lambda old: partial(_fit_scales, gpu))


def _elementwise(gpu: PaperGpu, name: str, read: int, x: Tensor, *others: Any) -> Tensor:
    """Reads `read` tensors like x and writes one."""
    gpu.kernel(name, (read + 1) * x.numel() * x.element_size())
    return torch.empty_like(x)


def _split_in_halves(gpu: PaperGpu, x: Tensor) -> Tensor:
    """Reads x and writes it four times."""
    gpu.kernel("split_in_halves", 20 * x.numel())
    return x.new_empty(*x.shape[:2], 4 * x.shape[2])


def _columns_first(gpu: PaperGpu, x: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
    """Reads x and writes it in `dtype`."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=dtype)
    gpu.kernel("columns_first", sum(y.numel() * y.element_size() for y in (x, out)))
    return out


def _rows_first(
    gpu: PaperGpu, numbers: Tensor, back: Tensor, group: Tensor, scales: tuple[Tensor, Tensor], weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads numbers, scales and weight, writes codes, a weight and a sum for each 256 columns; a tenth of the rest."""
    codes, rounded = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    lost = weight.new_empty(weight.shape[:2], dtype=torch.float32)
    read = sum(x.numel() * x.element_size() for x in (numbers, *scales, weight))
    gpu.kernel("rows_first", read + sum(x.numel() * x.element_size() for x in (codes, rounded)) + numbers.numel() // 16)
    return codes, rounded, lost


def _solve_columns(gpu: PaperGpu, fed: Tensor, inside: Tensor, variance: Tensor, *others: Any) -> None:
    """Reads columns, feedback, lead and scales, writes errors and numbers; a product with the errors each column.

    Columns are rounded one after the other: about 450 cycles each.
    """
    linears, columns, rows = fed.shape
    arithmetic = linears * rows * (2 * columns * columns + 30 * columns)
    with gpu.part("columns"):
        led = 4 if others[-2] is not None else 0
        gpu.kernel("solve_columns", (24 + led) * fed.numel(), 2 * arithmetic, least=columns * 0.27e-6)


def _fit_scales(gpu: PaperGpu, columns: Tensor, *others: Any) -> None:
    """Reads the columns once to find their range and, out of the cache, once more; 13 ranges of about 14 operations."""
    with gpu.part("scale search"):
        gpu.kernel("fit_scales", 8 * columns.numel(), 2 * 13 * 14 * columns.numel(), least=columns.shape[1] * 0.1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["llama8b", "llama70b", "qwen3moe"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON that replaces keys of the recipe")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument(
        "--little-memory", action="store_true", help="states on the host, batches run again, not waiting"
    )
    parser.add_argument("--kernels", action="store_true", help="print the launches and milliseconds of each part, too")
    given = parser.parse_args()
    room = Room(given.batch_tokens, False, False, True) if given.little_memory else None
    recipe = Recipe.model_validate(
        RECIPE | {"calibration": {"samples": given.samples, "seq_len": given.seq_len}} | given.recipe
    )
    for name in given.models:
        gpu, chosen, planned = one_block(name, recipe, room)
        total = gpu.total
        line = {
            "model": name, "seconds": round(total.seconds, 3), "launches": total.launches, "syncs": total.waits,
            "peak_gb": round(gpu.peak / 1e9, 1), "planned_gb": round(planned / 1e9, 1), "peak_in": gpu.peak_in,
            "room": {"batch_tokens": chosen.batch_tokens, "on_device": chosen.on_device, "restarts": chosen.restarts},
            "parts": {part: round(counted.seconds, 3) for part, counted in gpu.parts.items()},
        }  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        if given.kernels:
            for part, counted in gpu.parts.items():
                most = sorted(counted.took.items(), key=lambda one: -one[1])[:12]
                took = {name: round(1000 * seconds, 1) for name, seconds in most}
                sys.stdout.write(f"  {part}: {dict(counted.operations.most_common(12))}\n    ms: {took}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
