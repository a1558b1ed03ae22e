"""A target's folder: the artifact in a format that the target loads, and the files that an operator starts it with."""

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.artifact.convert import convert
from quantpress.artifact.manifest import MANIFEST, own_manifest
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256, whole_folder, write_json
from quantpress.formats import FORMATS
from quantpress.gguf.chat import template_arguments
from quantpress.gguf.reader import gguf_files
from quantpress.recipe import READERS, Drafting, Ollama, Target, reader_notes

from . import contracts, resources, speculation
from .deployment import Deployment, Server, compose, kubernetes, serve_sh
from .servers import llama_cpp, ollama, sglang, tensorrt_llm, tgi, triton, vllm

LOOPBACK = "127.0.0.1"
_RECORD = "export.json"
_SHARDS = (".safetensors", ".gguf")
SERVERS: dict[str, Callable[[Any, Deployment], Server]] = {
    "vllm": vllm.server,
    "sglang": sglang.server,
    "tgi": tgi.server,
    "tensorrt-llm": tensorrt_llm.server,
    "triton": triton.server,
    "llama.cpp": llama_cpp.server,
    "ollama": ollama.server,
}


@dataclass(frozen=True)
class Exported:
    """folder: what was written; format: of the model in it; converted_from: None for the artifact as it is."""

    folder: Path
    format: str
    converted_from: str | None


def export(
    run: Path, target: Target, out: Path | None = None, *, host: str = LOOPBACK, overwrite: bool = False
) -> Exported:
    """Write the folder of `target`, `run/export/<target>` unless `out` says otherwise.

    run: a run folder or an artifact folder; host: the address to listen on. Shards are hard links to the artifact's
    where the file system allows. Raises BadInput, before a byte is written, for an artifact that the target cannot
    load, a folder that is there, or with `overwrite` one that no export has made, and a host that is no address.
    """
    host = _address(host)
    named = out or run / "export" / target.name
    _check_replaceable(named, overwrite)
    folder = named.resolve()  # one called `.` has no name to put another beside, and a link is not to be replaced
    artifact = find_artifact(run)
    source, to = _loadable(run, artifact, target)
    name = _name(run, artifact)
    accepted = speculation.measured(run, artifact)
    ready = folder.with_name(f".{folder.name}.new")  # what is there stays until its successor is whole
    shutil.rmtree(ready, ignore_errors=True)
    with whole_folder(ready) as new:
        model = new / "model"
        _place(source, model, to)
        contents = contracts.of_folder(model)
        needed = resources.of_contents(target, contents, _weights_bytes(model))
        file = next((gguf.name for gguf in gguf_files(model)), "")
        told = file and (model / "tokenizer_config.json").is_file()  # a file by itself brings none
        template = template_arguments(open_tokenizer(model)) if told else {}
        deployment = Deployment(name, needed, contents.kv_cache, file, template, contents.named_positions)
        server = SERVERS[target.name](target, deployment)
        if isinstance(target, Ollama):
            given = model / "Modelfile"
            said = given.read_text(encoding="utf-8") if given.exists() else None
            given.write_text(ollama.modelfile(file, said, target), encoding="utf-8")
        kinds = reader_notes(target.reader, contents.format, contents.grids, contents.activations)
        notes = [*server.notes, *(f"{line}." for line in kinds)]
        converted_from = None if to is None else contracts.of_folder(source).format
        record = _record(target, server, contents, converted_from, artifact)
        if isinstance(target, Drafting) and target.draft_for is not None:
            notes += speculation.notes(run, target.draft_for, target.draft_tokens, accepted)
            record["draft"] = speculation.facts(accepted, target.draft_tokens)
        _write(new, server, host, notes)
        write_json(new / _RECORD, record)
        _sums(new, {} if to is not None else _known(run, artifact, source))
    if folder.exists():
        shutil.rmtree(folder)
    ready.rename(folder)
    return Exported(named, contents.format, converted_from)


def check(run: Path, target: Target) -> None:
    """Raise BadInput for what `export` would refuse of the artifact."""
    _loadable(run, find_artifact(run), target)


