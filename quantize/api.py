"""The public API: what the command line does, as functions. `quantpress` re-exports all of it.

Each function that writes locks the folder it writes to, checks recipe, model and targets before the work, and sets the
process up (denormals flushed, freed memory returned), as the command line does. Progress and notes go to `Callbacks`;
nothing is printed. A mistake of the caller is a `BadInput`, one line that says what is wrong and what to do.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantpress.eval.measure.draft_acceptance import Draft
from quantpress.eval.measure.endpoint import Endpoint
from quantpress.eval.measure.foresight import foreseen
from quantpress.eval.measure.results import Results
from quantpress.eval.release import subjects
from quantpress.eval.release.callbacks import Callbacks, Options
from quantpress.eval.release.fit import fit
from quantpress.eval.release.recommend import recommend
from quantpress.eval.release.reproduce import Reproduction, make_again, open_recorded
from quantpress.eval.release.run import Release, make_release
from quantpress.eval.release.session import (
    TargetLike,
    choose_targets,
    evaluation_inputs,
    make_artifact,
    make_job,
    open_source,
    plan_job,
    settings,
)
from quantpress.eval.release.smoke_run import find_served, run_smoke
from quantpress.eval.release.sweep import Runner, RunOutcome, Sweep, in_turn, make_sweep
from quantpress.eval.report.card import write_card
from quantpress.eval.report.page import write_comparison, write_report
from quantpress.exports.contracts import advice
from quantpress.exports.load_check import LoadAnswer, Way, will_load
from quantpress.exports.package import LOOPBACK, Exported, find_artifact
from quantpress.exports.package import check as check_export
from quantpress.exports.package import export as export_target
from quantpress.exports.serving.load import Wanted
from quantpress.exports.serving.record import Serving
from quantpress.exports.serving.reference import read_reference
from quantpress.exports.serving.served_check import Checked, check_served
from quantpress.exports.signing import Signer as Signer  # for the command line, which knows no exports
from quantpress.exports.signing import read_public_key
from quantpress.exports.signing import read_secret_key as read_secret_key
from quantpress.exports.verify import artifact_in, check_unchanged, original_at_hand
from quantpress.exports.verify import verify as verify_files

from .answers import Forecast, Verification
from .artifact.artifact import open_artifact
from .artifact.convert import convert as convert_artifact
from .artifact.gguf_floats import write_floats, write_rounded
from .core import machine
from .core.errors import BadInput
from .core.files import alone_in
from .engine import shared_run
from .engine.pipeline import checked_tokenizer, tokenizer_notes
from .recipe import Recipe, Smoke
from .recipe.gguf_file import FLOATS, FileType
from .recipe.loading import load, parse

__all__ = [
    "Callbacks", "Checked", "Endpoint", "Forecast", "Options", "Verification", "card", "check", "compare", "convert",
    "draft", "evaluate", "export", "fit", "load_model", "plan", "quantize", "recommend", "report", "reproduce", "run",
    "run_folder", "smoke", "sweep", "verify",
]  # fmt: skip

RecipeLike = Recipe | str | Path | Mapping[str, Any]


def plan(
    recipe: RecipeLike, model: str | None = None, options: Options = Options(), *, config_only: bool = False
) -> Forecast:
    """Schemes, bytes, peak memory, disk and time of a run, and what servers would say, from the model's config alone.

    recipe: an object, the name of a shipped recipe, a file, or a mapping of keys. model: in place of the recipe's.
    config_only: the model is a config.json, a folder with one, or a hub id; no weights and no tokenizer are needed.
    Raises BadInput for what cannot run.

        plan("w4a16-gptq", "smollm2-135m").plan.memory_bytes
    """
    job, targets = plan_job(_recipe(recipe, model), options, config_only=config_only)
    shared_run.check(job, options.ranks)
    shared_run.check_count(job, options.ranks)
    notes = () if config_only else tokenizer_notes(checked_tokenizer(job, options.trust_remote_code))
    kinds: dict[tuple[str, str], int] = {}
    for linear in job.linears:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", linear.module), job.plan.layers[linear.name])
        kinds[key] = kinds.get(key, 0) + 1
    linears = tuple((module, count, scheme) for (module, scheme), count in kinds.items())
    said = (*notes, *advice(job), *foreseen(job.recipe.gates, job.recipe.evaluation))
    return Forecast(job.plan, linears, targets, said)


def quantize(
    recipe: RecipeLike,
    model: str | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Path:
    """Make the artifact only; returns its folder, `out`/quantized. The manifest is `out`/manifest.json.

    recipe, model: as for `plan`. out: the run folder, by default `run_folder(recipe)`. A run that was killed goes on
    after its last finished block. Raises BadInput for what cannot run, and for a folder that holds something else.

        quantize("w4a16-rtn", "smollm2-135m", "out")
    """
    chosen = _recipe(recipe, model)
    where = _path(out) or run_folder(chosen)
    with alone_in(where):
        make_artifact(chosen, where, options, callbacks)
    return where / "quantized"


def run(
    recipe: RecipeLike,
    model: str | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Release:
    """The whole recipe: quantize, export, verify, evaluate, smoke test, report, model card.

    Arguments as for `quantize`. A second call does again only what has changed. A missed gate or a failed smoke test is
    no exception: see `Release.results.gates` and `Release.serving`.

        release = run({"method": "rtn", "gates": {"max_kl": 0.1}}, "smollm2-135m")
        release.results.gates.verdict
    """
    chosen = _recipe(recipe, model)
    where = _path(out) or run_folder(chosen)
    with alone_in(where):
        return make_release(chosen, where, options, callbacks)


def evaluate(
    subject: Path | str | Endpoint,
    original: str | None = None,
    recipe: RecipeLike | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Results:
    """Measure a model against its original, and judge it by the recipe's gates; writes eval/results.json and junit.xml.

    subject: a run folder, an artifact in any format, a plain checkpoint, or an `Endpoint`. original: what it was made
    from; a run knows its own. recipe: whose evaluation and gates count, by default a run's own or the defaults. out: by
    default the run, else artifacts/<name>-eval. Raises BadInput for what cannot be measured.

        evaluate("artifacts/smollm2-135m/w4a16-rtn").perplexity_increase
    """
    what, chosen, where = _subject(subject, original, recipe, out)
    if isinstance(what, Path) and not options.although_changed:
        check_unchanged(what)
    inputs = evaluation_inputs(chosen, options)
    with alone_in(where):
        return subjects.evaluate_subject(what, chosen, where, inputs, options, callbacks)


def draft(
    subject: Path | str,
    original: str | None = None,
    recipe: RecipeLike | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Draft:
    """How often the original accepts the tokens that the subject drafts (speculative decoding); writes eval/draft.json.

    Arguments as for `evaluate`. Raises BadInput when the two do not share their vocabulary.

        draft("artifacts/smollm2-135m/w4a16-rtn").greedy.rate
    """
    what, chosen, where = _subject(Path(subject), original, recipe, out)
    assert isinstance(what, Path)
    inputs = evaluation_inputs(chosen, options)
    with alone_in(where):
        return subjects.measure_drafting(what, chosen, where, inputs, options, callbacks)


def export(
    folder: Path | str,
    targets: Sequence[TargetLike] = (),
    out: Path | str | None = None,
    *,
    host: str = LOOPBACK,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> dict[str, Exported]:
    """Write a folder for each target: the model in a format it loads, launch files, checksums.

    folder: a run folder or an artifact folder. targets: by name, mapping or object; by default those of the run's
    recipe. out: the folder of a single target, by default `folder`/export/<target>. host: the address to listen on.
    signer: signs the checksums (`quantpress.exports.signing.read_secret_key`). Raises BadInput, before anything is
    written, for an artifact that a target cannot load.

        export("artifacts/smollm2-135m/w4a16-rtn", ["vllm", {"name": "tgi", "tensor_parallel": 2}])
    """
    chosen = choose_targets(Path(folder), targets)
    if out is not None and len(chosen) > 1:
        raise BadInput(f"--out is the folder of one target, and these are {len(chosen)}; leave it out")
    find_artifact(Path(folder))  # before the lock makes the folder
    with alone_in(Path(folder)) if out is None else nullcontext():
        for target in chosen:  # all of them before the first is written
            check_export(Path(folder), target)
        return {
            target.name: export_target(Path(folder), target, _path(out), host=host, overwrite=overwrite, signer=signer)
            for target in chosen
        }


def verify(
    folder: Path | str,
    targets: Sequence[TargetLike] = (),
    *,
    python: str | None = None,
    way: Way | None = None,
    allow: Collection[str] = (),
    original: str | None = None,
    forward: bool = True,
    key: str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Verification:
    """Check the checksums, then every tensor against config and model, then against the original; then whether each of
    `targets` would load it.

    folder: a run folder, an artifact folder or an exported one. python: the interpreter that has the server. way: how
    targets are asked, by default the strongest way that works here. allow: files, by their path in the folder, that may
    lie there without being listed. original: the model it was made from, by default the one that the manifest names
    where it is on this machine. forward: without an original, whether a short forward pass has to predict something.
    key: the public key, or the file that holds it, that has to have signed the checksums (minisign's). Raises BadInput
    for a folder that is none of these, and for a key that is none.

        verify("artifacts/smollm2-135m/w4a16-rtn", ["vllm"]).sound
    """
    where = Path(folder)
    signed_by = None if key is None else read_public_key(key)
    chosen = choose_targets(where, targets) if targets else ()
    named = None if original is None else open_source(original, options).path
    made_from = named or original_at_hand(where, options.cache)
    found = verify_files(where, allow=allow, original=made_from, forward=forward, key=signed_by)
    loads: dict[str, LoadAnswer] = {}
    if not found.problems:  # what is damaged is not asked about
        for target in chosen:
            model = artifact_in(where)
            loads[target.name] = will_load(model, target, python=python, way=way, tell=callbacks.on_line)
    return Verification(found.files, found.problems, found.reached, found.not_reached, loads)


def smoke(
    path: Path | str,
    changes: Mapping[str, Any] | Smoke | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
    load: Wanted | None = None,
    original: Path | None = None,
) -> Serving:
    """Start a real server on an artifact, check it, compare it with our own forward pass, time it, end it.

    path: a run folder, an artifact folder, a .gguf file or RUN/export/<target>. changes: keys of the recipe's `smoke`
    section in place of the run's own. load: requests at a fixed rate, measured too; original: a model put under the
    same load on a server of its own. out: where eval/serving.json and the log go, by default the run. A server that
    fails is a failed check; BadInput is raised for one that is not installed.

        smoke("artifacts/smollm2-135m/w4a16-rtn", {"server": "vllm"}).verdict
    """
    given = changes.model_dump(exclude_unset=True) if isinstance(changes, Smoke) else dict(changes or {})
    subject = replace(find_served(Path(path), given), load=load, original=original)
    if not options.although_changed:
        check_unchanged(Path(path))
    where = _path(out) or subject.run or Path("artifacts") / subject.artifact.stem / "smoke"
    with alone_in(where):
        subjects.forget(where, "smoke")
        return run_smoke(subject, where, options, callbacks)


def check(
    url: str,
    reference: Path | str,
    model: str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
    *,
    rounds_inputs: bool | None = None,
) -> Checked:
    """Hold a model that is served at `url` to what the original and the artifact answered when it was evaluated.

    No weights are needed. reference: reference.json, or the folder of the export or run that holds it. model: its name
    there, by default the first that is listed. rounds_inputs: its kernel rounds inputs to int8, as vLLM's for 4 bits
    does on a CPU with AMX; None: as this machine does, for a server that runs on it. Raises BadInput for an address, or
    a reference, that is none.

        check("http://127.0.0.1:8000", "artifacts/smollm2-135m/w4a16-rtn/export/vllm").passed
    """
    found = read_reference(Path(reference))
    return check_served(url, found, model, options.api_key, callbacks.on_check, rounds_inputs=rounds_inputs)


def load_model(folder: Path | str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of an artifact in any format we write, or of a plain checkpoint, ready for generate().

    Weights are dequantized, exactly as an evaluation reads them; inputs and key-value cache are rounded where the
    artifact says so. folder: a run folder, an artifact folder or a .gguf file. device: by default the GPU if there is
    one. dtype: by default the checkpoint's own. The whole model has to fit in memory.

        model = load_model("artifacts/smollm2-135m/w4a16-rtn")
    """
    machine.flush_denormals()
    machine.set_up_memory()
    subjects.check_subject(Path(folder))
    _, skeleton = open_artifact(subjects.model_folder(Path(folder)), device or machine.device(), dtype)
    return skeleton.whole().eval()


def convert(artifact: Path | str, out: Path | str, to: str) -> Path:
    """The same codes in another format, without loss; returns the folder `out`.

    artifact: a run folder or an artifact folder. to: compressed-tensors, gptq, awq or modelopt. Raises BadInput where
    the format cannot hold the artifact exactly.
    """
    convert_artifact(subjects.model_folder(Path(artifact)), Path(out), to)
    return Path(out)


def write_gguf(
    model: str,
    out: Path,
    kind: FileType = "F16",
    split: int | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
    imatrix: Path | None = None,
) -> list[Path]:
    """Write a checkpoint, or an artifact dequantized, as a GGUF file of floats; returns the files written.

    model: as for --model. kind: F32, F16 or BF16. A 16- or 32-bit .gguf file, of whatever architecture, may also be
    rounded to nearest in a quantized type. split: most bytes of tensors in one file. imatrix: an importance matrix for
    that. Raises BadInput for what cannot be written.
    """
    if kind not in FLOATS:
        return write_rounded(
            model, out, kind, imatrix, split, lambda done, of: callbacks.on_step("quantizing", done, of, "")
        )
    assert kind in ("F32", "F16", "BF16")
    return write_floats(open_source(model, options).path, out, kind, split, callbacks.on_note)


def report(folder: Path | str) -> Path:
    """Write the report of an evaluated run again; returns its index.html."""
    with alone_in(Path(folder)):
        return write_report(Path(folder))


def compare(folders: Sequence[Path | str], out: Path | str) -> Path:
    """One page about several runs of one model, evaluated on the same text; returns its index.html."""
    return write_comparison([Path(folder) for folder in folders], Path(out))


def card(
    folder: Path | str, base_model: str | None = None, license: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write the model card, quantized/README.md, of an evaluated run; returns its path.

    base_model: the original's hub id, where it was quantized from a folder. license: where the original names none.
    Raises BadInput for a card that was edited by hand, unless `overwrite`.
    """
    with alone_in(Path(folder)):
        written = write_card(Path(folder), base_model, license, overwrite=overwrite)
    if written.edited is not None:
        raise BadInput(f"{written.path} was edited by hand and is left as it is; --overwrite-card replaces it")
    return written.path


def sweep(
    recipes: Sequence[RecipeLike],
    model: str | None = None,
    out: Path | str = Path("artifacts/sweep"),
    options: Options = Options(),
    runner: Runner | None = None,
    on_outcome: Callable[[RunOutcome], None] = lambda outcome: None,
) -> Sweep:
    """Run several recipes on one model, each in a process of its own, and compare them on one page.

    A run that fails does not stop the others; the same call again runs only what is not finished. runner: by default
    one after the other here; `over_ray` spreads them over a cluster. Raises BadInput for recipes of several models.

        sweep(["w4a16-rtn", "w4a16-gptq"], "smollm2-135m").report
    """
    chosen = [_recipe(recipe, model) for recipe in recipes]
    with alone_in(Path(out)):
        return make_sweep(chosen, Path(out), options, runner or in_turn(), on_outcome)


def reproduce(
    manifest: Path | str,
    model: str | None = None,
    out: Path | str | None = None,
    options: Options = Options(),
    callbacks: Callbacks = Callbacks(),
) -> Reproduction:
    """Make an artifact again from its manifest and compare the hashes.

    manifest: a manifest.json, or the run folder that holds one. model: where the original lies now. out: by default
    artifacts/<model>/<recipe>-reproduced. Raises BadInput when the model is another one.

        reproduce("artifacts/smollm2-135m/w4a16-rtn").first is None
    """
    recorded = open_recorded(Path(manifest))
    recipe = recorded.recipe.model_copy(update={"model": model or recorded.model})
    where = _path(out) or run_folder(recipe).with_name(f"{recipe.name}-reproduced")
    job, _ = make_job(recipe, options)
    with alone_in(where):
        return make_again(recorded, job, settings(where, options, callbacks))


def run_folder(recipe: Recipe) -> Path:
    """The default run folder, artifacts/<model>/<recipe>."""
    name = Path(recipe.model).name.removesuffix(".gguf").replace("@", "-") or "model"
    return Path("artifacts") / name / recipe.name


def _recipe(recipe: RecipeLike, model: str | None = None) -> Recipe:
    if isinstance(recipe, Mapping):
        recipe = parse({"name": "recipe", **recipe})
    elif not isinstance(recipe, Recipe):
        recipe = load(str(recipe))
    return recipe if model is None else recipe.model_copy(update={"model": model})


def _subject(
    subject: Path | str | Endpoint, original: str | None, recipe: RecipeLike | None, out: Path | str | None
) -> tuple[Path | Endpoint, Recipe, Path]:
    """What is measured, the recipe whose model is the original, and where the results go."""
    what = subject if isinstance(subject, Endpoint) else Path(subject)
    folder = None if isinstance(what, Endpoint) else what
    if folder is not None:
        subjects.check_subject(folder)
    chosen = subjects.own_recipe(folder) if recipe is None else _recipe(recipe)
    return what, subjects.against(folder, chosen, original), _path(out) or subjects.output_folder(what)


def _path(out: Path | str | None) -> Path | None:
    return None if out is None else Path(out)
