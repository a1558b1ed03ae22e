"""From a recipe and a checkpoint to the artifact folder, one decoder block at a time."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import kv_cache, machine
from .activations import columns_of
from .artifact import verify
from .calibration import Tokens, calibration_tokens, generated_tokens, open_tokenizer
from .checkpoint import Checkpoint, copy_companions, merge_parts, write_json, write_part
from .convert import convert
from .errors import BadInput
from .formats import FORMATS
from .grid import Grid, Inputs, QuantizedLinear
from .journal import Journal, finished
from .model import Arguments, Linear, Skeleton
from .plan import BATCH_TOKENS, Plan, make_plan, paired_samples
from .recipe import AutoRound, Hadamard, Recipe
from .rotation import Rotated
from .rounding import record, round_stage
from .sources import Source
from .stages import Stage, Stages, shared_inputs
from .texts import load_documents
from .transforming import BlockTransforms
from .tuning import Tuning


@dataclass(frozen=True)
class Progress:
    """A block has been finished."""

    block: int
    blocks: int
    loss: float | None  # mean relative error of its linears
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What the command line decides, beside the recipe."""

    out: Path
    cache: Path
    overwrite: bool = False
    ignore_limits: bool = False
    trust_remote_code: bool = False
    on_block: Callable[[Progress], None] = lambda progress: None
    on_note: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Job:
    """A recipe that has been found to fit its model: everything but the work.

    checkpoint: the original. reader: what is quantized, the original or its rotation.
    """

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    reader: Checkpoint | Rotated
    skeleton: Skeleton
    linears: list[Linear]
    schemes: dict[str, Grid | None]
    plan: Plan

    @property
    def shuffled(self) -> bool:
        return self.recipe.shuffled


def prepare(recipe: Recipe, source: Source, device: torch.device | None = None) -> Job:
    """Check the recipe against the model from config and shard headers alone; raises BadInput for what cannot run."""
    machine.flush_denormals()
    checkpoint = Checkpoint(source.path)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method")
        raise BadInput(f"{source.id} is already quantized ({method}); give the original checkpoint")
    first = recipe.transforms[0] if recipe.transforms else None
    reader = Rotated(checkpoint, first.seed) if isinstance(first, Hadamard) else checkpoint
    skeleton = Skeleton(reader, device=device or machine.device())
    linears = skeleton.linears()
    schemes = recipe.schemes({linear.name: linear.in_features for linear in linears})
    for name in recipe.formats:
        _check_format(name, linears, schemes, skeleton, recipe)
    BlockTransforms(recipe, skeleton)
    if recipe.kv_cache is not None:
        kv_cache.attentions(skeleton)
    plan = make_plan(recipe, skeleton, linears, schemes)
    notes = reader.notes if isinstance(reader, Rotated) else ()
    plan = replace(plan, original_bytes=checkpoint.total_bytes, notes=notes)
    return Job(recipe, source, checkpoint, reader, skeleton, linears, schemes, plan)


def _check_format(
    format: str, linears: list[Linear], schemes: dict[str, Grid | None], skeleton: Skeleton, recipe: Recipe
) -> None:
    """Raise BadInput for what `format` cannot hold, layer by layer and as a whole."""
    for linear in linears:
        grid = schemes[linear.name]
        if grid is None:
            continue
        if format != "gptq" and linear.transposed:
            raise BadInput(
                f"{linear.name} is a Conv1D, which readers of {format} leave unquantized without a word; "
                "write it with --set formats=[gptq]"
            )
        try:
            FORMATS[format].check(grid, linear.out_features, linear.in_features, recipe.shuffled)
        except BadInput as error:
            raise BadInput(f"{linear.name}: {error}") from None
    FORMATS[format].config(
        schemes, ignored_extra=skeleton.outside(), shuffled=recipe.shuffled, activations=recipe.activations,
        kv_cache=recipe.kv_cache,
    )  # fmt: skip


def quantize(job: Job, settings: Settings) -> dict[str, Any]:
    """Write `out/quantized` (and `out/converted/<format>` for further formats); returns the run's manifest.

    Raises BadInput before the work for bad weights, text or an output folder that holds another run. A run that was
    killed goes on after its last finished block and writes the same bytes; one that is finished is left as it is.
    """
    started = time.monotonic()
    work = settings.out / ".work"
    _check_room(settings)
    tokenizer = open_tokenizer(job.source.path, settings.trust_remote_code)
    if _is_finished(settings):
        return _finished(job, tokenizer, settings)
    job.plan.check(settings.out, ignore=settings.ignore_limits)
    _check_weights(job)
    tokens = _tokens(job, tokenizer, settings)
    files = job.checkpoint.file_hashes()
    if settings.overwrite:
        _make_room(settings.out)
    journal = Journal(work, _key(job, files, tokens))
    _run_blocks(job, tokens, journal, settings)
    manifest = _manifest(job, files, tokens, journal)
    _finish(job, journal, settings, manifest)
    timing = {"seconds": time.monotonic() - started, "cpu_seconds": machine.cpu_seconds()}
    timing["peak_rss_bytes"] = machine.peak_rss_bytes()
    manifest |= {"machine": machine.describe(job.skeleton.device), "timing": timing}
    manifest["timing"]["per_block_seconds"] = [done["seconds"] for done in journal.done]
    write_json(settings.out / "manifest.json", manifest)
    shutil.rmtree(work)
    return manifest


