"""The decoder blocks of a job, one after another: calibrate, transform, round, tune, write to the journal."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..artifact.manifest import BlockRecord, LayerRecord
from ..calibrate import kv_cache
from ..calibrate.block_pass import BATCH_TOKENS, BlockPass, SharedInput, shared_inputs
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.errors import BadInput
from ..formats import FORMATS
from ..models.block_arguments import BlockArguments
from ..models.checkpoint import write_part
from ..models.skeleton import LinearLayer, Skeleton
from ..numbers.activations import columns_of
from ..numbers.grid import Inputs, QuantizedLinear
from ..recipe import Qat, Tuned
from .end_to_end import QuantizedModel, train_scales
from .job import Job
from .journal import Journal
from .rounding import lend_input_scales, record, round_linears, weight_of
from .settings import BlockDone, Settings
from .transforms import BlockTransforms
from .tuning import Tuning


@machine.collecting_only_what_is_new()
def run_blocks(job: Job, tokens: Tokens | None, journal: Journal, settings: Settings) -> None:
    """Quantize each block that the journal does not hold yet; its outputs are the next block's inputs.

    tokens: the calibration text; not needed where the user's importance matrix stands in for it.
    """
    skeleton, first, keep_final = job.skeleton, len(journal.done), job.backend.keep_final
    if first == skeleton.n_blocks:
        return
    if job.backend.importance:
        tokens = None
    caches = None if job.recipe.kv_cache is None else kv_cache.attentions(skeleton)
    hidden, arguments = _hidden_states(job, tokens, journal)
    transforms = BlockTransforms(job.recipe, skeleton)
    for k, block in skeleton.blocks(first):
        started = time.monotonic()
        last = k + 1 == skeleton.n_blocks
        linears = {x.name: x for x in job.linears if x.block == k}
        rounded: dict[str, QuantizedLinear] = {}
        records: dict[str, LayerRecord] = {}
        passing = arguments[k] if arguments else None
        grids = {x.module: grid for x in linears.values() if (grid := job.schemes[x.name]) is not None}
        changes = transforms.apply(k, block, grids, hidden.get("hidden"), passing)
        method = job.recipe.method
        if changes.parameters and _trains_end_to_end(job):  # which measures errors against these weights
            kept = {name: weight_of(block, linear) for name, linear in linears.items()}
            write_part(_transformed(journal, k), kept)
        tuning = Tuning(method, k, block, linears, hidden) if isinstance(method, Tuned) else None
        cache = None if caches is None else kv_cache.Largest(*caches[k])
        whole = tuning is not None or cache is not None or not last or keep_final is not None
        for shared in _inputs(job, block, linears.values(), hidden, passing, whole, cache):
            alike = [linears[name] for name in shared.names]
            round_linears(job.recipe.rounder, job.schemes, block, alike, shared, rounded, records)
        lend_input_scales(rounded, records)
        if tuning is not None and arguments is not None:
            tuning.run(rounded, records, hidden, arguments[k], skeleton.device)
        _check_finite(hidden, k)
        layers = tuple(records.get(name) or record(x, None) for name, x in linears.items())
        seconds = time.monotonic() - started
        tensors = _block_tensors(job, k, block, rounded, changes.parameters, cache)
        if last and keep_final is not None:
            tensors |= keep_final(hidden["hidden"])
        line = BlockRecord(block=k, seconds=round(seconds, 3), layers=layers, transforms=tuple(changes.records))
        journal.commit(tensors, {} if last else hidden, line)
        machine.release_memory()
        errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
        settings.on_block(BlockDone(k + 1, skeleton.n_blocks, sum(errors) / len(errors) if errors else None, seconds))


def _hidden_states(
    job: Job, tokens: Tokens | None, journal: Journal
) -> tuple[dict[str, Tensor], list[BlockArguments] | None]:
    """The hidden states [samples, seq_len, hidden] that enter the next block, and the further arguments of each block.

    `hidden` comes out of the rounded blocks; `reference`, for error correction and tuning, out of the original ones.
    Without calibration there are no states, and arguments only where linears with a common input must share a scale.
    """
    shares = any(grid is not None and grid.shares_across_linears for grid in job.schemes.values())
    if tokens is None and not shares:
        return {}, None
    job.skeleton.open_shell()
    if tokens is None:
        arguments = job.skeleton.block_arguments(1)
        job.skeleton.close_shell()
        return {}, arguments
    if journal.done:
        hidden = journal.hidden()
    else:
        hidden = {"hidden": job.skeleton.embed(tokens.ids).cpu()}
        _check_finite(hidden, -1)
        if job.recipe.paired:
            hidden["reference"] = hidden["hidden"].clone()
    arguments = job.skeleton.block_arguments(tokens.ids.shape[1])
    job.skeleton.close_shell()
    return hidden, arguments


def _inputs(
    job: Job,
    block: nn.Module,
    linears: Iterable[LinearLayer],
    hidden: dict[str, Tensor],
    arguments: BlockArguments | None,
    whole: bool,
    cache: kv_cache.Largest | None,
) -> Iterable[SharedInput]:
    wanted = {x.name: block.get_submodule(x.module) for x in linears if job.schemes[x.name] is not None}
    recipe, states = job.recipe, hidden.get("hidden")
    spec = recipe.activations
    inputs = None if spec is None else (spec, columns_of(spec, recipe.weights))
    if states is None or arguments is None:
        together: list[tuple[str, ...]] = [(name,) for name in wanted]
        if arguments is not None:
            some = torch.ones(1, 1, job.skeleton.config.hidden_size, dtype=job.skeleton.dtype)
            together = shared_inputs(block, some.to(job.skeleton.device), arguments, wanted)
            together += [(name,) for name in wanted if not any(name in names for names in together)]
        rounded = None if inputs is None else Inputs(*inputs)
        there = job.skeleton.device
        weighed = {name: moment.to(there) for name, moment in job.backend.importance.items() if name in wanted}
        return [SharedInput(names, moment=weighed.get(names[0]), inputs=rounded) for names in together]
    batch = max(1, BATCH_TOKENS // states.shape[1])
    return BlockPass(
        block, states, arguments, wanted,
        device=job.skeleton.device, batch=batch, keep=whole, reference=hidden.get("reference"), activations=inputs,
        begin=(lambda: None) if cache is None else cache.start,
    )  # fmt: skip


def all_finite(values: Tensor) -> bool:
    """Whether no value of a float tensor is NaN or inf; twenty times faster than `torch.isfinite`."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def _check_finite(hidden: dict[str, Tensor], k: int) -> None:
    for states in hidden.values():
        if not all_finite(states):
            where = "the embedding" if k < 0 else f"block {k}"
            raise BadInput(f"activations that leave {where} hold NaN or inf; try bfloat16 or another text")


