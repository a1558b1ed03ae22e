"""What a run will need, estimated from config.json and the shards' headers: output bytes, memory, disk, time."""

import shutil
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..calibrate import kv_cache
from ..core import machine
from ..core.errors import BadInput
from ..core.products import tf32_products
from ..core.ranks import ALONE, Ranks
from ..core.text import size
from ..formats import FORMATS
from ..methods import solves_batches
from ..models.placed_model import LinearLayer
from ..models.shards import JOINED
from ..models.skeleton import Skeleton
from ..numbers.grid import scale_dtype
from ..numbers.types import Grid
from ..recipe import MethodSettings, Qat, Recipe, Tuned
from .accounting import quantized_share
from .needs import find_needs, reaching
from .room import IN_HOST_MEMORY, Room, choose

TUNING_CHECKS = 4  # times the loss of a tuned block is measured over all samples
_PRODUCTS, _MOST_PRODUCTS = 100, 1000  # timed to learn how fast a device is: 0.1 s on a slow core
_ALIKE = 5  # of them that must be about as fast as the fastest


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, each the largest at one time.

    memory_bytes: resident memory of this machine's processes. device_bytes: tensors of one of them on `device`, where
    that is not the CPU; 0 where it is. disk_bytes: under `out`. passes: of calibration through the model, the
    original's among them.
    """

    layers: dict[str, str]
    original_bytes: int
    artifact_bytes: int
    memory_bytes: int
    disk_bytes: int
    operations: float
    seconds: float
    passes: int
    device: str = "cpu"
    device_bytes: int = 0
    quantized_share: float | None = None  # of the weights of the blocks' matrices; None where that is not counted
    room: Room = IN_HOST_MEMORY
    notes: tuple[str, ...] = ()  # what will differ from the original, and what is given up to fit in memory

    def check(self, out: Path, *, ignore: bool) -> None:
        """Raise BadInput when the machine has less memory, GPU memory or disk than the run needs."""
        if ignore:
            return
        less = "lower calibration.samples or seq_len" if self.passes else "free some"
        free_memory = machine.available_memory_bytes()
        if self.memory_bytes > free_memory:
            raise BadInput(
                f"the run needs {size(self.memory_bytes)} of memory and {size(free_memory)} are free; "
                f"{less}, or pass --ignore-limits"
            )
        where = torch.device(self.device)
        if where.type == "cuda" and self.device_bytes > (free_on_device := machine.available_device_bytes(where)):
            raise BadInput(
                f"the run needs {size(self.device_bytes)} of GPU memory and {size(free_on_device)} are free on "
                f"{self.device}; {less}, hide the GPU (CUDA_VISIBLE_DEVICES=) to run on "
                "the CPU, or pass --ignore-limits"
            )
        there = next(p for p in (out, *out.absolute().parents) if p.exists())
        free_disk = shutil.disk_usage(there).free
        if self.disk_bytes > free_disk:
            raise BadInput(
                f"the run needs {size(self.disk_bytes)} on disk and {there} has {size(free_disk)} free; "
                "free some, give another --out, or pass --ignore-limits"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    linears: list[LinearLayer],
    schemes: dict[str, Grid | None],
    ranks: Ranks = ALONE,
) -> Plan:
    """The plan of quantizing `linears` by `schemes` in processes that share the tokens."""
    reader: Any = skeleton.reader
    format, there = FORMATS[recipe.formats[0]], skeleton.device
    some = torch.empty(0, dtype=skeleton.dtype)
    saved = sum(reader.nbytes(f"{x.name}.weight") for x in linears if schemes[x.name] is not None)
    alike = Counter((schemes[x.name], x.out_features, x.in_features) for x in linears)
    # A scale too many where no static range will fit the inputs, which is known once they are measured.
    packed = sum(
        n * format.packed_bytes(grid, n_out, n_in, scale_dtype(some, grid).itemsize, recipe.activations)
        for (grid, n_out, n_in), n in alike.items()
        if grid is not None
    )
    artifact = skeleton.nbytes - saved + packed + kv_cache.scale_bytes(recipe.kv_cache, skeleton)
    needs = find_needs(recipe, skeleton, linears, schemes)
    calibrated, tokens, streams = recipe.calibrated, needs.tokens, needs.streams
    item, hidden = torch.empty(0, dtype=skeleton.dtype).element_size(), streams * needs.hidden
    room, needs = choose(needs, there, ranks), needs.of_one(ranks)
    if there.type == "cpu":
        memory, on_device = needs.on_cpu(room) * ranks.here, 0
    else:
        memory, on_device = needs.on_host(room) * ranks.here, needs.on_device(room)
    disk = artifact * (_copies(recipe, artifact) + len(recipe.formats) - 1)
    disk += 2 * hidden + needs.on_disk(room) * ranks.here
    tried = sum(transform.scales_tried for transform in recipe.transforms)
    solves = _solves(linears, schemes, streams, calibrated)
    everywhere = recipe.calibration.all_experts
    operations = _passes(skeleton, linears, schemes, tokens, streams, calibrated, everywhere) + solves
    if tried:  # one more pass of each block, to observe its inputs; it needs no more memory than rounding
        operations += _passes(skeleton, linears, schemes, tokens, 1, calibrated, everywhere)
        operations += sum(tried * 2.0 * min(x.out_features, 256) * x.in_features**2 for x in linears)
    if isinstance(recipe.method, Tuned):
        batch = recipe.method.batch_size * recipe.calibration.seq_len
        trained = 3 * recipe.method.n_steps * batch  # a backward pass costs two forward ones
        operations += 2.0 * (trained + TUNING_CHECKS * tokens) * sum(_active(skeleton, linears).values())
    if isinstance(recipe.method, Qat) and recipe.method.end_to_end is not None:
        trained = _end_to_end_bytes(recipe, skeleton, linears, needs.shell // item, artifact)
        memory = max(memory, needs.process + trained)
        on_device = max(on_device, trained - 2 * artifact) if on_device else 0  # the parts on disk are not there
        operations += _end_to_end_operations(recipe, recipe.method, skeleton, linears)
    return Plan(
        layers={x.name: str(schemes[x.name] or "16 bit") for x in linears},
        original_bytes=skeleton.nbytes,
        artifact_bytes=artifact,
        memory_bytes=memory,
        disk_bytes=disk,
        operations=operations,
        seconds=_seconds(operations, solves, skeleton, recipe.rounder) / ranks.size + skeleton.nbytes / 1e9,
        passes=streams + (tried > 0) if calibrated else 0,
        quantized_share=quantized_share(skeleton, linears, {n for n, grid in schemes.items() if grid is not None}),
        device=str(there),
        device_bytes=on_device,
        room=room,
        notes=tuple(filter(None, (room.note(there),))),
    )


def _copies(recipe: Recipe, artifact: int) -> int:
    """How often the artifact's tensors lie on disk at one time: parts become shards as they are, unless they are joined
    into one file, or scales are trained once more.
    """
    trained = isinstance(recipe.method, Qat) and recipe.method.end_to_end is not None
    return 2 if trained or artifact <= JOINED else 1


def held_out(samples: int) -> int:
    """Number of calibration sequences kept out of end-to-end training, to choose the best scales by."""
    return max(1, samples // 8)


def _passes(
    skeleton: Skeleton,
    linears: list[LinearLayer],
    schemes: dict[str, Grid | None],
    tokens: int,
    streams: int,
    calibrated: bool,
    everywhere: bool = False,
) -> float:
    """Operations of the passes through the blocks, and of the sums over what each linear receives.

    everywhere: experts receive all tokens.
    """
    total = 0.0
    for x in linears:
        here = tokens * (1.0 if everywhere else reaching(skeleton, x))
        total += 2.0 * streams * here * x.in_features * x.out_features
        if schemes[x.name] is not None and calibrated:
            # The moment, the drift at twice its work, and the drift's own moment.
            total += (3.0 * streams - 2) * here * x.in_features**2
    return total


def _solves(linears: list[LinearLayer], schemes: dict[str, Grid | None], streams: int, calibrated: bool) -> float:
    """Operations of rounding: the search for scales; with a Hessian the solve, and the error."""
    each = [x.in_features * x.out_features for x in linears if schemes[x.name] is not None]
    widths = [x.in_features for x in linears if schemes[x.name] is not None]
    searched = sum(100.0 * weights for weights in each)
    if not calibrated:
        return searched
    return searched + sum((3.0 + 3.0 * streams) * n * width for n, width in zip(each, widths, strict=True))


def _seconds(operations: float, solves: float, skeleton: Skeleton, method: MethodSettings) -> float:
    """How long operations take, of which `solves` are in float32, or TF32, and the others in the model's dtype."""
    device = skeleton.device
    if device.type != "cuda":
        return operations / _speed(device, torch.float32)
    with tf32_products() if solves_batches(method, device) else nullcontext():
        solving = solves / _speed(device, torch.float32)
    return (operations - solves) / _speed(device, skeleton.dtype) + solving


