"""From a recipe and a checkpoint to the artifact folder, one decoder block at a time."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..artifact.artifact import open_original, verify
from ..artifact.manifest import ForwardCheck, MachineRecord, Manifest, Timing
from ..calibrate.bos import try_bos
from ..calibrate.chat_template import template_fault
from ..calibrate.texts import Documents, load_documents
from ..calibrate.tokens import (
    Tokens,
    calibration_tokens,
    check_chat_template,
    check_ids,
    check_vocabulary,
    generated_tokens,
    open_tokenizer,
    with_served_starts,
)
from ..core import machine
from ..core.errors import BadInput
from ..core.plugins import packages
from ..core.products import exact_float32_products, fast_16_bit_products
from ..models.by_name import ByName
from ..models.companions import check_companions
from ..models.rotated_checkpoint import RotatedCheckpoint
from ..models.vetting import Damaged, Vetting, vetting
from ..recipe import Calibration
from . import shared_run, sharing
from .blocks import run_blocks
from .description import describe
from .end_to_end import Trained, train_end_to_end
from .guard import check_forward
from .job import Job, prepare
from .journal import FollowedJournal, Journal, finished
from .settings import BlockDone, Settings

__all__ = ["BlockDone", "Job", "Settings", "prepare", "quantize"]

_VETTED_FIRST = 1_000_000_000  # bytes of weights that are always vetted before the work
_NOT_OF_THE_ARTIFACT = {"name", "description", "evaluation", "gates", "model", "targets", "smoke"}  # recipe keys


@exact_float32_products()
@fast_16_bit_products()
@machine.collecting_only_what_is_new()
def quantize(job: Job, settings: Settings) -> Manifest:
    """Write `out/quantized` (and `out/converted/<format>` for further formats); returns the run's manifest.

    Raises BadInput before any work for damaged weights, an unusable calibration text, or an output folder that holds
    another run. A run that was killed resumes after its last finished block and writes the same bytes; a finished run
    is left as it is.
    """
    started, ranks = time.monotonic(), settings.ranks
    _check_room(settings)
    if isinstance(job.skeleton, ByName):
        for line in job.skeleton.about():
            settings.on_note(line)
    tokenizer = checked_tokenizer(job, settings.trust_remote_code)
    for line in tokenizer_notes(tokenizer):
        settings.on_note(line)
    if ranks.size > 1:
        job, _ = shared_run.meet(lambda: job, ranks)
        shared_run.check_count(job, ranks)
    if ranks.tell(_is_finished(settings)):
        ranks.close()
        return _finished(job, tokenizer, settings)
    job.plan.check(settings.out, ignore=settings.ignore_limits)
    with vetting(job.checkpoint, job.backend.limits) as vetted:
        itself, meanwhile = job.recipe.calibrated and job.recipe.calibration.source == "self", _meanwhile(job, settings)
        tokens = None if itself else _tokens(job, tokenizer, settings)
        files = vetted.marks() if meanwhile else vetted.hashes()
        shared_run.compare_files(files, ranks)
        _check_rotated(job)
        forward = _forward(job)
        if itself:
            tokens = _tokens(job, tokenizer, settings)
        if settings.overwrite:
            _make_room(settings.out)
        journal = Journal(settings.work, _key(job, files, tokens), settings.on_note)
        job, trained = job.settled(tokens, settings.work), Trained({})
        ranks.tell(None if tokens is None else shared_run.Start(tokens, len(journal.done), journal.batch_tokens))
        if meanwhile:
            files = _run_meanwhile(job, journal, settings, vetted)
        elif job.backend.rounds_blocks:
            run_blocks(job, tokens, journal, settings)
            ranks.close()
    if job.backend.rounds_blocks:
        trained = train_end_to_end(job, tokens, journal)
    manifest = describe(job, files, tokens, journal.done, trained)
    if forward is not None:
        manifest = manifest.changed(forward=forward)
    manifest = job.backend.assemble(manifest, trained.parts, tokens, settings)
    return _signed(manifest, job, settings, started, [done.seconds for done in journal.done])


def _meanwhile(job: Job, settings: Settings) -> bool:
    """Whether weights are vetted while they are rounded: where that takes no hours, but reading them takes a part of it
    that counts, and nothing that is there already would be replaced.
    """
    large = job.checkpoint.total_bytes > _VETTED_FIRST and job.backend.rounds_blocks
    return large and not job.recipe.calibrated and not settings.overwrite and settings.ranks.size == 1


def _run_meanwhile(job: Job, journal: Journal, settings: Settings, vetted: Vetting) -> dict[str, str]:
    """`run_blocks` while the files are vetted; returns their hashes. Raises Damaged, and leaves nothing, for NaN
    and inf, whatever these have led to before.
    """

    def on_block(done: BlockDone) -> None:
        vetted.check()
        settings.on_block(done)

    try:
        try:
            run_blocks(job, None, journal, replace(settings, on_block=on_block))
        except BadInput:
            vetted.hashes()
            raise
        return vetted.hashes()
    except Damaged:
        shutil.rmtree(settings.work)
        with suppress(OSError):
            settings.out.rmdir()
        raise


@exact_float32_products()
@fast_16_bit_products()
def take_part(make: Callable[[], Job], settings: Settings) -> None:
    """What every process of a shared run does but the first, which calls `quantize`; nothing is written.

    make: the job. Raises LostRank where the first tells the user why the run ends.
    """
    ranks = settings.ranks
    found = shared_run.follow(make, ranks)
    if found is not None:
        job, start = found
        run_blocks(job, start.tokens, FollowedJournal(start.done, start.batch_tokens), settings)
    ranks.close()


def checked_tokenizer(job: Job, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises BadInput for one that is not this model's, or not fit for the calibration.

    None for a model that is not run, of a family that transformers does not have: its tokenizer may be as unknown.
    """
    check_companions(job.source.path)
    if isinstance(job.skeleton, ByName):
        return None
    tokenizer = open_tokenizer(job.source.path, trust_remote_code)
    check_vocabulary(tokenizer, job.skeleton.vocabulary)
    if (fault := template_fault(tokenizer)) is not None and fault.kind == "broken":
        raise BadInput(f"{job.source.path}: {fault.line}; mend or remove it")
    if not job.recipe.calibrated:
        return tokenizer
    wanted = job.recipe.calibration
    limit = getattr(job.skeleton.config, "max_position_embeddings", None)
    if limit is not None and wanted.seq_len > limit:
        raise BadInput(f"calibration.seq_len {wanted.seq_len} is more than the model's {limit} positions")
    if wanted.chat_template:
        check_chat_template(tokenizer)
    if wanted.source == "self" and job.checkpoint.wrapper:
        raise BadInput(
            f"calibration.source self: transformers does not load tensors named {job.checkpoint.wrapper}…; "
            "give a text, or rename the tensors"
        )
    return tokenizer


