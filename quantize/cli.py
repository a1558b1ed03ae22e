"""The command line: parse, call one function, one line on error. Exit codes: 0 fine, 1 failed, 2 bad input, 3 gate."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import recipe_file as recipes
from .errors import BadInput
from .recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One validated recipe from a Hugging Face checkpoint to a quantized, measured artifact.",
)
out_console, err_console = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)

RecipeArg = Annotated[str, typer.Argument(help="recipe file, or the name of a shipped one (quantpress recipes)")]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="folder, hub id org/name[@revision], .gguf file or smollm2-135m")
]
OutOpt = Annotated[Path | None, typer.Option("--out", help="run folder; default artifacts/<model>/<recipe>")]
SetOpt = Annotated[list[str], typer.Option("--set", help="override a recipe key: --set method.damp=0.02")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="replace what the run folder holds")]
LimitsOpt = Annotated[bool, typer.Option("--ignore-limits", help="run although memory or disk look too small")]
PickleOpt = Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights (they can run code)")]
TrustOpt = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the tokenizer")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
_INTERRUPTED = 130


@app.command()
def run(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    overwrite: OverwriteOpt = False,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Quantize, evaluate and report: the whole recipe."""
    chosen = _recipe(recipe, model, sets)
    where = out or _default_out(chosen)
    # Read before the work, so that a text that cannot be used does not cost a run.
    text = None if chosen.evaluation is None else _evaluation_text(chosen, allow_pickle, trust_remote_code)
    _quantize(chosen, where, overwrite, ignore_limits, allow_pickle, trust_remote_code)
    results = None if text is None else _evaluate(where, chosen, text, allow_pickle, trust_remote_code)
    from quantpress.eval.report import write_report

    page = write_report(where) if results is not None else None
    document = {"out": str(where), "report": None if page is None else str(page), "results": results}
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        _print_run(where, page, results)
    _exit_on_gates(results)


@app.command()
def quantize(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    out: OutOpt = None,
    sets: SetOpt = [],  # noqa: B006
    overwrite: OverwriteOpt = False,
    ignore_limits: LimitsOpt = False,
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Only the artifact: no evaluation, no report."""
    chosen = _recipe(recipe, model, sets)
    where = out or _default_out(chosen)
    _quantize(chosen, where, overwrite, ignore_limits, allow_pickle, trust_remote_code)
    out_console.print(f"artifact: {where / 'quantized'}")


@app.command()
def plan(
    recipe: RecipeArg = "w4a16-gptq",
    model: ModelOpt = None,
    sets: SetOpt = [],  # noqa: B006
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """What a run would need and make: schemes, bytes, memory, disk, time; and which servers would take it."""
    from quantpress.export.contracts import servability

    from .pipeline import prepare
    from .plan import size

    chosen = _recipe(recipe, model, sets)
    job = prepare(chosen, _source(chosen, allow_pickle, trust_remote_code))
    lints = servability(chosen.formats, {x.name: (x.out_features, x.in_features) for x in job.linears}, job.schemes,
                        shuffled=job.recipe.shuffled, activations=chosen.activations)  # fmt: skip
    if as_json:
        print(json.dumps(job.plan.as_dict() | {"servability": lints}))  # noqa: T201
        return
    table = Table("linears", "number", "scheme", box=None, pad_edge=False)
    kinds: dict[tuple[str, str], int] = {}
    for linear in job.linears:
        key = (linear.module, job.plan.layers[linear.name])
        kinds[key] = kinds.get(key, 0) + 1
    for (module, scheme), number in kinds.items():
        table.add_row(module, str(number), scheme)
    out_console.print(table)
    p = job.plan
    out_console.print(
        f"artifact {size(p.artifact_bytes)} (original {size(p.original_bytes)}), memory up to {size(p.memory_bytes)}, "
        f"disk up to {size(p.disk_bytes)}, about {max(1, round(p.seconds / 60))} min on this machine"
    )
    for line in (*p.notes, *lints):
        out_console.print(f"note: {line}")


@app.command("eval")
def evaluate_command(
    run_folder: Annotated[Path, typer.Argument(help="a run folder")],
    sets: SetOpt = [],  # noqa: B006
    allow_pickle: PickleOpt = False,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure a finished run again; --set evaluation.windows=32 changes how."""
    manifest = _manifest(run_folder)
    document = manifest["recipe"]
    for override in sets:
        recipes.apply_override(document, override)
    chosen = recipes.parse(document, str(run_folder / "manifest.json"))
    text = _evaluation_text(chosen, allow_pickle, trust_remote_code)
    results = _evaluate(run_folder, chosen, text, allow_pickle, trust_remote_code)
    if as_json:
        print(json.dumps(results))  # noqa: T201
    else:
        _print_results(results)
    _exit_on_gates(results)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="a run folder that has been evaluated")]) -> None:
    """Draw the page of a run again."""
    from quantpress.eval.report import write_report

    out_console.print(f"report: {write_report(run_folder)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one model, evaluated on the same text")],
    out: Annotated[Path, typer.Option("--out", help="folder for the page")] = Path("artifacts/comparison"),
) -> None:
    """Several runs on one page and one chart."""
    from quantpress.eval.report import write_comparison

    out_console.print(f"report: {write_comparison(runs, out)}")


