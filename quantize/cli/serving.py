"""The commands that hand an artifact to a server: export, verify (would it load?) and smoke (does it work?)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..core.text import meant
from .app import app
from .options import (
    AllowOpt,
    JsonOpt,
    OverwriteOpt,
    ServerPythonOpt,
    SetOpt,
    SignOpt,
    TargetOpt,
    make_options,
    names,
    quiet_libraries,
    signer,
    with_options,
)
from .printing import followed, print_check, print_json, print_serving, say, show

if TYPE_CHECKING:
    from ..api import Verification

_WAYS = ("server", "parser", "contract")
_SHOWN = 8  # problems printed: a config that was edited is wrong about every layer


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="a run folder, or an artifact folder")],
    target: TargetOpt = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="where; default: RUN/export/<target>")] = None,
    host: Annotated[str, typer.Option("--host", help="the address to listen on")] = "127.0.0.1",
    sets: SetOpt = [],  # noqa: B006
    sign: SignOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write folders that servers start from: the model in a format they load, launch files, checksums."""
    from quantpress.eval.release.session import choose_targets

    from .. import api

    targets = choose_targets(run_folder, names(target), sets)
    done = api.export(run_folder, targets, out, host=host, overwrite=overwrite, signer=signer(sign))
    if as_json:
        print_json({
            name: {"folder": str(made.folder), "format": made.format, "converted_from": made.converted_from}
            for name, made in done.items()
        })  # fmt: skip
        return
    for name, made in done.items():
        how = f"converted from {made.converted_from}" if made.converted_from else "as it is"
        show(f"{name}: {made.folder} ({made.format}, {how})")


@app.command()
@with_options("allow_pickle")
def verify(
    where: Annotated[Path, typer.Argument(help="a run folder, an artifact folder or an exported one")],
    target: TargetOpt = [],  # noqa: B006
    sets: SetOpt = [],  # noqa: B006
    server_python: ServerPythonOpt = None,
    way: Annotated[str | None, typer.Option(help="server, parser or contract; default: the strongest there is")] = None,
    original: Annotated[
        str | None,
        typer.Option("--original", help="what it was made from; default: what its manifest names, if it is here"),
    ] = None,
    no_forward: Annotated[
        bool, typer.Option("--no-forward", help="without the original: no short forward pass in its place")
    ] = False,
    allow: AllowOpt = [],  # noqa: B006
    key: Annotated[
        str | None, typer.Option("--key", help="minisign's public key, or its file, that has to have signed SHA256SUMS")
    ] = None,
    as_json: JsonOpt = False,
    options: Options = Options(),
) -> None:
    """Check checksums, every tensor against config and model, every weight against the original; with --target also
    whether a server would load it.

    Says what it compared, and what it did not and why. Exit code 1 when something is wrong.
    """
    if way is not None and way not in _WAYS:
        raise BadInput(f"--way {way!r}{meant(way, _WAYS)} (known: {', '.join(_WAYS)})")
    idle = [name for name, given in (("--set", sets), ("--way", way), ("--server-python", server_python)) if given]
    if idle and not target:
        raise BadInput(f"{', '.join(idle)}: of a target, and none is given; add --target, such as --target vllm")
    quiet_libraries()
    from quantpress.eval.release.session import choose_targets

    from .. import api

    targets = choose_targets(where, names(target), sets) if target else ()
    with followed() as callbacks:
        found = api.verify(
            where, targets, python=server_python, way=cast(Literal["server", "parser", "contract"] | None, way),
            allow=allow, original=original, forward=not no_forward, key=key, options=options,
            callbacks=callbacks,
        )  # fmt: skip
    if as_json:
        loads = {name: asdict(answer) for name, answer in found.loads.items()}
        print_json({"files": found.files, "problems": found.problems, "reached": found.reached,
                    "not_reached": found.not_reached, "loads": loads})  # fmt: skip
    else:
        _print_verified(found)
    if not found.sound:
        raise typer.Exit(1)