def _active(skeleton: Skeleton, linears: list[LinearLayer]) -> dict[int, float]:
    """Weights of each block that one token is multiplied by; of routed experts only those it is sent to."""
    active: dict[int, float] = {}
    for x in linears:
        active[x.block] = active.get(x.block, 0.0) + x.in_features * x.out_features * reaching(skeleton, x)
    return active


def _end_to_end_bytes(recipe: Recipe, skeleton: Skeleton, linears: list[LinearLayer], shell: int, artifact: int) -> int:
    """Bytes of the blocks as read and as written, codes in 8 and 16 bit, the rest in float32, and one sequence."""
    blocks: dict[int, list[int]] = {}
    for x in linears:
        sizes = blocks.setdefault(x.block, [0, 0])
        sizes[0] += x.in_features * x.out_features
        sizes[1] += x.in_features + x.out_features
    weights = sum(of_block for of_block, _ in blocks.values())
    largest, widths = max(of_block for of_block, _ in blocks.values()), max(width for _, width in blocks.values())
    config = skeleton.config
    a_token = skeleton.n_blocks * int(config.hidden_size) + 4 * int(config.vocab_size) + 3 * widths
    kept = recipe.calibration.seq_len * a_token
    # The original's outputs, and the states of both models that the linears' errors are measured on.
    kept += 3 * recipe.calibration.samples * recipe.calibration.seq_len * int(config.hidden_size)
    return 2 * artifact + 3 * weights + 4 * shell + 4 * (3 * largest + kept)


