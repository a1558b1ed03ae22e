"""The command that puts an artifact on a real server, and the last stage of a run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from quantpress.eval.release.ledger import Ledger
from quantpress.exports.servers import SERVERS

from ..artifact.manifest import MANIFEST, own_manifest
from ..core.errors import BadInput
from ..core.files import alone_in
from ..recipe import Smoke
from ..recipe import loading as recipes
from .app import app
from .options import JsonOpt, cache_folder, err_console, out_console, quiet_libraries

if TYPE_CHECKING:
    from quantpress.exports.serving import Check, Serving

_SIGNS = {"pass": "pass", "fail": "[bold red]FAIL[/]", "skip": "skip"}
_API_KEY = "QUANTPRESS_API_KEY"
_IN_CONTAINERS = tuple(name for name, server in SERVERS.items() if server.launcher is None)  # started as exported


@app.command("smoke")
def smoke_command(
    artifact: Annotated[
        Path,
        typer.Argument(help="a run folder, a quantized folder, a .gguf file, or RUN/export/<target>: its container"),
    ],
    server: Annotated[
        str | None,
        typer.Option("--server", help=f"vllm, llama.cpp, transformers, url; in Docker {', '.join(_IN_CONTAINERS)}"),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="a server that already runs: http://host:port")] = None,
    server_python: Annotated[str | None, typer.Option(help="the interpreter that has the server")] = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at a time; default 4")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of prompt and answer")] = None,
    deadline: Annotated[float | None, typer.Option(help="seconds to become healthy; default 600")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder for eval/serving.json and the log")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Start a real server on the artifact, check it, compare it with our own forward, time it, end it.

    What is not given is as the run's recipe has it. Exit code 0 when every check passed, 1 when one failed.
    """
    if server in _IN_CONTAINERS:
        artifact, server = _exported(artifact, server), None
    exported = artifact if (artifact / "export.json").is_file() else None
    container = exported if server is None and url is None else None
    where, run_folder = _found(artifact)
    given = {"server": server, "url": url, "python": server_python, "concurrency": concurrency,
             "max_model_len": max_model_len, "deadline_s": deadline}  # fmt: skip
    settings = _settings(run_folder, where, {key: value for key, value in given.items() if value is not None})
    into = out or run_folder or Path("artifacts") / where.stem / "smoke"
    with alone_in(into):
        if (into / MANIFEST).is_file():
            Ledger(into).forget("smoke")  # what is tried now may be on other terms than the recipe's
        record = smoke_stage(where, into, settings, container=container, exported=exported, quiet=as_json)
    if as_json:
        print(record.model_dump_json(by_alias=True))  # noqa: T201
    if record.verdict == "FAILED":
        raise typer.Exit(1)


def smoke_stage(
    artifact: Path,
    out: Path,
    settings: Smoke,
    quiet: bool = False,
    container: Path | None = None,
    exported: Path | None = None,
) -> "Serving":
    """The smoke test as a stage of a run: tells its progress, writes `out/eval/serving.json`, returns the record.

    container: an export folder whose compose.yaml starts the server, in place of settings.server; exported: one that
    the server at settings.url was started from.
    """
    quiet_libraries()
    from quantpress.exports.serving import Listener, Options, composed, lacking, smoke

    options = Options(
        settings.python, settings.url, settings.concurrency, settings.max_model_len, settings.deadline_s,
        os.environ.get(_API_KEY), lacking(exported) if exported is not None and settings.url is not None else {},
    )  # fmt: skip

    def say(line: str) -> None:
        err_console.print(line, markup=False, soft_wrap=True)

    listener = Listener(say) if quiet else Listener(say, _tell)
    server = settings.server if container is None else composed(container)
    record = smoke(artifact, server, out, options, cache_folder(), listener)
    if not quiet:
        _print(record, out)
    return record


def _exported(path: Path, target: str) -> Path:
    """The export folder of a run for a server that is started in a container."""
    folder = path / "export" / target
    if not (folder / "export.json").is_file():
        raise BadInput(
            f"{target} is started from {folder}, which is not there: `quantpress export {path} --target {target}` "
            "writes it; for one that already runs give --server url --url http://host:port"
        )
    return folder


def served(folder: Path) -> Path:
    """What a server is given of an artifact: the folder, or its .gguf file, of a split one the first part."""
    from ..gguf.reader import gguf_files

    files = gguf_files(folder)
    return files[0] if files else folder


def _found(path: Path) -> tuple[Path, Path | None]:
    """The artifact that `path` means (a folder or a .gguf file), and its run folder when it lies in one."""
    if not path.exists():
        raise BadInput(f"{path}: no such run folder or artifact")
    inside = [path / name for name in ("quantized", "model") if (path / name).is_dir()]
    artifact = inside[0] if inside else path
    if artifact.is_dir():
        artifact = served(artifact)
    if artifact.is_dir() and not (artifact / "config.json").is_file():
        raise BadInput(f"{path}: neither a run folder nor an artifact (no config.json and no model.gguf)")
    if artifact.is_file() and artifact.suffix != ".gguf":
        raise BadInput(f"{path}: an artifact is a folder or a .gguf file")
    above = list(artifact.absolute().parents)[:4]  # RUN/export/<target>/model/model.gguf
    runs = [folder for folder in above if (folder / MANIFEST).is_file() and (folder / "quantized").is_dir()]
    return artifact, path if (path / "quantized").is_dir() else next(iter(runs), None)


def _settings(run_folder: Path | None, artifact: Path, given: dict[str, Any]) -> Smoke:
    """The recipe's settings under what the command line says; without a recipe the server that reads such a file."""
    manifest = None if run_folder is None else own_manifest(run_folder)
    recipe = {} if manifest is None else manifest.recipe
    base = recipe.get("smoke") or {"server": "llama.cpp" if artifact.suffix == ".gguf" else "vllm"}
    if "url" in given:
        given = {"server": "url"} | given
    if given.get("server", base["server"]) != base["server"]:  # its interpreter and address are not another's
        base = {key: value for key, value in base.items() if key not in ("python", "url")}
    chosen = recipes.parse({"smoke": base | given}, "of the smoke test").smoke
    assert chosen is not None
    return chosen


def _tell(check: "Check") -> None:
    out_console.print(f"{_SIGNS[check.status]}  {check.name:<11} {check.seconds:6.1f} s  {escape(check.reason)}")


def _print(record: "Serving", out: Path) -> None:
    from ..engine.plan import size

    first, between = record.ttft_ms, record.itl_ms
    rows = {
        "server": f"{record.server} {record.version or ''}",
        "loaded in": None if record.load_seconds is None else f"{record.load_seconds:.1f} s",
        "first token": None if first is None else f"{first:.0f} ms after {record.prompt_tokens} tokens",
        "next tokens": None if between is None else
        f"{between.p50:.1f} ms; p95 {between.p95:.1f}, p99 {between.p99:.1f}",
        "tokens/s": ", ".join(f"{rate:.1f} at {n}" for n, rate in record.tokens_per_second.items()) or None,
        "peak memory": None if record.peak_rss_bytes is None else size(record.peak_rss_bytes),
        "record": str(out / "eval" / "serving.json"),
        "verdict": record.verdict,
    }  # fmt: skip
    for name, value in rows.items():
        if value is not None:
            out_console.print(f"{name:<12} {value}", markup=False)
