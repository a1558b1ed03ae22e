"""The options that several commands have, each described once."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpress.eval.release.callbacks import Options

from ..core.errors import BadInput
from ..recipe import Recipe
from ..recipe import loading as recipes

if TYPE_CHECKING:
    from ..api import Signer

DEFAULT_RECIPE = "w4a16-gptq"


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, for the shell's completion."""
    return [name for name in recipes.shipped() if name.startswith(incomplete)]


RecipeArg = Annotated[
    str,
    typer.Argument(
        help="recipe file, or the name of a shipped one (see quantpress recipes)", autocompletion=complete_recipe
    ),
]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="folder, hub id org/name or org/name@revision, .gguf file or smollm2-135m")
]
OutOpt = Annotated[Path | None, typer.Option("--out", help="run folder; default: artifacts/<model>/<recipe>")]
SetOpt = Annotated[list[str], typer.Option("--set", help="override a recipe key: --set method.damp=0.02")]
TargetOpt = Annotated[list[str], typer.Option("--target", help="vllm, tgi, …")]
ServerPythonOpt = Annotated[
    str | None, typer.Option("--server-python", help="the Python interpreter that has the server installed")
]
AllowOpt = Annotated[
    list[str],
    typer.Option("--allow", help="a file that may lie there though nothing lists it, by its path in the folder"),
]
SignOpt = Annotated[Path | None, typer.Option("--sign", help="sign the checksums with this secret key of minisign's")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="replace what the run folder holds")]
PickleOpt = Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights (they can run code)")]

_OPTIONS: dict[str, Any] = {  # fields of Options
    "overwrite": OverwriteOpt,
    "ignore_limits": Annotated[
        bool, typer.Option("--ignore-limits", help="run although memory or disk look too small")
    ],
    "allow_pickle": PickleOpt,
    "trust_remote_code": Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the tokenizer")
    ],
    "although_changed": Annotated[
        bool, typer.Option("--although-changed", help="take an artifact whose files differ from its checksums")
    ],
    "repeat": Annotated[
        int,
        typer.Option(
            "--repeat", min=1, help="make it so often, with other calibration samples and seeds: intervals hold both"
        ),
    ],
    "share": Annotated[
        Path | None,
        typer.Option(
            "--share", help="cache shared by runs of different recipes on one model: tokens, importance matrix"
        ),
    ],
}


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named options; it receives them together, as its argument `options`.

    names: fields of `Options`.
    """
    added = {name: (_OPTIONS[name], {"share": None, "repeat": 1}.get(name, False)) for name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in added.items()
        ]
        shown = [p for p in own.parameters.values() if p.name != "options"]
        last = next((i for i, p in enumerate(shown) if p.name == "as_json"), len(shown))
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shown[:last], *extra, *shown[last:])]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in added}
            command(**given, options=make_options(**chosen))

        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def make_options(**chosen: Any) -> Options:
    """Options of a command, with what the environment says: QUANTPRESS_CACHE and QUANTPRESS_API_KEY."""
    if cache := os.environ.get("QUANTPRESS_CACHE"):  # an empty one would be the current folder
        chosen["cache"] = Path(cache)
    return Options(**chosen, api_key=os.environ.get("QUANTPRESS_API_KEY"))


def signer(key: Path | None) -> "Signer | None":
    """The secret key that --sign names; its passphrase from QUANTPRESS_SIGN_PASSPHRASE, or asked for."""
    if key is None:
        return None
    from ..api import read_secret_key

    def passphrase() -> str:
        said = os.environ.get("QUANTPRESS_SIGN_PASSPHRASE")
        if said is None and not sys.stdin.isatty():
            raise BadInput(f"--sign {key} has a passphrase; set QUANTPRESS_SIGN_PASSPHRASE where nobody can be asked")
        return typer.prompt(f"passphrase of {key}", hide_input=True, err=True) if said is None else said

    return read_secret_key(key, passphrase)


def chosen_recipe(where: str, model: str | None, overrides: list[str]) -> Recipe:
    """The recipe of a command line, before anything heavy is imported."""
    recipe = recipes.load(where, overrides)
    return recipe if model is None else recipe.model_copy(update={"model": model})


def names(given: list[str]) -> list[str]:
    """Targets as they may be written: --target a --target b, or --target a,b."""
    return [part for name in given for part in name.split(",") if part]


def quiet_libraries() -> None:
    """Silence the progress bars and messages of the libraries: ours are the ones to read."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # its errors are told in one line of ours
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
