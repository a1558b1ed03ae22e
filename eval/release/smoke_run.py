"""The smoke test of a run: which artifact is served, by which server, with which settings."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.manifest import MANIFEST, own_manifest
from quantpress.core.errors import BadInput
from quantpress.exports.servers import SERVERS, launchers
from quantpress.exports.serving.containers import composed, lacking
from quantpress.exports.serving.load import Wanted
from quantpress.exports.serving.record import Check, Serving
from quantpress.exports.serving.reference import find_reference, read_reference
from quantpress.exports.serving.smoke_test import Listener
from quantpress.exports.serving.smoke_test import smoke as test_server
from quantpress.exports.serving.starting import Options as ServerOptions
from quantpress.exports.serving.starting import interpreter
from quantpress.exports.verify import artifact_in
from quantpress.exports.verifying.listing import listing_of
from quantpress.gguf.reader import gguf_files
from quantpress.recipe import Recipe, Smoke
from quantpress.recipe.loading import parse

from .callbacks import Callbacks, Options

# servers that are started from their export's compose.yaml
IN_CONTAINERS = tuple(name for name, server in SERVERS.items() if server.launcher is None)


def check_server(recipe: Recipe) -> None:
    """Raise BadInput when the server of the recipe's smoke test is not installed."""
    if recipe.smoke is None or recipe.smoke.server == "url":
        return
    try:
        interpreter(launchers()[recipe.smoke.server], recipe.smoke.python)
    except BadInput as error:
        raise BadInput(
            f"smoke.server {recipe.smoke.server}: {error}; or --set smoke=null leaves the test out"
        ) from None


@dataclass(frozen=True)
class ServedArtifact:
    """What is tested, and how.

    artifact: a folder or a .gguf file. run: the run folder it lies in, if any.
    load: what arrives in the test under load, None without one; original: the model to put under it too. listed: the
    folder whose checksums are compared first, None where they were just written. exported: the export
    folder it lies in, if any; in_container: whether the server is started from that folder's
    compose.yaml, in place of smoke.server.
    """

    artifact: Path
    smoke: Smoke
    run: Path | None = None
    load: Wanted | None = None
    original: Path | None = None
    listed: Path | None = None
    exported: Path | None = None
    in_container: bool = False


def run_smoke(subject: ServedArtifact, out: Path, options: Options, callbacks: Callbacks) -> Serving:
    """Test the subject on its server and write `out`/eval/serving.json."""
    smoke, exported = subject.smoke, subject.exported
    settings = ServerOptions(
        smoke.python, smoke.url, smoke.concurrency, smoke.max_model_len, smoke.deadline_s,
        options.api_key, lacking(exported) if exported is not None and smoke.url is not None else {},
        subject.load, subject.original,
    )  # fmt: skip
    server = composed(exported) if exported is not None and subject.in_container else smoke.server
    listener = Listener(callbacks.on_line, callbacks.on_check)
    file = find_reference(exported or subject.artifact)
    reference = None if file is None else read_reference(file)
    files = None if subject.listed is None else _files(subject.listed)
    return test_server(subject.artifact, server, out, settings, options.cache, listener, reference, files)


def _files(listed: Path) -> Check:
    """Whether the files are those whose checksums were written down."""
    started = time.perf_counter()
    listing = listing_of(listed, artifact_in(listed))
    count, wrong = len(listing.files), listing.problems()
    seconds = time.perf_counter() - started
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        return Check(name="files", status="fail", reason=f"{wrong[0]}{more}", seconds=seconds)
    if not count:
        return Check(name="files", status="skip", reason="no checksums to compare with", seconds=seconds)
    return Check(name="files", status="pass", reason=f"{count} files are as listed", seconds=seconds)


def find_served(path: Path, changes: Mapping[str, Any]) -> ServedArtifact:
    """What `path` means: a run folder, an artifact folder, a .gguf file or RUN/export/<target>.

    changes: settings of the smoke test in place of the recipe's; a server of IN_CONTAINERS is started from its export.
    Raises BadInput for a path that is none of these.
    """
    if (server := changes.get("server")) in IN_CONTAINERS:
        path = _export_of(path, str(server))
        changes = {key: value for key, value in changes.items() if key != "server"}
    exported = path if (path / "export.json").is_file() else None
    artifact, run = _find_artifact(path)
    in_container = exported is not None and not {"server", "url"} & changes.keys()
    folder = artifact if artifact.is_dir() else artifact.parent
    listed = exported or (folder if artifact.is_dir() or (folder / MANIFEST).is_file() else None)
    settings = _settings(run, artifact, changes)
    return ServedArtifact(
        artifact, settings, run, listed=listed, exported=exported, in_container=in_container
    )  # fmt: skip


def served_file(folder: Path) -> Path:
    """What a server is given of an artifact: its folder, or its .gguf file (the first one of a split file)."""
    files = gguf_files(folder)
    return files[0] if files else folder


def _export_of(path: Path, target: str) -> Path:
    folder = path / "export" / target
    if not (folder / "export.json").is_file():
        raise BadInput(
            f"{target} is started from {folder}, which does not exist: `quantpress export {path} --target {target}` "
            "writes it; for a server that is already running give --server url --url http://host:port"
        )
    return folder


def _find_artifact(path: Path) -> tuple[Path, Path | None]:
    """The artifact (a folder or a .gguf file) that `path` means, and its run folder when it lies in one."""
    if not path.exists():
        raise BadInput(f"{path}: no such run folder or artifact")
    inside = [path / name for name in ("quantized", "model") if (path / name).is_dir()]
    artifact = inside[0] if inside else path
    if artifact.is_dir():
        artifact = served_file(artifact)
    if artifact.is_dir() and not (artifact / "config.json").is_file():
        raise BadInput(f"{path}: neither a run folder nor an artifact (no config.json and no model.gguf)")
    if artifact.is_file() and artifact.suffix != ".gguf":
        raise BadInput(f"{path}: an artifact is a folder or a .gguf file")
    above = list(artifact.absolute().parents)[:4]  # RUN/export/<target>/model/model.gguf
    runs = [folder for folder in above if (folder / MANIFEST).is_file() and (folder / "quantized").is_dir()]
    return artifact, path if (path / "quantized").is_dir() else next(iter(runs), None)


def _settings(run: Path | None, artifact: Path, changes: Mapping[str, Any]) -> Smoke:
    """The recipe's settings with `changes`; without a recipe, those of a server that reads this kind of file."""
    manifest = None if run is None else own_manifest(run)
    base = ({} if manifest is None else manifest.recipe).get("smoke") or {
        "server": "llama.cpp" if artifact.suffix == ".gguf" else "vllm"
    }
    if "url" in changes:
        changes = {"server": "url", **changes}
    if changes.get("server", base["server"]) != base["server"]:  # its interpreter and address belong to another server
        base = {key: value for key, value in base.items() if key not in ("python", "url")}
    smoke = parse({"smoke": {**base, **changes}}, "of the smoke test").smoke
    assert smoke is not None
    return smoke