def _print_verified(found: "Verification") -> None:
    for line in found.problems[:_SHOWN]:
        say(f"wrong: {line}")
    if found.problems[_SHOWN:]:
        say(f"wrong: and {len(found.problems) - _SHOWN} more, which --json lists")
    if not found.problems:
        show("verified: " + "\n  and ".join(found.reached))
        for line in found.not_reached:
            show(f"  not compared: {line}")
    for name, answer in found.loads.items():
        show(f"{name}: {'loads' if answer.loads else 'does not load'}, by {answer.by}")
        if answer.reason:
            show(f"  {answer.reason}")
        for line in answer.passed_over:
            show(f"  (passed over: {line})")


@app.command()
def check(
    url: Annotated[str, typer.Argument(help="a server that already runs: http://host:port")],
    reference: Annotated[
        Path, typer.Option("--reference", help="reference.json, or the folder of the export or run that holds it")
    ] = Path(),
    model: Annotated[str | None, typer.Option("--model", help="its name there; default: the first listed")] = None,
    rounds_inputs: Annotated[
        bool | None,
        typer.Option(
            help="its kernel rounds inputs to int8: vLLM's of 4 bits, on a CPU with AMX; default: as on this machine, "
            "if it runs here"
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Hold a served model to what the original and the artifact answered when it was evaluated: no weights are needed.

    Tokens, chat template, distributions, a paragraph's perplexity, where answers end. Exit code 1 when one differs.
    """
    from quantpress.exports.serving.reference import read_reference
    from quantpress.exports.serving.served_check import check_served

    tell = (lambda check: None) if as_json else print_check
    said, key = read_reference(reference), make_options().api_key
    found = check_served(url, said, model, key, tell, rounds_inputs=rounds_inputs)
    if as_json:
        verdict = "PASSED" if found.passed else "FAILED"
        checks = [one.model_dump(mode="json") for one in found.checks]
        print_json({"verdict": verdict, "checks": checks, "against": found.against.model_dump(mode="json")})
    else:
        show(f"{'verdict':<12} {'PASSED' if found.passed else 'FAILED'}")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
@with_options("although_changed")
def smoke(
    artifact: Annotated[
        Path,
        typer.Argument(help="a run folder, a quantized folder, a .gguf file, or RUN/export/<target>: its container"),
    ],
    server: Annotated[
        str | None,
        typer.Option(
            "--server", help="vllm, llama.cpp, transformers or url; any other target starts in Docker, from its export"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="a server that already runs: http://host:port")] = None,
    server_python: ServerPythonOpt = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at a time; default: 4")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of prompt and answer")] = None,
    deadline: Annotated[float | None, typer.Option(help="seconds to become healthy; default: 600")] = None,
    load: Annotated[bool, typer.Option("--load", help="also a minute of requests at a fixed rate")] = False,
    rate: Annotated[float, typer.Option("--rate", min=0.01, help="requests a second, with --load")] = 1.0,
    original: Annotated[
        Path | None, typer.Option("--original", help="with --load: a model to put under the same load after it")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder for eval/serving.json and the log")] = None,
    as_json: JsonOpt = False,
    options: Options = Options(),
) -> None:
    """Start a real server on the artifact, check it, compare it with our own forward pass, time it, end it.

    What is not given is as the run's recipe has it. Exit code 0 when every check passed, 1 when one failed.
    """
    changes: dict[str, Any] = {"server": server, "url": url, "python": server_python, "concurrency": concurrency,
                               "max_model_len": max_model_len, "deadline_s": deadline}  # fmt: skip
    changes = {key: value for key, value in changes.items() if value is not None}
    if original is not None and not load:
        raise BadInput("--original: of a test under load; add --load")
    quiet_libraries()
    from quantpress.exports.serving.load import Wanted

    from .. import api

    with followed(quiet=as_json) as callbacks:
        wanted = Wanted(rate=rate) if load else None
        record = api.smoke(artifact, changes, out, options, callbacks, wanted, original)
    if as_json:
        print_json(record.model_dump(mode="json", by_alias=True))
    else:
        print_serving(record, "eval/serving.json")
    if record.verdict == "FAILED":
        raise typer.Exit(1)
