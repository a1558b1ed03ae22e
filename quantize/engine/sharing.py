"""What runs of different recipes on one model have in common, computed by the first and read by the others.

That is the calibration tokens and the importance matrix of a GGUF file. A run that reads them writes the same bytes as
one that computes them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.files import expanded, file_sha256, fingerprint, intact, seal, whole_folder
from ..gguf import imatrix
from .backend import Setup


def tokens(folder: Path | None, setup: Setup, make: Callable[[], Tokens]) -> Tokens:
    """The calibration tokens of the recipe, from `folder` where a run left them there; without a folder, made.

    A text from the hub is looked up once, so that all runs see the same.
    """
    if folder is None:
        return make()
    wanted, text = setup.recipe.calibration, expanded(setup.recipe.calibration.source)
    here = file_sha256(text) if text.is_file() else None
    place = folder / "tokens" / _digest(_model(setup) | {"text": wanted.model_dump(mode="json"), "file": here})
    if not intact(place):
        made = make()
        with whole_folder(place) as new:
            about = {"source": made.source, "bos": json.dumps(made.bos)}
            save_file({"ids": made.ids.contiguous()}, new / "tokens.safetensors", metadata=about)
            seal(new)
    with safe_open(place / "tokens.safetensors", "pt") as file:
        about = file.metadata()
        return Tokens(file.get_tensor("ids"), about["source"], json.loads(about["bos"]))


def importance(
    folder: Path | None, setup: Setup, tokens: Tokens, make: Callable[[], dict[str, imatrix.Importance]]
) -> dict[str, imatrix.Importance]:
    """The original's importance matrix on `tokens`, from `folder` where a run left it there; without a folder, made."""
    if folder is None:
        return make()
    of = _model(setup) | {"tokens": tokens.sha256, "shape": list(tokens.ids.shape)}
    place = folder / "imatrix" / _digest(of)
    if not intact(place):
        made = make()
        with whole_folder(place) as new:
            imatrix.save(new / "imatrix.gguf", made, tokens.source, tokens.ids.shape[1])
            seal(new)
    return imatrix.load(place / "imatrix.gguf")


def _model(setup: Setup) -> dict[str, Any]:
    """The original, and everything its hidden states depend on beside the text."""
    return {
        "model": fingerprint(setup.checkpoint.folder),
        "quantpress": version("quantpress"),
        "dtype": str(setup.skeleton.dtype),
        **machine.numerics(setup.skeleton.device),
    }


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