def _check_room(settings: Settings) -> None:
    """An output folder is new, or holds a run: which one is seen later."""
    out = settings.out
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; --out names a folder")
    if out.exists() and any(out.iterdir()) and not any((out / n).exists() for n in (".work", "quantized")):
        raise BadInput(f"{out} is not empty and holds no quantpress run; give another --out")
    unfinished = (out / "quantized").exists() and not _is_finished(settings)
    if unfinished and not settings.overwrite and not (out / ".work" / "key.json").exists():
        raise BadInput(f"{out} holds an artifact without a manifest.json; give another --out, or --overwrite")


def _is_finished(settings: Settings) -> bool:
    """The manifest is the last thing a run writes; what a kill left in .work after it no longer counts."""
    out = settings.out
    return not settings.overwrite and (out / "quantized").is_dir() and (out / "manifest.json").is_file()


def _finished(job: Job, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """The manifest of the run that is there, when it is this very run; raises BadInput when it is not, or damaged."""
    itself = job.recipe.calibrated and job.recipe.calibration.source == "self"
    key = _key(job, job.checkpoint.file_hashes(), None if itself else _tokens(job, tokenizer, settings))
    manifest = finished(settings.out, key, compare_calibration=not itself)
    verify(settings.out)
    shutil.rmtree(settings.out / ".work", ignore_errors=True)
    settings.on_note(f"{settings.out / 'quantized'} is this very run, finished before: it is used as it is")
    return manifest


def _make_room(out: Path) -> None:
    for name in (".work", "quantized", "quantized.partial", "converted", "eval", "report", "manifest.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_weights(job: Job) -> None:
    """NaN and inf are found before the work, by layer; and whether a rotated tensor still fits its number type."""
    for name in job.checkpoint.names():
        if kind := _not_finite(job.checkpoint.read(name)):
            raise BadInput(f"{job.checkpoint.file_of(name)}: {name} holds {kind}; the checkpoint is damaged")
    if isinstance(job.reader, Rotated):
        for name in job.reader.names():
            if kind := _not_finite(job.reader.read(name)):
                dtype = str(job.reader.dtype(name)).removeprefix("torch.")
                raise BadInput(f"{name} holds {kind} in {dtype} once it is rotated; convert the checkpoint to bfloat16")


def _not_finite(tensor: Tensor) -> str | None:
    for part in torch.split(tensor.reshape(-1), 1 << 20):  # isfinite makes copies: of a piece, not of the tensor
        if not bool(torch.isfinite(part).all()):
            return "NaN" if bool(torch.isnan(part).any()) else "inf"
    return None


def _tokens(job: Job, tokenizer: Any, settings: Settings) -> Tokens | None:
    if not job.recipe.calibrated:
        return None
    wanted = job.recipe.calibration
    limit = getattr(job.skeleton.config, "max_position_embeddings", None)
    if limit is not None and wanted.seq_len > limit:
        raise BadInput(f"calibration.seq_len {wanted.seq_len} is more than the model's {limit} positions")
    if wanted.source == "self":
        return generated_tokens(job.source.path, tokenizer, wanted)
    text = load_documents(wanted, cache=settings.cache, role="calibration")
    return calibration_tokens(tokenizer, text.documents, text.source, wanted)


def _key(job: Job, files: dict[str, str], tokens: Tokens | None) -> dict[str, Any]:
    """What makes two runs the same run."""
    recipe = job.recipe.model_dump(mode="json", exclude={"name", "description", "evaluation", "gates", "model"})
    return {
        "recipe": recipe,
        "model": files,
        "calibration": None if tokens is None else tokens.sha256,
        "quantpress": version("quantpress"),
        "torch": torch.__version__,
        "device": machine.describe(job.skeleton.device)["device"],
        "threads": torch.get_num_threads(),
    }


def _run_blocks(job: Job, tokens: Tokens | None, journal: Journal, settings: Settings) -> None:
    """Calibrate, round, propagate and write each block that the journal does not hold yet."""
    skeleton, first = job.skeleton, len(journal.done)
    if first == skeleton.n_blocks:
        return
    caches = None if job.recipe.kv_cache is None else kv_cache.attentions(skeleton)
    hidden, arguments = _hidden_states(job, tokens, journal)
    transforms = BlockTransforms(job.recipe, skeleton)
    for k, block in skeleton.blocks(first):
        started = time.monotonic()
        last = k + 1 == skeleton.n_blocks
        linears = {x.name: x for x in job.linears if x.block == k}
        rounded: dict[str, QuantizedLinear] = {}
        records: dict[str, dict[str, Any]] = {}
        passing = arguments[k] if arguments else None
        grids = {x.module: grid for x in linears.values() if (grid := job.schemes[x.name]) is not None}
        changes = transforms.apply(k, block, grids, hidden.get("hidden"), passing)
        method = job.recipe.method
        tuning = Tuning(method, k, block, linears, hidden["hidden"]) if isinstance(method, AutoRound) else None
        cache = None if caches is None else kv_cache.Largest(*caches[k])
        whole = tuning is not None or cache is not None or not last
        for stage in _stages(job, block, linears.values(), hidden, passing, whole, cache):
            round_stage(
                job.recipe.rounder, job.schemes, block, [linears[n] for n in stage.names], stage, rounded, records
            )
        if tuning is not None and arguments is not None:
            tuning.run(rounded, records, hidden, arguments[k], skeleton.device)
        _check_finite(hidden, k)
        layers = [records.get(name) or record(x, None) for name, x in linears.items()]
        seconds = time.monotonic() - started
        tensors = _block_tensors(job, k, block, rounded, changes.parameters, cache)
        line = {"block": k, "seconds": round(seconds, 3), "layers": layers, "transforms": changes.records}
        journal.commit(tensors, {} if last else hidden, line)
        errors = [r["relative_error"] for r in layers if r["relative_error"] is not None]
        settings.on_block(Progress(k + 1, skeleton.n_blocks, sum(errors) / len(errors) if errors else None, seconds))


def _hidden_states(
    job: Job, tokens: Tokens | None, journal: Journal
) -> tuple[dict[str, Tensor], list[Arguments] | None]:
    """The states [samples, seq_len, hidden] that enter the next block, and what each block gets beside them.

    `hidden` is what the rounded blocks made; `reference`, for error correction and tuning, what the original ones did.
    Without calibration there are none; what blocks get is there when linears with one input have to share a scale.
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
            hidden["reference"] = hidden["hidden"][: paired_samples(job.recipe)].clone()
    arguments = job.skeleton.block_arguments(tokens.ids.shape[1])
    job.skeleton.close_shell()
    return hidden, arguments


def _stages(
    job: Job,
    block: nn.Module,
    linears: Iterable[Linear],
    hidden: dict[str, Tensor],
    arguments: Arguments | None,
    whole: bool,
    cache: kv_cache.Largest | None,
) -> Iterable[Stage]:
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
        return [Stage(names, inputs=None if inputs is None else Inputs(*inputs)) for names in together]
    batch = max(1, BATCH_TOKENS // states.shape[1])
    return Stages(
        block, states, arguments, wanted,
        device=job.skeleton.device, batch=batch, keep=whole, reference=hidden.get("reference"), activations=inputs,
        begin=(lambda: None) if cache is None else cache.start,
    )  # fmt: skip


def _check_finite(hidden: dict[str, Tensor], k: int) -> None:
    for states in hidden.values():
        if not bool(torch.isfinite(states).all()):
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
    """Everything block `k` has on disk: packed linears, parameters a transform `changed`, cache scales, the rest."""
    format = FORMATS[job.recipe.formats[0]]
    tensors: dict[str, Tensor] = {}
    for name, linear in rounded.items():
        tensors |= {n: t.cpu() for n, t in format.pack(name, linear).items()}
    for name, disk in job.skeleton.block_names(k).items():
        if disk.removesuffix(".weight") not in rounded:
            before = job.reader.read(disk)
            tensors[disk] = block.get_parameter(name).to("cpu", before.dtype) if name in changed else before
    if cache is not None and job.recipe.kv_cache is not None:
        scales = zip(format.cache_suffixes, cache.scales(job.recipe.kv_cache), strict=True)
        tensors |= {f"{cache.name}.{suffix}": scale for suffix, scale in scales}
    return tensors


def _manifest(job: Job, files: dict[str, str], tokens: Tokens | None, journal: Journal) -> dict[str, Any]:
    """What `quantized/manifest.json` says: all that is the same each time the same run is made."""
    layers = [layer for done in journal.done for layer in done["layers"]]
    transforms = [record for done in journal.done for record in done["transforms"]]
    notes = [(record["feed"], record["note"]) for record in transforms]
    notes += [(layer["name"], layer["note"]) for layer in layers]
    source, wanted = job.source, job.recipe.calibration
    calibration = None
    if tokens is not None:
        sizes = {"samples": wanted.samples, "seq_len": wanted.seq_len, "tokens": tokens.ids.numel()}
        calibration = {"source": tokens.source, "sha256": tokens.sha256, "bos": tokens.bos, **sizes}
    packages = ("torch", "transformers", "safetensors", "compressed-tensors", "tokenizers")
    return {
        "schema": 1,
        "name": job.recipe.name,
        "model": {"id": source.id, "kind": source.kind, "revision": source.revision, "caveat": source.caveat}
        | {"files": files},
        "recipe": job.recipe.model_dump(mode="json"),
        "quantpress": version("quantpress"),
        "versions": {name: version(name) for name in packages} | {"python": machine.python_version()},
        "calibration": calibration,
        "seed": wanted.seed,
        "error_measure": "output" if tokens is not None else "weight",
        "transforms": transforms,
        "layers": layers,
        "fallbacks": [*job.plan.notes, *(f"{name}: {note}" for name, note in notes if note)],
    }


def _finish(job: Job, journal: Journal, settings: Settings, manifest: dict[str, Any]) -> None:
    """Put the parts together beside the final place, then rename: an artifact is never visible half written."""
    partial, final = settings.out / "quantized.partial", settings.out / "quantized"
    shutil.rmtree(partial, ignore_errors=True)
    if not final.exists():
        partial.mkdir(parents=True)
        shell = _shell_tensors(job)
        write_part(journal.folder / "shell.safetensors", shell)
        parts = [journal.part(k) for k in range(job.skeleton.n_blocks)]
        merge_parts([journal.folder / "shell.safetensors", *parts], partial)
        format = FORMATS[job.recipe.formats[0]]
        quantization = format.config(
            job.schemes, ignored_extra=job.skeleton.outside(), shuffled=job.shuffled,
            activations=job.recipe.activations, kv_cache=job.recipe.kv_cache,
        )  # fmt: skip
        config = dict(job.reader.config) | {"quantization_config": quantization}
        write_json(partial / "config.json", config)
        for name, content in format.extra_files(quantization).items():
            write_json(partial / name, content)
        copy_companions(job.source.path, partial)
        manifest["artifact"] = _sizes(job, partial)
        write_json(partial / "manifest.json", manifest)
        partial.rename(final)
    manifest["artifact"] = _sizes(job, final)
    manifest["converted"] = list(job.recipe.formats[1:])
    for name in job.recipe.formats[1:]:
        target = settings.out / "converted" / name
        if not target.exists():
            convert(final, target, name)


def _shell_tensors(job: Job) -> dict[str, Tensor]:
    """The tensors outside the blocks; a head that is tied and equal to the embedding is stored once."""
    inside = {disk for k in range(job.skeleton.n_blocks) for disk in job.skeleton.block_names(k).values()}
    names = [name for name in job.reader.names() if name not in inside]
    tensors = {name: job.reader.read(name) for name in names}
    if job.reader.config.get("tie_word_embeddings", getattr(job.skeleton.config, "tie_word_embeddings", False)):
        for head in job.skeleton.heads():
            twin = tensors.get(f"{head}.weight")
            if twin is not None and any(n != f"{head}.weight" and torch.equal(t, twin) for n, t in tensors.items()):
                del tensors[f"{head}.weight"]
    return tensors


def _sizes(job: Job, folder: Path) -> dict[str, Any]:
    """Bytes on disk and true bits per weight, scales and zeros counted."""
    artifact = Checkpoint(folder)
    quantized = [x for x in job.linears if job.schemes[x.name] is not None]
    weights = sum(x.out_features * x.in_features for x in quantized)
    packed = {f"{x.name}.{suffix}" for x in quantized for suffix in FORMATS[job.recipe.formats[0]].suffixes()}
    stored = sum(artifact.nbytes(n) for n in artifact.names() if n in packed)
    parameters = sum(_count(job.checkpoint.shape(name)) for name in job.checkpoint.names())
    return {
        "format": job.recipe.formats[0],
        "bytes": artifact.total_bytes,
        "original_bytes": job.checkpoint.total_bytes,
        "quantized_bits_per_weight": 8 * stored / weights,
        "bits_per_parameter": 8 * artifact.total_bytes / parameters,
        "parameters": parameters,
        "files": artifact.file_hashes(),
    }


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
