"""What every operation of the public API starts with, and the work that several of them share.

Nothing here takes the lock of a run folder: the functions of the API do, once each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.artifact.config_only import headers_of_config
from quantpress.artifact.manifest import Manifest, own_manifest
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.engine.job import prepare_beside
from quantpress.engine.pipeline import Job, Settings, prepare, quantize
from quantpress.engine.pipeline import take_part as engine_take_part
from quantpress.engine.sources import Source, headers, resolve, resolve_config
from quantpress.exports.contracts import check_job
from quantpress.exports.serving.reference import FILE as REFERENCE
from quantpress.exports.verifying.statement import check_original
from quantpress.recipe import Recipe, Target
from quantpress.recipe.loading import apply_override, parse_target

from ..measure.evaluate import Prepared, Watch, evaluate
from ..measure.evaluate import prepare as prepare_evaluation
from ..measure.results import Results
from ..measure.sections import Subject
from ..report.junit import write_junit
from .callbacks import Callbacks, Options

TargetLike = Target | str | Mapping[str, Any]


def open_source(model: str, options: Options) -> Source:
    """The checkpoint that `model` names, after the process has been set up: denormals flushed, memory returned.

    Raises BadInput for a model that is missing, or needs an option that is not set.
    """
    machine.flush_denormals()
    machine.set_up_memory()
    return resolve(
        model, cache=options.cache, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code
    )


def make_job(recipe: Recipe, options: Options) -> tuple[Job, dict[str, str]]:
    """The recipe checked against its model and its targets, and the format that each target will load.

    Raises BadInput for what cannot run, and for a target that could load none of the recipe's formats.
    """
    job = prepare(recipe, open_source(recipe.model, options), ranks=options.ranks)
    check_original(job.source.path, job.skeleton.vocabulary)
    return job, check_job(job)


def plan_job(recipe: Recipe, options: Options, *, config_only: bool = False) -> tuple[Job, dict[str, str]]:
    """As `make_job`, for a plan: of a model on the hub only the headers of its shards are fetched.

    config_only: the model may be a config.json, or a folder with no more than that.
    """
    machine.set_up_memory()
    if config_only:
        source = resolve_config(recipe.model)
        job = prepare(recipe, source, headers=headers_of_config(source.path), ranks=options.ranks)
    elif found := headers(recipe.model, trust_remote_code=options.trust_remote_code):
        job = prepare(recipe, found[0], headers=found[1], ranks=options.ranks)
    else:
        return make_job(recipe, options)
    return job, check_job(job)


def plan_beside(job: Job, recipe: Recipe) -> Job:
    """As `plan_job`, of another recipe for the model of a job that has been planned."""
    job = prepare_beside(job, recipe)
    check_job(job)
    return job


def settings(out: Path, options: Options, callbacks: Callbacks) -> Settings:
    """The engine's settings for a run in `out`."""
    return Settings(
        out,
        options.cache,
        options.overwrite,
        options.ignore_limits,
        options.trust_remote_code,
        lambda p: callbacks.on_step("quantizing", p.block, p.blocks, "" if p.loss is None else f"error {p.loss:.2%}"),
        callbacks.on_note,
        options.share,
        options.ranks,
        lambda done, blocks: callbacks.on_step("quantizing", done, blocks, ""),
    )


def make_artifact(recipe: Recipe, out: Path, options: Options, callbacks: Callbacks) -> Manifest:
    """Write `out`/quantized and `out`/manifest.json; returns the manifest. Goes on where a killed run stopped."""
    job, _ = make_job(recipe, options)
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            callbacks.on_note(line)
        told.add(line)

    manifest = quantize(job, settings(out, options, replace(callbacks, on_note=tell)))
    for line in manifest.fallbacks:
        tell(line)
    return manifest


def take_part(recipe: Recipe, out: Path, options: Options) -> None:
    """What the other processes of a shared run do; see `engine.pipeline.take_part`."""
    engine_take_part(lambda: make_job(recipe, options)[0], settings(out, options, Callbacks()))


def evaluation_inputs(recipe: Recipe, options: Options) -> Prepared:
    """The text, tokenizer and tasks of the recipe's evaluation, read and checked before any model runs.

    Raises BadInput for a recipe without an evaluation, and for text or tasks that cannot be had.
    """
    if recipe.evaluation is None:
        raise BadInput("the recipe has `evaluation: null`; --set evaluation={} measures with the defaults")
    source = open_source(recipe.model, options)
    remote_code = options.trust_remote_code
    return prepare_evaluation(source.path, recipe.evaluation, options.cache, remote_code, recipe.calibration)


def measure_run(
    recipe: Recipe, out: Path, inputs: Prepared, options: Options, callbacks: Callbacks, *, served: bool = True
) -> Results:
    """Evaluate `out`/quantized; every section is in `out`/eval as soon as it is measured.

    served: make what servers of the artifact are held against, too.
    """
    source = open_source(recipe.model, options)
    subject = Subject(kind="run", name=recipe.name, format=recipe.formats[0], original=recipe.model)
    watch = saved(out, recipe.name, callbacks)
    watch = watch if served else replace(watch, keep=None)
    return evaluate(source.path, out / "quantized", inputs, recipe.gates, watch, subject)


def saved(out: Path, name: str, callbacks: Callbacks) -> Watch:
    """Follows an evaluation and writes `out`/eval/results.json and junit.xml section by section, and reference.json."""

    def save(results: Results) -> None:
        (out / "eval").mkdir(parents=True, exist_ok=True)
        write_json(out / "eval" / "results.json", results.document())
        write_junit(out / "eval" / "junit.xml", name, results)

    return Watch(
        lambda section, done, total: callbacks.on_step(f"evaluating {section}", done, total, ""),
        save,
        lambda reference: reference.write(out / "eval" / REFERENCE),
    )


def choose_targets(
    folder: Path, targets: Sequence[TargetLike] = (), overrides: Sequence[str] = ()
) -> tuple[Target, ...]:
    """The targets as objects, or those of the recipe of the run in `folder`; overrides: `target.key=value` each."""
    documents: dict[str, Any] = {}
    for target in targets:
        document = {"name": target} if isinstance(target, str) else target
        document = dict(document) if isinstance(document, Mapping) else document.model_dump(mode="json")
        documents[str(document.get("name"))] = document
    if not documents:
        manifest = own_manifest(folder)
        own = () if manifest is None else manifest.recipe.get("targets", ())
        documents = {target["name"]: dict(target) for target in own}
        if not documents:
            raise BadInput(f"{folder}: the recipe names no targets; give --target, such as --target vllm")
    for override in overrides:
        name = next((n for n in documents if override.startswith(f"{n}.")), None)
        if name is None:
            raise BadInput(f"--set {override!r}: write target.key=value, with one of {', '.join(documents)}")
        apply_override(documents[name], override.removeprefix(f"{name}."))
    return tuple(parse_target(document, "--target") for document in documents.values())