def find_artifact(run: Path) -> Path:
    """The artifact folder of a run, or the folder itself; raises BadInput for one that is neither."""
    if not run.is_dir():
        raise BadInput(f"{run}: no such folder")
    for folder in (run / "quantized", run):
        if (folder / "config.json").is_file() or gguf_files(folder):
            return folder
    raise BadInput(f"{run} holds no artifact (neither a quantized folder with a config.json nor a model.gguf)")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise BadInput for what is there and may not be removed."""
    if not folder.exists():
        return
    if not overwrite:
        raise BadInput(f"{folder} exists; give --out another folder, or --overwrite")
    if (folder / _RECORD).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise BadInput(f"{folder} is not the folder of an export (no {_RECORD}) and is kept; give --out another folder")


def _loadable(run: Path, artifact: Path, target: Target) -> tuple[Path, str | None]:
    """A folder that `target` loads, and the format it has to be converted to first, if any.

    The artifact as it is comes first, then what the run has converted, then every format that holds the same exactly.
    """
    contents = contracts.of_folder(artifact)
    refused = contracts.problems(target, contents)
    if not refused:
        return artifact, None
    readable = READERS[target.reader].formats
    for other in readable:
        done = run / "converted" / other
        if (done / "config.json").is_file() and not contracts.problems(target, contracts.of_folder(done)):
            return done, None
    for other in readable:
        if (
            "gguf" not in (other, contents.format)  # its numbers are its own
            and other in FORMATS
            and contents.format in FORMATS
            and other != contents.format
            and not contracts.problems(target, contents.in_format(other))
        ):
            return artifact, other
    raise BadInput(contracts.sentence(refused))


def _place(source: Path, model: Path, to: str | None) -> None:
    """The model's files in `model`: converted, or shards linked and the rest copied."""
    if to is not None:
        convert(source, model, to)
        return
    model.mkdir()
    for file in sorted(source.rglob("*")):
        there = model / file.relative_to(source)
        if file.is_dir():
            there.mkdir()
        elif file.suffix in _SHARDS:
            link_or_copy(file, there)
        else:
            shutil.copy2(file, there)


def link_or_copy(file: Path, there: Path) -> None:
    """A hard link where both lie on one file system that has them, else a copy."""
    try:
        os.link(file, there)
    except OSError:
        shutil.copy2(file, there)


def _write(folder: Path, server: Server, host: str, notes: Sequence[str]) -> None:
    files = {"serve.sh": serve_sh(server, host), "compose.yaml": compose(server, host)}
    if server.clustered:
        files["kubernetes.yaml"] = kubernetes(server)
    files["README.md"] = _readme(server, host, notes)
    for name, text in (files | server.files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "serve.sh").chmod(0o755)


def _readme(server: Server, host: str, notes: Sequence[str]) -> str:
    rows = "\n".join(f"| {what} | {figure} |" for what, figure in resources.words(server.resources))
    cluster = "\n    kubectl apply -f kubernetes.yaml          # after this folder's contents are in the claim"
    return f"""# {server.name} on {server.title}

    sha256sum --check SHA256SUMS              # the files are whole
    ./serve.sh                                # needs {server.needs}
    docker compose up                         # or in a container: {server.image}{cluster if server.clustered else ""}

It listens on {host}, port {server.port}, without a password: put a proxy that asks for one before it where others
can reach it. It is ready once `GET {server.health}` answers 200. A request:

    {server.probe}

| needs | |
|---|--:|
{rows}

Shards are hard links to the artifact's where the file system allows: change neither in place.
""" + "".join(f"\n{note}\n" for note in notes)


def _record(
    target: Target, server: Server, contents: contracts.Contents, converted_from: str | None, artifact: Path
) -> dict[str, Any]:
    """export.json: what a machine wants to know of the folder."""
    manifest = artifact / MANIFEST
    return {
        "schema": 1,
        "name": server.name,
        "target": target.model_dump(mode="json"),
        "format": contents.format,
        "converted_from": converted_from,
        "image": server.image,
        "command": server.in_container(),
        "environment": server.container_env(),
        "port": server.port,
        "health": server.health,
        "resources": server.resources.as_dict(),
        "artifact_manifest_sha256": file_sha256(manifest) if manifest.is_file() else None,
    }


def _known(run: Path, artifact: Path, source: Path) -> dict[str, str]:
    """The sha256 of shards that are the artifact's own, from its manifest: every target need not read them again."""
    manifest = own_manifest(run) or own_manifest(artifact)
    files = {} if manifest is None else manifest.artifact.files
    return {f"model/{n}": d for n, d in files.items() if source == artifact and n.endswith(_SHARDS)}


def _sums(folder: Path, known: Mapping[str, str]) -> None:
    """SHA256SUMS, as sha256sum --check reads it; known: of files that need not be read for it."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    lines = [f"{known.get(name) or file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*") if file.suffix in _SHARDS)


def _name(run: Path, artifact: Path) -> str:
    """What the served model is called: a DNS label of the model's and the recipe's name."""
    manifest = own_manifest(artifact)
    words = [run.resolve().name]
    if manifest is not None:
        words = [Path(manifest.model.id).name.removesuffix(".gguf"), manifest.name]
    label = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") or "model"
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return label if len(label) <= 50 else f"{label[:41].rstrip('-')}-{digest}"


def _address(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise BadInput(f"--host {host!r} is not an address; 127.0.0.1 is loopback, 0.0.0.0 everywhere") from None