def _block_tensors(
    job: Job,
    k: int,
    block: nn.Module,
    rounded: dict[str, QuantizedLinear],
    changed: set[str],
    cache: kv_cache.Largest | None,
) -> dict[str, Tensor]:
    """All tensors of block `k` by on-disk name: packed linears, cache scales, and the other parameters, of which a
    transform has replaced those in `changed`.
    """
    format = FORMATS[job.recipe.formats[0]]
    tensors: dict[str, Tensor] = {}
    for name, linear in rounded.items():
        tensors |= {n: t.cpu() for n, t in format.pack(name, linear).items()}
    reader = job.skeleton.reader
    replaced = {n for name in rounded for kind in ("weight", "bias") for n in reader.on_disk(f"{name}.{kind}")}
    for name, disk in job.skeleton.block_names(k).items():
        if disk.removesuffix(".weight") in rounded:
            continue
        if name in changed or replaced & set(reader.on_disk(disk)):
            before = reader.read(disk)
            tensors[disk] = block.get_parameter(name).to("cpu", before.dtype) if name in changed else before
        else:
            tensors |= {n: reader.read(n) for n in reader.on_disk(disk) if n not in tensors}
    if cache is not None and job.recipe.kv_cache is not None:
        scales = zip(format.cache_suffixes, cache.scales(job.recipe.kv_cache), strict=True)
        tensors |= {f"{cache.name}.{suffix}": scale for suffix, scale in scales}
    return tensors


@dataclass(frozen=True)
class Trained:
    """The blocks' files; after end-to-end training its losses (summary) and the error of each linear (errors)."""

    parts: list[Path]
    summary: dict[str, float] | None = None
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def train_end_to_end(job: Job, tokens: Tokens | None, journal: Journal) -> Trained:
    """Train the scales of all blocks together where the recipe asks for it; otherwise the blocks' files as they are.

    The journal's files are not touched, so a run killed during training repeats it with the same result.
    """
    parts = [journal.part(k) for k in range(job.skeleton.n_blocks)]
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
    trained = [journal.folder / f"trained-{k:05d}.safetensors" for k in range(len(parts))]
    for path, one in zip(trained, tensors, strict=True):
        write_part(path, one)

    def transformed(k: int) -> Mapping[str, Tensor]:
        path = _transformed(journal, k)
        return load_file(path) if path.exists() else {}

    scales = {name: q.scales.to(model.device, torch.float32) for name, q in best.items()}
    return Trained(trained, summary, model.errors(scales, transformed))


def _trains_end_to_end(job: Job) -> bool:
    return isinstance(job.recipe.method, Qat) and job.recipe.method.end_to_end is not None


def _transformed(journal: Journal, k: int) -> Path:
    """The file with the transformed weights of block `k`, before rounding."""
    return journal.folder / f"transformed-{k:05d}.safetensors"
