"""quantpress: from a Hugging Face checkpoint and a recipe to a quantized, measured release.

    from quantpress import run

    release = run("w4a16-gptq", model="smollm2-135m")
    print(release.report, release.results.gates.verdict)

Importing this is cheap: torch is imported with the first function that is used. Errors that a caller can mend are
`BadInput`, a ValueError of one line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantpress.eval.release.callbacks import Callbacks, Options

    from .api import (
        Checked,
        Endpoint,
        Forecast,
        Verification,
        card,
        check,
        compare,
        convert,
        draft,
        evaluate,
        export,
        fit,
        plan,
        quantize,
        recommend,
        report,
        reproduce,
        run,
        smoke,
        sweep,
        verify,
    )
    from .api import load_model as load
    from .core.errors import BadInput
    from .recipe import Recipe
    from .recipe.loading import load as load_recipe

_HOME = {  # where a name comes from, and its name there
    "BadInput": ("core.errors", "BadInput"),
    "Callbacks": ("eval.release.callbacks", "Callbacks"),
    "Options": ("eval.release.callbacks", "Options"),
    "Recipe": ("recipe", "Recipe"),
    "load": ("api", "load_model"),
    "load_recipe": ("recipe.loading", "load"),
}

__all__ = [
    "BadInput", "Callbacks", "Checked", "Endpoint", "Forecast", "Options", "Recipe", "Verification", "card", "check",
    "compare", "convert", "draft", "evaluate", "export", "fit", "load", "load_recipe", "plan", "quantize", "recommend",
    "report", "reproduce", "run", "smoke", "sweep", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """PEP 562: a public name is imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own = _HOME.get(name, ("api", name))
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), own)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
