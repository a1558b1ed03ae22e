"""The model card: README.md of an artifact in the hub's format, from measurements only."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from quantpress.artifact.artifact import auto_class_of
from quantpress.core.errors import BadInput
from quantpress.core.files import expanded, whole_file
from quantpress.exports import contracts
from quantpress.exports.servers import SERVERS
from quantpress.exports.servers.loader import notes as loader_notes
from quantpress.exports.servers.transformers_serve import loading

from .measured_run import MeasuredRun, open_run
from .page import chart, render
from .page_text import without_defaults
from .verdict import verdict

CHART = "quality.png"
_SEAL = "<!-- written by quantpress, sha256 {} -->"
# What the embedded model is called on the hub, and its licence there.
_EMBEDDED = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
_KEPT = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class ServeCommand:
    """How one program serves the artifact. version: whose rules were looked at. refused: why it cannot, one line per
    reason; notes: what to know.
    """

    title: str
    version: str
    command: str
    language: str
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """README.md of an artifact. edited: how it differs from what would be written, where it was edited by hand and so
    was left as it is; None where it was written.
    """

    path: Path
    edited: str | None


def write_card(
    folder: Path,
    base_model: str | None = None,
    license: str | None = None,
    repo: str = "org/name",
    *,
    overwrite: bool = False,
) -> Card:
    """Write FOLDER/quantized/README.md and its chart for a run folder that has been evaluated.

    base_model: the original's hub id, where it was quantized from a folder. license: where the original names none.
    repo: the id it will have on the hub, for the commands that serve it. overwrite: a card that was edited, too.
    Raises BadInput for a base_model that is no hub id.
    """
    run = open_run(folder)
    card = folder / "quantized" / "README.md"
    data = metadata(run, base_model, license)
    said, shown = verdict(run), shown_recipe(run)
    text = render("card.md", run=run, verdict=said, data=data, servers=servers(run, repo), chart=CHART, recipe=shown)
    content = _sealed(f"---\n{data.to_yaml()}\n---\n\n{text}")
    ModelCard(content)  # parses the block as the hub does
    with whole_file(card.with_name(CHART)) as file:
        file.write(chart(run))
    if not overwrite and (edited := _edited(card, content)) is not None:
        return Card(card, edited)
    with whole_file(card) as file:
        file.write(content.encode())
    return Card(card, None)


def _sealed(content: str) -> str:
    """The card with its own hash at the end, by which an edit shows."""
    return f"{content.rstrip()}\n\n{_SEAL.format(hashlib.sha256(content.rstrip().encode()).hexdigest())}\n"


def _edited(card: Path, new: str) -> str | None:
    """The lines in which a card that was edited by hand differs from `new`; None where there is none to keep."""
    if not card.is_file():
        return None
    old = card.read_text(encoding="utf-8")
    body, mark, _ = old.rpartition("\n\n" + _SEAL.partition("{")[0])
    if (mark and _sealed(body) == old) or old == new:
        return None
    there, here = old.splitlines(), new.splitlines()
    return "\n".join(difflib.unified_diff(there, here, "as edited", "as it would be written", lineterm="", n=0))


def metadata(run: MeasuredRun, base_model: str | None = None, license: str | None = None) -> ModelCardData:
    """The card's YAML block, by which the hub lists, filters and links the artifact."""
    known, known_license = _EMBEDDED.get(run.manifest.model.id, (None, None))
    base = base_model or known or _hub_id(run)
    if base is not None:
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise BadInput(f"--base-model {base!r}: not a hub id such as org/name ({error})") from None
    kept = _original_card(run)
    if license or "license" not in kept:
        kept |= {"license": license or known_license or "other"}
    if kept["license"] == "other" and "license_name" not in kept:
        kept |= {"license_name": "see-the-base-model"}
    tags = ["quantpress", run.manifest.artifact.format, *_bit_tags(run)]
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="gguf" if run.manifest.artifact.format == "gguf" else "transformers",
        pipeline_tag=_task(run),
        tags=tags,
        model_name=run.folder.resolve().name if run.label == "recipe" else f"{_short(run)}-{run.label}",
        eval_results=_eval_results(run),
        **kept,
    )