def _end_to_end_operations(recipe: Recipe, method: Qat, skeleton: Skeleton, linears: list[LinearLayer]) -> float:
    """Operations: a step costs four forward passes, since blocks are recomputed for the gradient; each check of the
    held-out sequences costs one.

    The head is not recomputed, but objective kl runs the original's head too, and its blocks once.
    """
    wanted = method.end_to_end
    assert wanted is not None
    samples = recipe.calibration.samples
    unseen = held_out(samples)
    sequences = 4 * wanted.steps * min(wanted.batch_size, samples - unseen) + (TUNING_CHECKS + 1) * unseen
    head = int(skeleton.config.hidden_size) * int(skeleton.config.vocab_size)
    blocks = sum(_active(skeleton, linears).values())
    total = sequences * (blocks + head) + (samples * blocks if wanted.objective == "kl" else 0)
    total += 4 * samples * blocks  # a pass of both models, and each linear's error in it
    return 2.0 * recipe.calibration.seq_len * total


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second on this device, measured once in a process for as many threads and the same precision."""
    return _speed_with(device, dtype, torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision)


@cache
def _speed_with(device: torch.device, dtype: torch.dtype, threads: int, float32: str) -> float:
    return _measured_speed(device, dtype)


def _measured_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product on this device, measured in a moment; halved for what is not one.

    The fastest of many, once others have come as near to it: whatever else the machine does only slows one down, by any
    factor, and can slow down all of them for a while. A CPU is measured in float32, which most of its work is in.
    """
    on_gpu = device.type == "cuda"
    n = 4096 if on_gpu else 256
    a = torch.ones(n, n, device=device, dtype=dtype if on_gpu else torch.float32)

    def seconds() -> float:
        machine.synchronize(device)
        started = time.perf_counter()
        a @ a
        machine.synchronize(device)
        return time.perf_counter() - started

    for _ in range(2):  # libraries are loaded, kernels chosen
        seconds()
    took: list[float] = []
    while len(took) < _PRODUCTS or (len(took) < _MOST_PRODUCTS and sorted(took)[_ALIKE - 1] > 1.03 * min(took)):
        took += [seconds()]
    return 2 * n**3 / min(took) / 2
