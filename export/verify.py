"""Whether an artifact is intact, in steps of which each says more: its files, its tensors, its original.

Files are compared with the list of checksums and nothing may lie beside them; tensors and configs must fit each other,
the model and what lies beside them; and where the original is at hand, each weight must be the original's, rounded.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from quantpress.core.errors import BadInput
from quantpress.gguf.reader import gguf_files

from .package import find_artifact
from .verifying import gguf_file, tensors
from .verifying.listing import SUMS, is_export, listing_of


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    files: how many were compared with a list of checksums; problems: a line each; reached: in words, what was compared
    with what, in order; not_reached: what was not, each with what it would need.
    """

    files: int
    problems: tuple[str, ...]
    reached: tuple[str, ...] = ()
    not_reached: tuple[str, ...] = ()


def verify(where: Path, *, allow: Collection[str] = ()) -> Verified:
    """Compare what is in `where` with its list of checksums, with config and model.

    where: a run folder, an artifact folder or an exported one. allow: files, by relative path, that may lie there
    without being listed. Raises BadInput when it is none of them.
    """
    artifact = artifact_in(where)
    reached, not_reached = [], []
    listing = listing_of(where, artifact)
    found = listing.problems(allow)
    if listing.source is None:
        not_reached.append(f"checksums: neither {SUMS} nor a manifest lists any")
    elif not found:
        reached.append(f"{len(listing.files)} files are as {listing.source.name} lists them, and no others are there")
    wrong = _structure(artifact, told=bool(found))
    if gguf_files(artifact) and not (artifact / "config.json").is_file():
        reached += [] if wrong else ["the GGUF file is whole and agrees with itself"]
        not_reached.append("tensors against a model: a GGUF file needs the config.json of its model beside it")
    elif not wrong and not found:
        reached.append("every tensor fits its config and the model")
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


def artifact_in(where: Path) -> Path:
    """The artifact folder in a run folder, an artifact folder or an exported one."""
    return find_artifact(where / "model" if is_export(where) else where)
