"""The stages behind the commands: quantize, measure, and what is printed of them."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import BadInput
from ..recipe import Recipe
from .options import cache_folder, open_source, out_console, progress_bar, say

if TYPE_CHECKING:  # torch is heavy, and most mistakes are found without it
    from quantpress.eval.measure.evaluate import Prepared, Watch
    from quantpress.eval.measure.results import Results

    from ..engine.pipeline import Job, Settings


def quantize_model(
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    ignore_limits: bool,
    allow_pickle: bool,
    trust: bool,
    share: Path | None = None,
) -> None:
    """Make the artifact; share: see Settings."""
    source = open_source(recipe, allow_pickle, trust)
    from quantpress.exports.contracts import check_job

    from ..engine.pipeline import prepare
    from ..engine.pipeline import quantize as quantize_job

    job = prepare(recipe, source)
    check_job(job)
    with quantizing(job, out, overwrite, ignore_limits, trust) as settings:
        manifest = quantize_job(job, replace(settings, share=share))
    for line in manifest.fallbacks:
        say(f"note: {line}")


@contextmanager
def quantizing(job: "Job", out: Path, overwrite: bool, ignore_limits: bool, trust: bool) -> "Iterator[Settings]":
    """What a run is told, while its progress is shown."""
    from ..engine.pipeline import Settings

    with progress_bar("quantizing", job.skeleton.n_blocks) as advance:
        yield Settings(
            out, cache_folder(), overwrite, ignore_limits, trust,
            lambda p: advance(p.block, "" if p.loss is None else f"error {p.loss:.2%}"),
            lambda line: say(f"note: {line}"),
        )  # fmt: skip


def evaluation_windows(recipe: Recipe, allow_pickle: bool, trust: bool) -> "Prepared":
    """What the recipe's evaluation reads beside the models."""
    if recipe.evaluation is None:
        raise BadInput("the recipe has `evaluation: null`; --set evaluation={} measures with the defaults")
    source = open_source(recipe, allow_pickle, trust)
    from quantpress.eval.measure.evaluate import prepare

    return prepare(source.path, recipe.evaluation, cache_folder(), trust)


def measure(out: Path, recipe: Recipe, text: "Prepared", allow_pickle: bool, trust: bool) -> "Results":
    """Evaluate the run folder `out`; its eval/ holds every section as soon as it is measured."""
    from quantpress.eval.measure.evaluate import evaluate
    from quantpress.eval.measure.results import Subject

    source = open_source(recipe, allow_pickle, trust)
    subject = Subject(kind="run", name=recipe.name, format=recipe.formats[0], original=recipe.model)
    with watched(out, recipe.name) as watch:
        return evaluate(source.path, out / "quantized", text, recipe.gates, watch, subject)


@contextmanager
def watched(out: Path, name: str) -> "Iterator[Watch]":
    """An evaluation shown as it goes on and written to `out`/eval section by section: results.json and junit.xml."""
    from quantpress.eval.measure.evaluate import Watch
    from quantpress.eval.report.junit import write_junit

    from ..core.files import write_json

    with ExitStack() as bars:
        shown: str | None = None
        advance: Callable[..., None] = print

        def step(section: str, done: int, total: int) -> None:
            nonlocal shown, advance
            if section != shown:
                bars.close()
                shown, advance = section, bars.enter_context(progress_bar(f"evaluating {section}:", total))
            if total:
                advance(done, "", total)

        def save(results: "Results") -> None:
            (out / "eval").mkdir(parents=True, exist_ok=True)
            write_json(out / "eval" / "results.json", results.document())
            write_junit(out / "eval" / "junit.xml", name, results)

        yield Watch(step, save)


def print_results(results: "Results") -> None:
    """What was measured, a line a thing."""
    for line in _figures(results):
        out_console.print(line, markup=False)
    for note in results.notes:
        say(f"note: not measured: {note}")
    signs = {"ACCEPT": "ok  ", "REGRESSION": "MISS", "INCONCLUSIVE": "?   "}
    for check in results.gates.checks:
        out_console.print(f"gate {signs[check.verdict]}   {check.name} {check.reason}", markup=False)
    if results.gates.verdict == "INCONCLUSIVE":
        how = "which gates.strict fails" if results.gates.strict else "which does not fail without gates.strict"
        say(f"note: a gate is inconclusive, {how}")


def _figures(results: "Results") -> "Iterator[str]":
    from ..engine.plan import size

    before, after, away, held = results.original, results.artifact, results.divergence, results.efficiency
    if before is not None and after is not None and results.perplexity_increase is not None:
        low, high = results.perplexity_increase_interval or (math.nan, math.nan)
        yield (
            f"perplexity  {before.perplexity:.3f} -> {after.perplexity:.3f} ({results.perplexity_increase:+.2%}, "
            f"95% {low:+.2%} to {high:+.2%})"
        )
    if away is not None:
        floor = "" if away.noise is None else f", noise floor {away.noise.kl_mean:.5f}"
        yield f"divergence  KL {away.kl_mean:.4f} +- {away.kl_stderr:.4f} nats, 99% {away.kl_p99:.3f}{floor}"
        yield f"same token  {away.top1_agreement:.1%} +- {away.top1_stderr:.1%}"
    for task in results.tasks:
        line = f"{task.task} {task.metric} {task.artifact.value:.4f} +- {task.artifact.stderr:.4f}"
        if task.original is not None and task.difference_interval is not None:
            low, high = task.difference_interval
            line += (
                f", original {task.original.value:.4f}, difference {task.difference:+.4f} ({low:+.4f} to {high:+.4f})"
            )
        if task.recovery is not None:
            line += f", recovery {task.recovery:.1%}"
        yield f"task        {line}"
    if held is not None:
        first = "" if held.original_bytes is None else f"{size(held.original_bytes)} -> "
        bits = "" if held.bits_per_weight is None else f", {held.bits_per_weight:.2f} bits a quantized weight"
        yield f"weights     {first}{size(held.bytes)}{bits}"
        if held.cache is not None:
            fits = ", ".join(f"{fit.gpu} {fit.concurrency}" for fit in held.fits)
            yield (
                f"cache       {size(held.cache.bytes_per_token)} a token ({held.cache.dtype}); sequences of "
                f"{held.cache.context} tokens that fit: {fits or 'no GPU asked'}"
            )
        for who, runtime in (("artifact", held.runtime), ("original", held.original_runtime)):
            for speed in () if runtime is None else runtime.speed:
                yield (
                    f"speed       {who}, batch {speed.batch}, context {speed.context}: prefill "
                    f"{speed.prefill_tokens_per_second:.0f}, decode {speed.decode_tokens_per_second:.1f} tokens/s"
                )
        if held.runtime is not None:
            yield f"            timed: {held.runtime.what}"
        if held.cost is not None:
            yield f"cost        {held.cost.formula}"
    for generation in results.generations:
        where = (
            "all tokens alike" if generation.first_difference is None else f"from token {generation.first_difference}"
        )
        yield f"continuing  {generation.prompt!r}: {where}"


def exit_on_gates(results: "Results | None") -> None:
    """Exit code 3 for a missed gate; INCONCLUSIVE is one only where the recipe says gates.strict."""
    if results is not None and results.gates.missed:
        raise typer.Exit(3)