def tokenizer_notes(tokenizer: Any) -> tuple[str, ...]:
    """What is to be said of a tokenizer that `checked_tokenizer` found fit."""
    fault = template_fault(tokenizer)
    return () if fault is None else (fault.line,)


def _forward(job: Job) -> ForwardCheck | None:
    """The comparison with transformers' model; None where the blocks are not run, or transformers cannot."""
    if (
        isinstance(job.skeleton, ByName)
        or not job.backend.rounds_blocks
        or job.checkpoint.quantization is not None
        or job.checkpoint.wrapper
    ):
        return None
    return check_forward(job.source.path, job.skeleton, job.checkpoint, job.skeleton.parameters)


def _signed(
    manifest: Manifest, job: Job, settings: Settings, started: float, block_seconds: Sequence[float]
) -> Manifest:
    """Add the machine and the timing to the manifest and write it, which marks the run as finished."""
    timing = Timing(
        seconds=time.monotonic() - started,
        cpu_seconds=machine.cpu_seconds(),
        peak_rss_bytes=machine.peak_rss_bytes(),
        per_block_seconds=tuple(block_seconds),
    )
    there = MachineRecord.model_validate(machine.describe(job.skeleton.device))
    manifest = manifest.changed(machine=there, timing=timing)
    manifest.write(settings.out)
    shutil.rmtree(settings.work)
    return manifest


def _check_room(settings: Settings) -> None:
    """Raise BadInput for an output folder that is neither new nor a run's; whose run it is, is checked later."""
    out = settings.out
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; --out names a folder")
    if out.exists() and any(out.iterdir()) and not any((out / n).exists() for n in (".work", "quantized")):
        raise BadInput(f"{out} is not empty and holds no quantpress run; give another --out")
    unfinished = (out / "quantized").exists() and not _is_finished(settings)
    if unfinished and not settings.overwrite and not (settings.work / "key.json").exists():
        raise BadInput(f"{out} holds an artifact without a manifest.json; give another --out, or --overwrite")


