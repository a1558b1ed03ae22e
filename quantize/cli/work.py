"""The stages behind the commands: quantize, measure, and what is printed of them."""

from pathlib import Path
from typing import Any

import typer

from ..errors import BadInput
from ..recipe import Recipe
from .shared import cache_folder, err_console, open_source, out_console, progress_bar


def quantize_model(
    recipe: Recipe, out: Path, overwrite: bool, ignore_limits: bool, allow_pickle: bool, trust: bool
) -> None:
    source = open_source(recipe, allow_pickle, trust)
    from quantpress.export.contracts import check_job

    from ..pipeline import Settings, prepare
    from ..pipeline import quantize as quantize_job

    job = prepare(recipe, source)
    check_job(job)
    with progress_bar("quantizing", job.skeleton.n_blocks) as advance:
        settings = Settings(
            out, cache_folder(), overwrite, ignore_limits, trust,
            lambda p: advance(p.block, "" if p.loss is None else f"error {p.loss:.2%}"),
            lambda line: err_console.print(f"note: {line}", markup=False, soft_wrap=True),
        )  # fmt: skip
        manifest = quantize_job(job, settings)
    for line in manifest["fallbacks"]:
        err_console.print(f"note: {line}", markup=False)


def evaluation_windows(recipe: Recipe, allow_pickle: bool, trust: bool) -> Any:
    if recipe.evaluation is None:
        raise BadInput("the recipe has `evaluation: null`; --set evaluation={} measures with the defaults")
    source = open_source(recipe, allow_pickle, trust)
    from quantpress.eval.measure import evaluation_text

    return evaluation_text(source.path, recipe.evaluation, cache_folder(), trust)


def measure(out: Path, recipe: Recipe, text: Any, allow_pickle: bool, trust: bool) -> dict[str, Any]:
    from quantpress.eval.measure import evaluate

    from ..files import write_json

    source = open_source(recipe, allow_pickle, trust)
    done = 0
    with progress_bar("evaluating", 0) as advance:

        def on_block(total: int) -> None:
            nonlocal done
            done += 1
            advance(done, "", total)

        results = evaluate(source.path, out / "quantized", text, recipe.gates, on_block)
    (out / "eval").mkdir(exist_ok=True)
    write_json(out / "eval" / "results.json", results)
    return results


def print_results(results: dict[str, Any]) -> None:
    from ..plan import size

    before, after, away = results["original"], results["artifact"], results["divergence"]
    out_console.print(
        f"perplexity  {before['perplexity']:.3f} -> {after['perplexity']:.3f} ({results['perplexity_increase']:+.2%})\n"
        f"divergence  KL {away['kl_mean']:.4f} nats, top-1 agreement {away['top1_agreement']:.1%}\n"
        f"weights     {size(before['bytes'])} -> {size(after['bytes'])}"
    )
    for check in results["gates"]["checks"]:
        sign = "ok  " if check["passed"] else "MISS"
        out_console.print(f"gate {sign}   {check['name']} {check['value']:.6g} (limit {check['limit']:.6g})")


def exit_on_gates(results: dict[str, Any] | None) -> None:
    if results is not None and results["gates"]["verdict"] == "REGRESSION":
        raise typer.Exit(3)