def servers(run: MeasuredRun, name: str) -> list[ServeCommand]:
    """Each program that reads the artifact's format, with the reasons why it would not load this artifact, if any."""
    contents = contracts.of_folder(run.folder / "quantized")
    out: list[ServeCommand] = []
    offered = [(server, target) for server in SERVERS.values() for target in server.variants]
    for server, target in offered:
        command = server.hub_command
        loader, title = target.loader, target.loader.label
        if not command or contents.format not in loader.formats:
            continue
        refused = tuple(map(_without_advice, contracts.problems(target, contents)))
        if title == "vLLM on a CPU" and bool(refused) == bool(out[0].refused):
            continue  # the same as on a GPU
        notes = loader_notes(loader, contents.format, contents.grids, contents.activations)
        out.append(ServeCommand(title, loader.version, command.format(name=name), "bash", refused, tuple(notes)))
    if contents.format != "gguf":
        merged = [_without_advice(line) for line in loading(contents) if line.startswith("transformers")]
        wrong = tuple(line for line in merged if "does not load" in line or "wrongly" in line)
        notes = [line for line in merged if line not in wrong]
        code = _TRANSFORMERS.format(name=name, auto=auto_class_of(run.folder / "quantized"))
        version = run.manifest.versions.get("transformers", "")
        out.append(ServeCommand("transformers", version, code, "python", wrong, tuple(notes)))
    return out


def _without_advice(reason: str) -> str:
    """Why a server refuses the files, without what whoever makes them would set instead."""
    return reason.partition(": set ")[0]


_TRANSFORMERS = """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""


def _task(run: MeasuredRun) -> str:
    """What the hub calls the model's task."""
    if run.manifest.artifact.format == "gguf":
        return "text-generation"
    of_images = auto_class_of(run.folder / "quantized") == "AutoModelForImageTextToText"
    return "image-text-to-text" if of_images else "text-generation"


def shown_recipe(run: MeasuredRun) -> dict[str, Any]:
    """The recipe without defaults and without paths of the machine it ran on."""

    def named(section: dict[str, Any], key: str) -> dict[str, Any]:
        return section | ({key: Path(section[key]).name} if Path(str(section.get(key, ""))).is_absolute() else {})

    recipe = without_defaults(run.manifest.recipe) | {"model": run.manifest.model.id}
    for key in ("calibration", "evaluation"):
        if isinstance(recipe.get(key), dict):
            recipe[key] = named(recipe[key], "source")
            if "tasks" in recipe[key]:
                recipe[key] = recipe[key] | {"tasks": [named(task, "file") for task in recipe[key]["tasks"]]}
    return {key: value for key, value in recipe.items() if key != "smoke"}


def _hub_id(run: MeasuredRun) -> str | None:
    """The original's id on the hub: the source itself, or what the config says it was loaded from."""
    if run.manifest.model.kind == "hub":
        return run.manifest.model.id
    config = run.folder / "quantized" / "config.json"
    name = json.loads(config.read_text("utf-8")).get("_name_or_path") if config.is_file() else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _short(run: MeasuredRun) -> str:
    return run.manifest.model.id.split("/")[-1]


def _original_card(run: MeasuredRun) -> dict[str, Any]:
    """Licence and languages from the original's own card, where its folder holds one."""
    source = expanded(str(run.manifest.recipe.get("model", "")))
    readme = source / "README.md"
    if not readme.is_file():
        return {}
    try:
        data = ModelCard.load(readme).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: data[key] for key in _KEPT if data.get(key)}


def _bit_tags(run: MeasuredRun) -> list[str]:
    """A tag such as `4-bit`, for the bits that most quantized layers have."""
    bits = [layer.bits for layer in run.manifest.layers if layer.bits < 16]
    return [f"{max(dict.fromkeys(bits), key=bits.count):g}-bit"] if bits else []


def _eval_results(run: MeasuredRun) -> list[EvalResult]:
    """This artifact's own scores for the hub's `model-index`; the original's are in the card's table."""
    text, own, out = run.text, run.own.artifact or run.artifact, []
    quality: Sequence[tuple[str, str, float]] = [
        ("perplexity", "Perplexity", own.perplexity),
        ("bits_per_byte", "Bits per byte", own.bits_per_byte),
    ]
    for kind, name, value in quality:
        out.append(EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type="text", dataset_name=text.source,
            metric_type=kind, metric_name=name, metric_value=round(value, 4),
        ))  # fmt: skip
    for task in run.own.tasks:
        out.append(EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=task.task, dataset_name=task.task,
            dataset_args={"num_few_shot": task.few_shot, "documents": task.n}, metric_type=task.metric,
            metric_name=task.metric, metric_value=round(task.artifact.value, 4),
        ))  # fmt: skip
    return out