def _is_finished(settings: Settings) -> bool:
    """Whether `out` holds a finished run: the manifest is written last, so a leftover .work does not matter."""
    out = settings.out
    return not settings.overwrite and (out / "quantized").is_dir() and (out / "manifest.json").is_file()


def _finished(job: Job, tokenizer: Any, settings: Settings) -> Manifest:
    """The manifest of the finished run in `out`. Raises BadInput for another run, or if its files have changed."""
    itself = job.recipe.calibrated and job.recipe.calibration.source == "self"
    key = _key(job, job.checkpoint.file_hashes(), None if itself else _tokens(job, tokenizer, settings))
    manifest = finished(settings.out, key, compare_calibration=not itself)
    verify(settings.out)
    now = job.recipe.model_dump(mode="json")
    if manifest.recipe != now:  # only in keys that do not affect the artifact: gates, targets, evaluation, smoke test
        manifest = manifest.changed(name=job.recipe.name, recipe=now)
        manifest.write(settings.out)
    shutil.rmtree(settings.work, ignore_errors=True)
    settings.on_note(f"{settings.out / 'quantized'} is this run, finished before; it is used as it is")
    return manifest


def _make_room(out: Path) -> None:
    """The artifact goes last: as long as anything is left of a run, it is known for one, and may be overwritten."""
    for name in ("manifest.json", "export", "converted", "eval", "report", "quantized.partial", ".work", "quantized"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_rotated(job: Job) -> None:
    """Raise BadInput for a float16 weight that rotation makes overflow; wider types are checked as they are rotated."""
    if isinstance(job.reader, RotatedCheckpoint):
        for name in job.reader.names():
            if job.reader.dtype(name) == torch.float16:
                job.reader.read(name)


def _tokens(job: Job, tokenizer: Any, settings: Settings) -> Tokens | None:
    if not job.recipe.calibrated:
        return None
    wanted = job.recipe.calibration

    def make() -> Tokens:
        if wanted.source == "self":
            return generated_tokens(job.source.path, tokenizer, wanted, _writes_on(job))
        text = load_documents(wanted, cache=settings.cache, role="calibration")
        chosen = _with_bos(job, tokenizer, text, settings)
        tokens = calibration_tokens(tokenizer, text.documents, text.source, chosen)
        static = job.recipe.kv_cache is not None or bool(job.recipe.activations and job.recipe.activations.calibrated)
        return with_served_starts(tokenizer, tokens, text.documents) if static else tokens

    tokens = sharing.tokens(settings.share, job, make)
    check_ids(tokens.ids, job.skeleton.vocabulary, tokens.source)
    return tokens


def _with_bos(job: Job, tokenizer: Any, text: Documents, settings: Settings) -> Calibration:
    """The calibration with `bos: auto` decided."""
    wanted, folder = job.recipe.calibration, job.source.path
    if wanted.chat_template:
        return wanted
    start, device = "\n\n".join(text.documents[:20]), job.skeleton.device
    try:
        found = try_bos(folder, lambda: open_original(folder, device)[1], tokenizer, start, wanted.bos, settings.cache)
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the class of the first model that is run raises
        raise BadInput(
            f"the {job.skeleton.config.model_type} model does not run with this config.json: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if found is None or found.bos == wanted.bos:
        return wanted
    settings.on_note(f"calibration with a BOS token (bos: auto): {found}")
    return wanted.model_copy(update={"bos": found.bos})


def _writes_on(job: Job) -> torch.device:
    """Where the model writes its own text: on the GPU if all of it fits there with room for its cache.

    By the GPU's size, not by what is free: a run that resumes has to draw the same text.
    """
    memory = machine.device_memory(job.skeleton.device)
    weights = sum(job.checkpoint.nbytes(name) for name in job.checkpoint.names())
    return job.skeleton.device if memory is not None and 1.3 * weights < memory[1] else torch.device("cpu")


def _key(job: Job, files: dict[str, str], tokens: Tokens | None) -> dict[str, Any]:
    """Everything the artifact depends on: a run resumes only where all of it is unchanged."""
    recipe = job.recipe.model_dump(mode="json", exclude=_NOT_OF_THE_ARTIFACT)
    return {
        "recipe": recipe,
        "model": files,
        "calibration": None if tokens is None else tokens.sha256,
        "imatrix": job.backend.imatrix_sha256,
        "quantpress": version("quantpress"),
        "plug-ins": packages(),
        **machine.numerics(job.skeleton.device),
    }
