"""The command `fit`: the best recipe for a model, a memory and a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..core.schema import Bytes, Fraction
from .app import app
from .options import JsonOpt, quiet_libraries, with_options
from .printing import followed, print_json, say, show, show_table

if TYPE_CHECKING:
    from quantpress.eval.release.fit import Option, Proposal
    from quantpress.eval.release.recommend import Recommendation


@app.command()
@with_options("overwrite", "ignore_limits", "allow_pickle", "trust_remote_code")
def fit(
    options: Options,
    model: Annotated[str, typer.Argument(help="folder, config.json, hub id, .gguf file or smollm2-135m")],
    target: Annotated[str, typer.Option("--target", help="the server: vllm, sglang, llama.cpp, …")] = "vllm",
    memory: Annotated[str | None, typer.Option("--memory", help="such as 24GiB; default: the GPU's")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="its number types count: L4, L40S, A100 80GB, …")] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=16, help="tokens per sequence; default: 8192, or all of fewer")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="sequences at a time")] = 1,
    min_recovery: Annotated[
        str | None, typer.Option("--min-recovery", help="of the original's quality, such as 99%")
    ] = None,
    write: Annotated[Path, typer.Option("--write", help="the recipe file to write")] = Path("fit.yaml"),
    measure: Annotated[
        bool, typer.Option("--run", help="make and measure it, and the next one where it does not hold")
    ] = False,
    config_only: Annotated[bool, typer.Option("--config-only", help="the model is a config.json")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Propose the best recipe for a memory and a server, from config and headers; exit code 1 if nothing fits."""
    quiet_libraries()
    from quantpress.eval.release.fit import run_in_turn, written

    from .. import api

    if write.is_dir():
        raise BadInput(f"--write {write}: a folder; give the file to write")
    write.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    found = api.fit(
        model, target, memory=_read(Bytes, "memory", memory), gpu=gpu, context=context, concurrency=concurrency,
        min_recovery=_read(Fraction, "min-recovery", min_recovery), options=options, config_only=config_only,
    )  # fmt: skip
    chosen, measured = found.choice, list[dict[str, Any]]()
    if measure and chosen is not None:

        def make(option: "Option") -> Path:
            with followed(quiet=as_json) as callbacks:
                return api.run(option.document, options=options, callbacks=callbacks).out

        def told(option: "Option", result: "Recommendation") -> None:
            because = result.why if result.choice else tuple(reason for _, reason in result.others)
            measured.append({"name": option.name, "holds": result.choice is not None, "why": because})
            say(f"{option.name}: {'holds' if result.choice else 'does not hold'}: {'; '.join(because)}")

        chosen = run_in_turn(found, make, told)
    file = None if chosen is None else written(found, chosen, write, measured=measure)
    why = found.why(chosen, measured=measure)
    if as_json:
        print_json(_document(found, chosen, why) | {"measured": measured, "file": file and str(file)})
    else:
        _print(found, chosen, why, file)
    if chosen is None:
        raise typer.Exit(1)


def _read(kind: Any, option: str, value: str | None) -> Any:
    if value is None:
        return None
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise BadInput(f"--{option}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _document(found: "Proposal", chosen: "Option | None", why: list[str]) -> dict[str, Any]:
    considered = [vars(one) | {"chosen": one is chosen} for one in found.options]
    sizes = {"room_bytes": found.room, "cache_bytes": found.cache_bytes, "original_bytes": found.original_bytes}
    return {"choice": chosen and chosen.name, "why": why} | sizes | {"considered": considered}


def _print(found: "Proposal", chosen: "Option | None", why: list[str], file: Path | None) -> None:
    show("nothing fits" if chosen is None else f"take {chosen.name}: {file}")
    for line in why:
        show(f"  {line}")
    show_table(("considered", ""), [(one.name, one.why) for one in found.options if one is not chosen])
