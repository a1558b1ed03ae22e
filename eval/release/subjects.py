"""What can be evaluated: a run, an artifact, a plain checkpoint, or a model behind a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import MANIFEST, read_manifest
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.models.hub import near
from quantpress.recipe import Recipe
from quantpress.recipe.loading import apply_override, parse

from ..measure.draft_acceptance import Draft, measure_draft
from ..measure.endpoint import Endpoint, ServedModel
from ..measure.evaluate import Prepared, evaluate, evaluate_served, positions_of
from ..measure.results import Results
from ..measure.sections import Subject
from .callbacks import Callbacks, Options
from .ledger import Ledger
from .session import open_source, saved

DEFAULT_POSITIONS = 2048  # of an original whose config does not say


def is_run(folder: Path) -> bool:
    """Whether the folder is that of a finished run."""
    return (folder / "manifest.json").is_file() and (folder / "quantized").is_dir()


def check_subject(subject: Path) -> None:
    """Raise BadInput for a path that holds neither a run nor a model."""
    if not subject.exists():
        raise BadInput(f"{subject}: no such folder{near(subject)}")
    if is_run(subject) or subject.is_file():
        return
    if not (subject / "config.json").is_file() and not any(subject.glob("*.gguf")):
        raise BadInput(f"{subject}: neither a run folder (manifest.json, quantized/) nor a model (config.json)")


def own_recipe(subject: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, or the defaults for anything else, with `key.path=value` overrides applied."""
    run = subject if subject is not None and is_run(subject) else None
    document: dict[str, Any] = {} if run is None else dict(read_manifest(run).recipe)
    for override in overrides:
        apply_override(document, override)
    return parse(document, "--set" if run is None else str(run / "manifest.json"))


def against(subject: Path | None, recipe: Recipe, original: str | None) -> Recipe:
    """The recipe with the model that the subject is compared with: `original`, or what a run was made from.

    Raises BadInput when neither is known.
    """
    if original is None:
        if subject is None or not is_run(subject):
            raise BadInput("eval: --original says what the model was made from: a folder, a hub id or smollm2-135m")
        original = str(read_manifest(subject).recipe["model"])
    return recipe.model_copy(update={"model": original})


def output_folder(subject: Path | Endpoint) -> Path:
    """Where results go by default: into the run itself, else to artifacts/<name>-eval."""
    if isinstance(subject, Endpoint):
        return Path("artifacts") / f"{subject.model.replace('/', '-')}-eval"
    return subject if is_run(subject) else Path("artifacts") / f"{subject.resolve().name}-eval"


def evaluate_subject(
    subject: Path | Endpoint, recipe: Recipe, out: Path, inputs: Prepared, options: Options, callbacks: Callbacks
) -> Results:
    """Measure the subject against recipe.model by the recipe's evaluation and gates; writes `out`/eval."""
    forget(out, "eval")
    source = open_source(recipe.model, options)
    if isinstance(subject, Endpoint):
        what = Subject(kind="served", name=subject.model, original=recipe.model, server=subject.url)
        model = ServedModel(subject, positions_of(source.path) or DEFAULT_POSITIONS)
        return evaluate_served(source.path, model, inputs, recipe.gates, saved(out, what.name, callbacks), what)
    if is_run(subject):
        manifest = read_manifest(subject)
        what = Subject(kind="run", name=manifest.name, format=manifest.artifact.format, original=recipe.model)
    else:
        what = Subject(kind="artifact", name=subject.resolve().name, original=recipe.model)
    return evaluate(
        source.path, _measured(subject, options), inputs, recipe.gates, saved(out, what.name, callbacks), what
    )


def measure_drafting(
    subject: Path, recipe: Recipe, out: Path, inputs: Prepared, options: Options, callbacks: Callbacks
) -> Draft:
    """How often recipe.model accepts what the subject drafts in speculative decoding; writes `out`/eval/draft.json."""
    done = 0

    def on_block(total: int) -> None:
        nonlocal done
        done += 1
        callbacks.on_step("drafting", done, total, "")

    source = open_source(recipe.model, options)
    found = measure_draft(source.path, _measured(subject, options), inputs.text, options.cache, on_block)
    (out / "eval").mkdir(parents=True, exist_ok=True)
    write_json(out / "eval" / "draft.json", found.model_dump(mode="json", by_alias=True))
    return found


def forget(out: Path, stage: str) -> None:
    """Have a run in `out` count the stage as not done: what takes its place need not be on its recipe's terms."""
    if (out / MANIFEST).is_file():
        Ledger(out).forget(stage)


def _measured(subject: Path, options: Options) -> Path:
    """As `model_folder`; of a plain checkpoint of pickles, where these are allowed, its safetensors copy."""
    if is_run(subject) or not any(subject.glob("*.bin")):
        return model_folder(subject)
    return open_source(str(subject), options).path


def model_folder(subject: Path) -> Path:
    """The weights of the subject: the quantized folder of a run, else the subject itself."""
    return subject / "quantized" if is_run(subject) else subject
