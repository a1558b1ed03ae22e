"""`--repeat N`: the recipe made again with other calibration samples and seeds, in RUN/repeats, so that figures hold
what another seed would change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.core.errors import BadInput
from quantpress.recipe import Gates, Recipe
from quantpress.recipe.loading import parse

from ..measure.evaluate import Prepared
from ..report.measured_run import REPEATS
from .callbacks import Callbacks, Options


def by_chance(recipe: Recipe) -> bool:
    """Whether anything that makes the artifact depends on a seed."""
    document = recipe.model_dump(mode="json")
    beside = {key: value for key, value in document.items() if key != "calibration"}
    return recipe.calibrated or next(_seeds(beside), None) is not None


def check_repeat(recipe: Recipe, options: Options, inputs: Prepared | None) -> int:
    """How many runs of the recipe there are to be: 1 where nothing in it is drawn.

    Raises BadInput for what has no figures, or none that can be averaged.
    """
    if options.repeat == 1 or not by_chance(recipe):
        return 1
    if inputs is None or recipe.evaluation is None:
        raise BadInput("--repeat: the recipe has `evaluation: null`, so there are no figures to repeat")
    if recipe.evaluation.until_clear is not None:
        raise BadInput(
            "--repeat: runs that are averaged need the same windows, and evaluation.until_clear goes on until they "
            "differ; --set evaluation.until_clear=null"
        )
    if options.ranks.size > 1:
        raise BadInput("--repeat: a run that several processes share is made once; leave out --gpus, or --repeat")
    return options.repeat


def reseeded(recipe: Recipe, k: int) -> Recipe:
    """The recipe with `k` added to every seed, and without what only the first of its runs needs."""
    document = _raised(recipe.model_dump(mode="json"), k)
    again = parse(document, f"of repeat {k + 1}")
    return again.model_copy(update={"formats": recipe.formats[:1], "targets": (), "smoke": None, "gates": Gates()})


def measured_alike(inputs: Prepared) -> Prepared:
    """What the first run was measured with, without what is not averaged.

    That is also the part of the calibration's text that the first run does not calibrate on: the others may.
    """
    wanted = inputs.wanted.model_copy(update={"prompts": ()})
    held_out = {domain.label for domain in wanted.domains or () if domain.source == "calibration"}
    kept = [domain for domain in inputs.domains if wanted.domains is not None and domain.name not in held_out]
    return replace(inputs, wanted=wanted, domains=kept, notes=())


def repeat_folder(out: Path, k: int) -> Path:
    """The run folder of the recipe's run number `k` + 1."""
    return out / REPEATS / str(k + 1)


def told_apart(callbacks: Callbacks, k: int, of: int) -> Callbacks:
    """Callbacks that say which of the runs it is; its notes, which the first has said, stay in its manifest."""
    which = f"run {k + 1} of {of}"
    return replace(
        callbacks,
        on_step=lambda what, done, total, remark: callbacks.on_step(f"{which}, {what}", done, total, remark),
        on_note=lambda line: None,
    )


def _seeds(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "seed":
                yield item
            else:
                yield from _seeds(item)
    elif isinstance(value, list):
        for item in value:
            yield from _seeds(item)


def _raised(value: Any, by: int) -> Any:
    if isinstance(value, Mapping):
        return {key: item + by if key == "seed" else _raised(item, by) for key, item in value.items()}
    return [_raised(item, by) for item in value] if isinstance(value, list) else value
