"""Exports an artifact for a target: the model in a format that it loads, launch files, a README and checksums."""

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.convert import convert
from quantpress.artifact.manifest import MANIFEST, own_manifest
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256, whole_folder, write_json
from quantpress.core.text import size
from quantpress.core.untrusted import check_files, read_json
from quantpress.formats import FORMATS
from quantpress.gguf.chat import template_arguments
from quantpress.gguf.reader import gguf_files
from quantpress.models.hub import near

from . import contracts, speculation
from .launch_files import compose, kubernetes, serve_sh
from .servers import SERVERS
from .servers.deployment import EXPORT_RECORD, Deployment, ModelFolder
from .servers.loader import notes as loader_notes
from .servers.resources import Resources, of_target
from .servers.served_model import ServedModel
from .servers.target_settings import Drafting, ServerSettings
from .serving.reference import FILE as REFERENCE
from .serving.reference import read_reference
from .signing import Signer
from .verifying.listing import SIGNATURE, SUMS, check_unlisted, sums

LOOPBACK = "127.0.0.1"
_SHARDS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Exported:
    """folder: what was written; format: of its model; converted_from: None where the artifact was not converted."""

    folder: Path
    format: str
    converted_from: str | None


def export(
    run: Path,
    target: ServerSettings,
    out: Path | None = None,
    *,
    host: str = LOOPBACK,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> Exported:
    """Write the folder of `target`, `run/export/<target>` unless `out` says otherwise.

    run: a run folder or an artifact folder; host: the address to listen on; signer: signs the checksums. Shards are
    hard links to the artifact's where the file system allows. Raises BadInput, before anything is written, for an
    artifact that the target cannot load, for files in it that nothing lists, for a folder that exists (with
    `overwrite`: unless an export made it), and for a host that is no IP address.
    """
    host = _address(host)
    named = out or run / "export" / target.name
    _check_replaceable(named, overwrite)
    folder = named.resolve()  # `.` has no name to write another beside; a link itself is kept
    artifact = find_artifact(run)
    source, to = _loadable(run, artifact, target)
    check_unlisted(source if source != artifact else run, source)
    name = _name(run, artifact)
    accepted = speculation.measured(run, artifact)
    ready = folder.with_name(f".{folder.name}.new")  # an older export stays until the new one is complete
    shutil.rmtree(ready, ignore_errors=True)
    with whole_folder(ready) as new:
        model = new / "model"
        _place(source, model, to)
        served = contracts.of_folder(model)
        server = SERVERS[target.name]
        assert server.deploy is not None, f"{target.name} is no target"
        deployment = server.deploy(target, _model_folder(model, name, target, served))
        kinds = loader_notes(target.loader, served.format, served.grids, served.activations)
        notes = [*deployment.notes, *(f"{line}." for line in kinds)]
        converted_from = None if to is None else contracts.of_folder(source).format
        record = _record(target, deployment, served, converted_from, artifact)
        if isinstance(target, Drafting) and target.draft_for is not None:
            notes += speculation.notes(run, target.draft_for, target.draft_tokens, accepted)
            record["draft"] = speculation.facts(accepted, target.draft_tokens)
        notes += _pack_reference(run, artifact, new)
        _write(new, deployment, host, notes)
        write_json(new / EXPORT_RECORD, record)
        _sums(new, {} if to is not None else _known(run, artifact, source))
        if signer is not None:
            (new / SIGNATURE).write_bytes(signer.sign((new / SUMS).read_bytes()))
    if folder.exists():
        shutil.rmtree(folder)
    ready.rename(folder)
    return Exported(named, served.format, converted_from)


def _model_folder(model: Path, name: str, target: ServerSettings, served: ServedModel) -> ModelFolder:
    """What the launch command has to know about the exported folder `model`."""
    file = next((gguf.name for gguf in gguf_files(model)), "")
    has_tokenizer = (model / "tokenizer_config.json").is_file()  # a GGUF file alone has none beside it
    modelfile = model / "Modelfile"
    return ModelFolder(
        name,
        of_target(target, served, _weights_bytes(model)),
        served.kv_cache,
        served.named_positions,
        _has_template(model),
        file,
        template_arguments(open_tokenizer(model)) if file and has_tokenizer else {},
        modelfile.read_text(encoding="utf-8") if modelfile.exists() else None,
    )


def _has_template(model: Path) -> bool:
    """Whether the model has a chat template, in any of the places where one may lie."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    config = model / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def check(run: Path, target: ServerSettings) -> None:
    """Raise BadInput where `export` would refuse the artifact."""
    _loadable(run, find_artifact(run), target)


def find_artifact(run: Path) -> Path:
    """The artifact folder of a run, or the given folder where it is one; raises BadInput where it is neither."""
    if not run.is_dir():
        raise BadInput(f"{run}: no such folder{near(run)}")
    for folder in (run / "quantized", run):
        if (folder / "config.json").is_file() or gguf_files(folder):
            return folder
    raise BadInput(f"{run} holds no artifact (neither a quantized folder with a config.json nor a model.gguf)")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise BadInput for an existing folder that may not be replaced."""
    if not folder.exists():
        return
    if not overwrite:
        raise BadInput(f"{folder} exists; give --out another folder, or --overwrite")
    if (folder / EXPORT_RECORD).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise BadInput(
        f"{folder} is not the folder of an export (no {EXPORT_RECORD}) and is kept; give --out another folder"
    )


def _loadable(run: Path, artifact: Path, target: ServerSettings) -> tuple[Path, str | None]:
    """The folder to export for `target`, and the format to convert it to; None where it loads as it is.

    Preferred in this order: the artifact itself, what the run has converted, any format that holds it exactly. Raises
    BadInput when the target can load none of them.
    """
    contents = contracts.of_folder(artifact)
    refused = contracts.problems(target, contents)
    if not refused:
        return artifact, None
    loadable = target.loader.formats
    for other in loadable:
        done = run / "converted" / other
        if (done / "config.json").is_file() and not contracts.problems(target, contracts.of_folder(done)):
            return done, None
    for other in loadable:
        if (
            "gguf" not in (other, contents.format)  # GGUF has number types of its own
            and other in FORMATS
            and contents.format in FORMATS
            and other != contents.format
            and not contracts.problems(target, contents.in_format(other))
        ):
            return artifact, other
    raise BadInput(contracts.sentence(refused))


def _place(source: Path, model: Path, to: str | None) -> None:
    """Put the model's files into `model`: converted, or shards linked and the rest copied."""
    files = sorted(source.rglob("*"))
    check_files(source, files)
    if to is not None:
        convert(source, model, to)
        return
    model.mkdir()
    for file in files:
        there = model / file.relative_to(source)
        if file.is_dir():
            there.mkdir()
        elif file.suffix in _SHARDS:
            link_or_copy(file, there)
        else:
            shutil.copy2(file, there)


def link_or_copy(file: Path, there: Path) -> None:
    """Make a hard link where the file system allows, else a copy."""
    try:
        os.link(file, there)
    except OSError:
        shutil.copy2(file, there)


def _pack_reference(run: Path, artifact: Path, folder: Path) -> list[str]:
    """Copy the reference that the evaluation made of this artifact into the export; returns notes for the README."""
    file, manifest = run / "eval" / REFERENCE, own_manifest(artifact)
    if not file.is_file():
        return []
    made_of = read_reference(file).artifact
    if made_of is not None and (manifest is None or made_of != manifest.artifact.digest):
        return [f"{REFERENCE} is left out: the run was made anew after its evaluation."]
    shutil.copy2(file, folder / REFERENCE)
    return [f"`quantpress check http://127.0.0.1:PORT --reference {REFERENCE}` holds the running server to what the "
            "original and this artifact answered when it was evaluated."]  # fmt: skip


def _write(folder: Path, deployment: Deployment, host: str, notes: Sequence[str]) -> None:
    files = {"serve.sh": serve_sh(deployment, host), "compose.yaml": compose(deployment, host)}
    if deployment.clustered:
        files["kubernetes.yaml"] = kubernetes(deployment)
    files["README.md"] = _readme(deployment, host, notes)
    for name, text in (files | deployment.files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "serve.sh").chmod(0o755)


def _readme(deployment: Deployment, host: str, notes: Sequence[str]) -> str:
    rows = "\n".join(f"| {what} | {figure} |" for what, figure in _resource_rows(deployment.resources))
    cluster = "\n    kubectl apply -f kubernetes.yaml          # once this folder's contents are in the volume claim"
    cluster = cluster if deployment.clustered else ""
    return f"""# {deployment.name} on {deployment.title}

    sha256sum --check SHA256SUMS              # the files are intact
    ./serve.sh                                # needs {deployment.needs}
    docker compose up                         # or in a container: {deployment.image}{cluster}

It listens on {host}, port {deployment.port}, without authentication: where others can reach it, put a proxy that asks
for a password in front of it. It is ready once `GET {deployment.health}` answers 200. A request:

    {deployment.probe}

| needs | |
|---|--:|
{rows}

Shards are hard links to the artifact's where the file system allows: modify neither in place.
""" + "".join(f"\n{note}\n" for note in notes)


def _resource_rows(resources: Resources) -> list[tuple[str, str]]:
    """The rows of the README's table of what serving takes."""
    return [
        ("weights", size(resources.weights_bytes)),
        ("cache of one token", size(resources.kv_bytes_per_token)),
        (f"cache of {resources.tokens} tokens", size(resources.kv_bytes_per_token * resources.tokens)),
        (f"reserved on each of {resources.gpus} device(s) (assumed)", size(resources.runtime_bytes)),
        ("total, at most", size(resources.memory_bytes)),
    ]


def _record(
    target: ServerSettings, deployment: Deployment, model: ServedModel, converted_from: str | None, artifact: Path
) -> dict[str, Any]:
    """export.json: the exported folder in machine-readable form."""
    manifest = artifact / MANIFEST
    return {
        "schema": 1,
        "name": deployment.name,
        "target": target.model_dump(mode="json"),
        "format": model.format,
        "converted_from": converted_from,
        "image": deployment.image,
        "command": deployment.in_container(),
        "environment": deployment.container_env(),
        "port": deployment.port,
        "health": deployment.health,
        "resources": deployment.resources.as_dict(),
        "artifact_manifest_sha256": file_sha256(manifest) if manifest.is_file() else None,
    }


def _known(run: Path, artifact: Path, source: Path) -> dict[str, str]:
    """The sha256 of shards that are the artifact's own, from its manifest, so that no export reads them again."""
    manifest = own_manifest(run) or own_manifest(artifact)
    files = {} if manifest is None else manifest.artifact.files
    return {f"model/{n}": d for n, d in files.items() if source == artifact and n.endswith(_SHARDS)}


def _sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS for `sha256sum --check`; known: sha256 of files that are not read for it."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    (folder / SUMS).write_bytes(sums({name: known.get(name) or file_sha256(folder / name) for name in names}))


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*") if file.suffix in _SHARDS)


def _name(run: Path, artifact: Path) -> str:
    """The name the model is served under: a DNS label made of the model's and the recipe's names."""
    manifest = own_manifest(artifact)
    words = [run.resolve().name]
    if manifest is not None:
        words = [Path(manifest.model.id).name.removesuffix(".gguf"), manifest.name]
    label = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") or "model"
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return label if len(label) <= 50 else f"{label[:41].rstrip('-')}-{digest}"


def _address(host: str) -> str:
    """The address, as the ipaddress module writes it; the zone of one of IPv6 is the name of an interface."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    zone = getattr(address, "scope_id", None)
    if address is None or (zone is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", zone)):
        raise BadInput(f"--host {host!r} is not an address; 127.0.0.1 is loopback, 0.0.0.0 everywhere")
    return str(address)
