"""What the commands share: their options, a recipe and a model opened, progress, where things go."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..recipe import Recipe
from ..recipe import loading as recipes

_SILENCE_SECONDS = 60  # longest without a word where there is no bar, if a block has been finished

out_console, err_console = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)

RecipeArg = Annotated[str, typer.Argument(help="recipe file, or the name of a shipped one (quantpress recipes)")]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="folder, hub id org/name or org/name@revision, .gguf file or smollm2-135m")
]
OutOpt = Annotated[Path | None, typer.Option("--out", help="run folder; default artifacts/<model>/<recipe>")]
SetOpt = Annotated[list[str], typer.Option("--set", help="override a recipe key: --set method.damp=0.02")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="replace what the run folder holds")]
LimitsOpt = Annotated[bool, typer.Option("--ignore-limits", help="run although memory or disk look too small")]
PickleOpt = Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights (they can run code)")]
TrustOpt = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the tokenizer")]
ShareOpt = Annotated[
    Path | None,
    typer.Option("--share", help="cache shared by runs of different recipes on one model: tokens, importance matrix"),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def say(line: str) -> None:
    """A line beside the result, on stderr: as long as it is, and with nothing in it taken for markup."""
    err_console.print(line, markup=False, soft_wrap=True)


def chosen_recipe(where: str, model: str | None, sets: list[str]) -> Recipe:
    chosen = recipes.load(where, sets)
    return chosen if model is None else chosen.model_copy(update={"model": model})


def default_out(recipe: Recipe) -> Path:
    name = Path(recipe.model).name.removesuffix(".gguf").replace("@", "-") or "model"
    return Path("artifacts") / name / recipe.name


def cache_folder() -> Path:
    from ..engine.sources import default_cache

    return Path(os.environ["QUANTPRESS_CACHE"]) if "QUANTPRESS_CACHE" in os.environ else default_cache()


def open_source(recipe: Recipe, allow_pickle: bool, trust_remote_code: bool) -> Any:
    quiet_libraries()
    from ..core.machine import flush_denormals, set_up_memory
    from ..engine.sources import resolve

    flush_denormals()
    set_up_memory()
    return resolve(recipe.model, cache=cache_folder(), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


@contextmanager
def progress_bar(what: str, blocks: int) -> Iterator[Callable[..., None]]:
    """Progress with time left and memory; on a terminal a bar, elsewhere a line every fifth of the way and minute."""
    from ..core.machine import rss_bytes
    from ..engine.plan import size

    if not err_console.is_terminal:
        told, before = 0, -1  # what was last told of; what was done when this began, which a resumed run skips
        started = said = time.monotonic()

        def plain(done: int, note: str, total: int = blocks) -> None:
            nonlocal told, before, said
            before, now = done - 1 if before < 0 else before, time.monotonic()
            if done * 5 // total > told * 5 // total or done == total or now - said >= _SILENCE_SECONDS:
                left = (now - started) / max(1, done - before) * (total - done)
                parts = (f"{what} block {done}/{total}", note, size(rss_bytes()), f"{left:.0f} s left" if left else "")
                say(" ".join(part for part in parts if part))
                said = now
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


def quiet_libraries() -> None:
    """Our own progress and messages are the ones to read."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
