"""Make a run again from its manifest, and prove that it came out the same or find the first difference."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantpress.artifact.manifest import Manifest, read_manifest
from quantpress.core.errors import BadInput
from quantpress.core.files import changed
from quantpress.engine.job import Job
from quantpress.engine.journal import differences
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.models.checkpoint import FORMAT_FILES, Checkpoint
from quantpress.recipe import Recipe
from quantpress.recipe.loading import parse


@dataclass(frozen=True)
class RecordedRun:
    """A run on record: its manifest, and the folder of its artifact, None where only the manifest is at hand."""

    manifest: Manifest
    folder: Path | None

    @property
    def recipe(self) -> Recipe:
        return parse(self.manifest.recipe, "of the manifest")

    @property
    def model(self) -> str:
        """The model to fetch; a hub id is pinned to the revision that was used."""
        model = self.manifest.model
        if model.kind == "hub" and model.revision:
            return f"{model.id.partition('@')[0]}@{model.revision}"
        return str(self.manifest.recipe["model"])


@dataclass(frozen=True)
class Reproduction:
    """What came of a reproduction.

    out: its run folder. files: how many came out equal. first: the first difference, None if all are equal.
    causes: what was not as it had been.
    """

    out: Path
    files: int
    first: str | None
    causes: tuple[str, ...]


def open_recorded(path: Path) -> RecordedRun:
    """The run of a manifest.json, or of the folder that holds one; raises BadInput when there is none."""
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(path)
    for key in ("recipe", "model", "versions", "artifact", "layers"):
        if key not in manifest.model_fields_set:
            raise BadInput(f"{path}: no {key!r} in it; this is not the manifest of a quantpress run")
    quantized = next((f for f in (folder / "quantized", folder) if (f / "config.json").is_file()), None)
    return RecordedRun(manifest, quantized)


def make_again(original: RecordedRun, job: Job, settings: Settings) -> Reproduction:
    """Make the artifact again in `settings.out` and compare it with the hashes of the manifest.

    The number of threads is set to what it was, because sums depend on it. Raises BadInput before the work when the
    model is another one, and when `settings.out` holds a finished run, which would prove nothing.
    """
    its_own = () if original.folder is None else (original.folder.resolve(), original.folder.resolve().parent)
    if settings.out.resolve() in its_own:
        raise BadInput(f"{settings.out} is the run that is to be reproduced; give another --out")
    if (settings.out / "manifest.json").exists() and not settings.overwrite:
        raise BadInput(
            f"{settings.out} holds a finished run, which would prove nothing; give another --out, or --overwrite"
        )
    there, here = original.manifest.model.files, job.checkpoint.file_hashes()
    wrong = differences(there, here)
    if wrong:
        raise BadInput(f"the model is not the one the manifest names ({wrong[0]}); give the right one with --model")
    threads = getattr(original.manifest.machine, "threads", None)
    if threads is not None:
        torch.set_num_threads(threads)
    manifest = quantize(job, settings)
    made = settings.out / "quantized"
    wanted = original.manifest.artifact.files
    unlike = [name for name, _ in changed(made, wanted)]
    named = {*wanted, *FORMAT_FILES}  # earlier versions left these out of the manifest
    unlike += sorted(name for name in manifest.artifact.files if name not in named)
    if not unlike:
        return Reproduction(settings.out, len(wanted), None, ())
    first = _first_difference(original, manifest, made, unlike)
    return Reproduction(settings.out, len(wanted) - len(unlike), first, tuple(_causes(original.manifest, manifest)))


def _first_difference(original: RecordedRun, manifest: Manifest, made: Path, unlike: list[str]) -> str:
    """The first layer whose record differs, else the first tensor, else the first file."""
    before = {layer.name: layer.document() for layer in original.manifest.layers}
    for layer in manifest.layers:
        wrong = differences(before.get(layer.name), layer.document())
        if wrong:
            return f"layer {layer.name}: {wrong[0]}"
    if original.folder is not None:
        found = _first_tensor(original.folder, made)
        if found is not None:
            return found
    more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
    return f"file {unlike[0]}{more}"


def _first_tensor(there: Path, here: Path) -> str | None:
    before, now = Checkpoint(there), Checkpoint(here)
    for name in before.names():
        if name not in now:
            return f"tensor {name}: it no longer exists"
        a, b = before.read(name), now.read(name)
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"tensor {name}: {a.dtype} {list(a.shape)} there, {b.dtype} {list(b.shape)} now"
        unequal = (a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum()
        if unequal:
            return f"tensor {name}: {int(unequal)} of {a.numel() * a.element_size()} bytes differ"
    return None


def _causes(before: Manifest, now: Manifest) -> list[str]:
    """What is not as it was, the most likely cause first."""
    found = [f"the recipe: {line}" for line in differences(before.recipe, now.recipe)]
    found += differences(
        {"calibration text": before.calibration and before.calibration.sha256, "quantpress": before.quantpress},
        {"calibration text": now.calibration and now.calibration.sha256, "quantpress": now.quantpress},
    )
    found += differences(before.versions, now.versions)
    facts = ("device", "threads", "cpu")
    there, here = ({fact: getattr(manifest.machine, fact, None) for fact in facts} for manifest in (before, now))
    found += differences(there, here)
    return found