@app.command()
def convert(
    artifact: Annotated[Path, typer.Argument(help="a quantized folder")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors or gptq")],
) -> None:
    """The same codes in another format, without loss; refused where that cannot be."""
    from .convert import convert as convert_folder

    convert_folder(artifact, out, to)
    out_console.print(f"artifact: {out}")


@app.command()
def verify(run_folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Check that the artifact's files are the ones the manifest names."""
    from .artifact import verify as verify_run

    out_console.print(f"verified: {verify_run(run_folder)} files are as the manifest says")


@app.command()
def schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))  # noqa: T201


@app.command("recipes")
def list_recipes() -> None:
    """The recipes that ship with quantpress."""
    table = Table("recipe", "what for", box=None, pad_edge=False)
    for name in recipes.shipped():
        table.add_row(name, recipes.load(name).description)
    out_console.print(table)


def main() -> None:
    """Run the command line; every mistake of the user's is one line and exit code 2."""
    # Before torch is there: its threads are not to spin while they wait, which on a busy machine costs more than work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:  # typer turns Ctrl-C into this status, without a word
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except BadInput as error:
        _fail(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail(_stopped(sys.argv[1:]), _INTERRUPTED)
    except Exception as error:
        if isinstance(error, _usage_error()):
            _fail(f"{error.format_message()} (see quantpress --help)", 2)  # type: ignore[attr-defined]
        raise


def _stopped(arguments: list[str]) -> str:
    if not {"run", "quantize"} & set(arguments[:1]):
        return "stopped"
    same = "the same command without --overwrite" if "--overwrite" in arguments else "the same command"
    return f"stopped; {same} goes on from what is finished"


def _usage_error() -> type[Exception]:
    from typer._click.exceptions import ClickException  # typer 0.2x carries its own click

    return ClickException


def _fail(message: str, code: int) -> None:
    err_console.print(f"quantpress: {' '.join(message.split())}", markup=False, soft_wrap=True)
    sys.exit(code)


def _recipe(where: str, model: str | None, sets: list[str]) -> Recipe:
    chosen = recipes.load(where, sets)
    return chosen if model is None else chosen.model_copy(update={"model": model})


def _default_out(recipe: Recipe) -> Path:
    name = Path(recipe.model).name.removesuffix(".gguf").replace("@", "-") or "model"
    return Path("artifacts") / name / recipe.name


def _cache() -> Path:
    from .sources import default_cache

    return Path(os.environ["QUANTPRESS_CACHE"]) if "QUANTPRESS_CACHE" in os.environ else default_cache()


def _source(recipe: Recipe, allow_pickle: bool, trust_remote_code: bool) -> Any:
    _quiet_libraries()
    from .machine import flush_denormals, return_freed_memory
    from .sources import resolve

    flush_denormals()
    return_freed_memory()
    return resolve(recipe.model, cache=_cache(), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _quantize(recipe: Recipe, out: Path, overwrite: bool, ignore_limits: bool, allow_pickle: bool, trust: bool) -> None:
    source = _source(recipe, allow_pickle, trust)
    from .pipeline import Settings, prepare
    from .pipeline import quantize as quantize_job

    job = prepare(recipe, source)
    with _bar("quantizing", job.skeleton.n_blocks) as advance:
        settings = Settings(
            out, _cache(), overwrite, ignore_limits, trust,
            lambda p: advance(p.block, "" if p.loss is None else f"error {p.loss:.2%}"),
            lambda line: err_console.print(f"note: {line}", markup=False, soft_wrap=True),
        )  # fmt: skip
        manifest = quantize_job(job, settings)
    for line in manifest["fallbacks"]:
        err_console.print(f"note: {line}", markup=False)


def _evaluation_text(recipe: Recipe, allow_pickle: bool, trust: bool) -> Any:
    if recipe.evaluation is None:
        raise BadInput("the recipe has `evaluation: null`; --set evaluation={} measures with the defaults")
    source = _source(recipe, allow_pickle, trust)
    from quantpress.eval.measure import evaluation_text

    return evaluation_text(source.path, recipe.evaluation, _cache(), trust)


def _evaluate(out: Path, recipe: Recipe, text: Any, allow_pickle: bool, trust: bool) -> dict[str, Any]:
    from quantpress.eval.measure import evaluate

    from .checkpoint import write_json

    source = _source(recipe, allow_pickle, trust)
    done = 0
    with _bar("evaluating", 0) as advance:

        def on_block(total: int) -> None:
            nonlocal done
            done += 1
            advance(done, "", total)

        results = evaluate(source.path, out / "quantized", text, recipe.gates, on_block)
    (out / "eval").mkdir(exist_ok=True)
    write_json(out / "eval" / "results.json", results)
    return results


@contextmanager
def _bar(what: str, blocks: int) -> Iterator[Callable[..., None]]:
    """Progress with time left and memory on a terminal; a plain line now and then elsewhere."""
    from .machine import rss_bytes
    from .plan import size

    if not err_console.is_terminal:
        told = 0

        def plain(done: int, note: str, total: int = blocks) -> None:
            nonlocal told
            if done * 5 // total > told * 5 // total or done == total:
                err_console.print(f"{what} block {done}/{total} {note} {size(rss_bytes())}".replace("  ", " "))
            told = done

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("block {task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                  console=err_console, transient=True) as progress:  # fmt: skip
        task = progress.add_task(what, total=blocks or None, note="")

        def advance(done: int, note: str, total: int = blocks) -> None:
            progress.update(task, completed=done, total=total, note=f"{note} {size(rss_bytes())}")

        yield advance


def _manifest(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "manifest.json"
    if not path.is_file():
        raise BadInput(f"{run_folder} holds no finished run (no manifest.json)")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _print_run(where: Path, page: Path | None, results: dict[str, Any] | None) -> None:
    if results is not None:
        _print_results(results)
    out_console.print(f"artifact    {where / 'quantized'}")
    if page is not None:
        out_console.print(f"report      {page}")
    out_console.print(f"provenance  {where / 'manifest.json'}")


def _print_results(results: dict[str, Any]) -> None:
    from .plan import size

    before, after, away = results["original"], results["artifact"], results["divergence"]
    out_console.print(
        f"perplexity  {before['perplexity']:.3f} -> {after['perplexity']:.3f} ({results['perplexity_increase']:+.2%})\n"
        f"divergence  KL {away['kl_mean']:.4f} nats, top-1 agreement {away['top1_agreement']:.1%}\n"
        f"weights     {size(before['bytes'])} -> {size(after['bytes'])}"
    )
    for check in results["gates"]["checks"]:
        sign = "ok  " if check["passed"] else "MISS"
        out_console.print(f"gate {sign}   {check['name']} {check['value']:.6g} (limit {check['limit']:.6g})")


def _exit_on_gates(results: dict[str, Any] | None) -> None:
    if results is not None and results["gates"]["verdict"] == "REGRESSION":
        raise typer.Exit(3)


def _quiet_libraries() -> None:
    """Our own progress and messages are the ones to read."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
