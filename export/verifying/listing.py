"""The files of an artifact or an exported folder against its list of checksums; nothing else has a place there."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantpress.artifact.manifest import MANIFEST, own_manifest
from quantpress.core.errors import BadInput
from quantpress.core.files import changed
from quantpress.core.untrusted import read_json
from quantpress.gguf.reader import LAYOUT, gguf_files
from quantpress.models.checkpoint import FORMAT_FILES, INDEX, Checkpoint
from quantpress.models.companions import LISTS, companions

from ..servers.deployment import EXPORT_RECORD

SUMS = "SHA256SUMS"
SIGNATURE = f"{SUMS}.minisig"
CARD = ("README.md", "quality.png")  # the model card and its chart, written after the list and again with each report
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
# What the hub's client notes in a folder that it downloads into.
_HUB_CLIENT = re.compile(r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.+\.(metadata|lock))")
# What may lie beside the weights of an artifact that no list names, by whoever made it.
_BESIDE = {
    "config.json", MANIFEST, LAYOUT, *CARD, *FORMAT_FILES, "quant_config.json", "recipe.yaml", "Modelfile",
    "imatrix.gguf", ".gitattributes",
}  # fmt: skip
_PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Listing:
    """A folder, the sha256 of each listed file in it by relative path, and where that list is; None where none is."""

    folder: Path
    files: Mapping[str, str]
    source: Path | None

    def problems(self, allow: Collection[str] = ()) -> list[str]:
        """A line for each file that is not as listed, and for each that is not listed and not among `allow`."""
        if self.source is not None and not self.files:
            return [f"{self.source} lists no file"]
        outside = [n for n in self.files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
        found = [f"{self.source}: {name} is no file of this folder" for name in outside]
        inside = {name: digest for name, digest in self.files.items() if name not in outside}
        found += [f"{self.folder / name}, which is listed, {what}" for name, what in changed(self.folder, inside)]
        return found + [f"{self.folder / name}: {_why(name, self.source)}" for name in self.unlisted(allow)]

    def unlisted(self, allow: Collection[str] = ()) -> list[str]:
        """The files, by relative path, that are neither listed nor, where there is no list, known to belong there."""
        known = {*self.files, *allow, ".gitattributes"}
        if self.source is not None and self.source.name == SUMS:
            known |= {SUMS, SIGNATURE}
        else:
            known |= {MANIFEST, *CARD} if self.files else _belonging(self.folder)
        files = (file for file in sorted(self.folder.rglob("*")) if file.is_symlink() or not file.is_dir())
        names = (file.relative_to(self.folder).as_posix() for file in files)
        return [name for name in names if name not in known and not _HUB_CLIENT.fullmatch(name)]


def listing_of(where: Path, artifact: Path) -> Listing:
    """The list of an exported or published folder (SHA256SUMS), else of an artifact (its run's manifest, or its own).

    where: what the user named; artifact: the folder of weights in it.
    """
    if is_export(where):
        file = where / SUMS
        return Listing(where, _sums(file) if file.is_file() else {}, file)
    for folder in dict.fromkeys((where, artifact)):
        manifest = own_manifest(folder)
        if manifest is not None and manifest.artifact.files:
            return Listing(artifact, manifest.artifact.files, folder / MANIFEST)
    return Listing(artifact, {}, None)


def is_export(where: Path) -> bool:
    """Whether a folder is that of an export, with its model in model/, or has the list of a published artifact."""
    return (where / SUMS).is_file() or ((where / EXPORT_RECORD).is_file() and (where / "model").is_dir())


def check_unlisted(where: Path, artifact: Path, allow: Collection[str] = ()) -> None:
    """Raise BadInput for a file that would be served or published with the artifact and is in no list."""
    listing = listing_of(where, artifact)
    for name in listing.unlisted(allow):
        raise BadInput(f"{listing.folder / name}: {_why(name, listing.source)}")


def check_sums(where: Path, artifact: Path) -> None:
    """Raise BadInput for a listed file that is not as listed; without a list there is nothing to compare with."""
    listing = listing_of(where, artifact)
    for name, what in changed(listing.folder, listing.files):
        raise BadInput(
            f"{listing.folder / name}, which {(listing.source or where).name} lists, {what}: what would be measured is "
            "not what was made; restore it, or --although-changed"
        )


def _sums(file: Path) -> dict[str, str]:
    """The sha256 of each file that SHA256SUMS names. Raises BadInput for what `sha256sum --check` would not read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: not a list of checksums: {' '.join(str(error).split())}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            what = "names a file twice" if match else "is no checksum and name"
            raise BadInput(f"{file}: line {number} {what}: {line[:80]!r}; export again")
        found[match[2]] = match[1]
    return found


def sums(hashes: Mapping[str, str]) -> bytes:
    """The text of SHA256SUMS, for `sha256sum --check`, from the sha256 of each file by relative path."""
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def _belonging(folder: Path) -> set[str]:
    """What may lie in an artifact's folder where nothing lists it: weights that are read, configs, tokenizer."""
    weights = {file.name for file in gguf_files(folder)}
    if not weights:
        try:
            weights = {path.name for path in Checkpoint(folder).layout()}
            weights |= {INDEX} if (folder / INDEX).is_file() else set()
        except BadInput:  # told of where the tensors are checked
            weights = {path.name for path in folder.glob("*.safetensors*")}
    beside = {file.relative_to(folder).as_posix() for file in companions(folder) if file.suffix != ".py"}
    pictures = {file.name for file in folder.iterdir() if file.suffix.lower() in _PICTURES}
    return weights | beside | pictures | _BESIDE


def _why(name: str, source: Path | None) -> str:
    suffix = PurePosixPath(name).suffix
    what = ""
    if suffix in _PICKLES:
        what = "a pickle, which can run code when it is loaded, "
    elif suffix == ".py":
        what = "code "
    elif suffix in (".safetensors", ".gguf"):
        what = "weights "
    where = f"that {source.name} does not list" if source is not None else "that no loader of these weights needs"
    return f"{what or 'a file '}{where}; move it away, or --allow {name}"


def broken_json(folder: Path) -> list[str]:
    """A line for each JSON file of a folder that is none."""
    found = []
    for file in sorted(file for file in folder.rglob("*.json") if file.name not in LISTS):
        try:
            read_json(file)
        except BadInput as error:
            found.append(str(error))
    return found
