"""Whether an artifact is intact, in steps of which each says more: its files, its tensors, its original.

Files are compared with the list of checksums and nothing may lie beside them; tensors and configs must fit each other,
the model and what lies beside them; and where the original is at hand, each weight must be the original's, rounded.
Where it is not, a short forward pass must predict something.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import own_manifest
from quantpress.artifact.original import OriginalCheckpoint
from quantpress.core.errors import BadInput
from quantpress.core.files import changed
from quantpress.engine.sources import at_hand
from quantpress.gguf.reader import gguf_files

from .package import find_artifact
from .signing import PublicKey
from .verifying import gguf_file, tensors
from .verifying.forward import forward_problem
from .verifying.gguf_original import gguf_problems
from .verifying.likeness import beside_problems
from .verifying.listing import SUMS, check_sums, is_export, listing_of
from .verifying.original import rotated, tensor_problems


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    files: how many were compared with a list of checksums; problems: a line each; reached: in words, what was compared
    with what and found to agree, in order; not_reached: what was not compared, each with what it would need.
    """

    files: int
    problems: tuple[str, ...]
    reached: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()


def verify(
    where: Path,
    *,
    allow: Collection[str] = (),
    original: Path | str = "",
    forward: bool = False,
    key: PublicKey | None = None,
) -> Verified:
    """Compare what is in `where` with its list of checksums, with config and model, and with the original.

    where: a run folder, an artifact folder or an exported one. allow: files, by relative path, that may lie there
    without being listed. original: the folder of the model it was made from, or in words why there is none. forward:
    whether a short forward pass stands in for an original that is not there. key: whose signature the list of checksums
    has to have. Raises BadInput when `where` is none of
    these, and for an original that cannot be read.
    """
    artifact = artifact_in(where)
    reached, not_reached = [], []
    listing = listing_of(where, artifact)
    unsigned = None if key is None else key.problem(where)
    found = ([] if unsigned is None else [unsigned]) + listing.problems(allow)
    if key is not None and unsigned is None:
        reached.append(f"{SUMS} is signed by key {key.name}")
    if listing.source is None:
        not_reached.append(f"checksums: neither {SUMS} nor a manifest lists any")
    elif not found:
        reached.append(f"{len(listing.files)} files are as {listing.source.name} lists them, and no others are there")
    wrong = _structure(artifact, told=bool(found))
    alone = bool(gguf_files(artifact)) and not (artifact / "config.json").is_file()
    if alone:
        reached += [] if wrong else ["the GGUF file is whole and agrees with itself"]
        not_reached.append("tensors against a model: a GGUF file needs the config.json of its model beside it")
    elif not wrong and not found:
        reached.append("every tensor fits its config and the model")
    if not wrong and not alone and isinstance(original, Path):
        wrong, words = against_original(artifact, original)
        reached += [] if wrong or found else [words]
    elif original:
        not_reached.append(f"weights against the original: {original}")
    if forward and not wrong and not alone and not isinstance(original, Path):
        problem, words = forward_problem(artifact, where)
        wrong += [] if problem is None else [problem]
        reached += [] if problem or found else [f"a short forward pass: {words}"]
    return Verified(len(listing.files), tuple(dict.fromkeys(found + wrong)), tuple(reached), tuple(not_reached))


def _structure(artifact: Path, told: bool) -> list[str]:
    """As `structure`, with what cannot be read as a problem; told: whether the checksums have told of the damage."""
    try:
        return structure(artifact)
    except BadInput as error:
        return [] if told else [str(error)]


def structure(folder: Path) -> list[str]:
    """One line for each way in which an artifact contradicts itself: its tensors, configs, tokenizer and model."""
    return gguf_file.problems(folder) if gguf_files(folder) else tensors.problems(folder)


def against_original(folder: Path, original: Path) -> tuple[list[str], str]:
    """One line for each way in which an artifact is not the model in `original`, rounded; and what was compared."""
    manifest = own_manifest(folder)
    config: Mapping[str, Any] = rotated(OriginalCheckpoint(original), manifest).config
    found = list(beside_problems(folder, original, config))
    if gguf_files(folder):
        lines, count = gguf_problems(folder, original)
        words = f"{count} parameters are the original's within what their types lose"
    else:
        lines, gaps = tensor_problems(folder, original)
        words = f"{len(gaps)} linears are the original's within what their grids lose, all other tensors exactly"
    return found + lines, f"{words}; config, tokenizer and template are the original's"


def original_at_hand(where: Path, cache: Path) -> Path | str:
    """The folder of the model that an artifact was made from, if it is on this machine and unchanged; else why not."""
    artifact = artifact_in(where)
    manifest = own_manifest(where) or own_manifest(artifact)
    model = "" if manifest is None else str(manifest.recipe.get("model") or "")
    if manifest is None or not model:
        return "no manifest names it; --original does"
    try:
        folder = at_hand(manifest.model.kind, model, manifest.model.revision, cache=cache)
    except BadInput as error:
        return str(error)
    if folder is None:
        revision = f"@{manifest.model.revision}" if manifest.model.kind == "hub" and manifest.model.revision else ""
        return f"{model} is not on this machine; --original {model}{revision} compares with it"
    files = list(manifest.model.files.items())
    lost = next(filter(None, tensors.at_once(lambda one: next(changed(folder, dict([one])), None), files)), None)
    if lost is not None:
        return f"{folder / lost[0]}, of which it was made, {lost[1]}; --original {model} compares with it all the same"
    return folder


def check_unchanged(where: Path) -> None:
    """Raise BadInput for an artifact whose files are not what its list of checksums says; one without a list is taken.

    where: a run folder, an artifact folder, an exported one, or a .gguf file in such a folder.
    """
    folder = where if where.is_dir() else where.parent
    artifact = folder / "model" if is_export(folder) else folder / "quantized"
    check_sums(folder, artifact if artifact.is_dir() else folder)


def artifact_in(where: Path) -> Path:
    """The artifact folder in a run folder, an artifact folder or an exported one."""
    return find_artifact(where / "model" if is_export(where) and (where / "model").is_dir() else where)
