"""A recipe that has been found to fit its model: everything a run needs to know before the work."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..artifact.config_only import HeadersOnly
from ..artifact.original import OriginalCheckpoint, check_no_codes
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.errors import BadInput
from ..core.ranks import ALONE, Ranks
from ..core.schema import matches
from ..models.architecture import is_unknown, unknown_family
from ..models.by_name import ByName
from ..models.rotated_checkpoint import RotatedCheckpoint
from ..models.skeleton import Skeleton
from ..numbers.grid import Grid
from ..recipe import Hadamard, LlamaCppQuantizer, Recipe
from .backend import Backend, Setup
from .gguf_backend import LlamaCppFile, OwnGgufFile
from .huggingface_folder import HuggingFaceFolder
from .plan import Plan
from .sources import Source


@dataclass(frozen=True)
class Job(Setup):
    """A Setup with the backend that writes its artifact and the plan of the run."""

    backend: Backend
    plan: Plan

    @property
    def schemes(self) -> dict[str, Grid | None]:
        """The grid of each linear by its on-disk name, None for one that the blocks leave as it is."""
        return self.backend.schemes

    def settled(self, tokens: Tokens | None, work: Path) -> "Job":
        """The job with what only the calibration text can decide; see Backend.settled."""
        return replace(self, backend=self.backend.settled(tokens, work))


def prepare(
    recipe: Recipe,
    source: Source,
    device: torch.device | None = None,
    *,
    headers: HeadersOnly | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """Check the recipe against the model from config and shard headers alone; raises BadInput for what cannot run.

    headers: of a source whose files are not there; such a job is good for its plan. ranks: who is to share the run.
    """
    machine.flush_denormals()
    checkpoint = headers or OriginalCheckpoint(source.path)
    if unknown := is_unknown(checkpoint.config):
        _check_data_free(recipe, checkpoint.config)
    source = replace(source, caveat="; ".join(filter(None, (source.caveat, *checkpoint.notes))) or None)
    if checkpoint.quantization is not None and recipe.calibrated and recipe.calibration.source == "self":
        raise BadInput(
            f"calibration.source self: transformers would have to run {source.id} quantized ({checkpoint.quantization})"
            " to generate text; give a text as calibration.source"
        )
    first = recipe.transforms[0] if recipe.transforms else None
    reader = RotatedCheckpoint(checkpoint, first.seed) if isinstance(first, Hadamard) else checkpoint
    there = device or machine.device()
    skeleton = _by_name(recipe, reader, there) if unknown else Skeleton(reader, device=there)
    skeleton.check_shapes(reader.shape)
    check_no_codes(skeleton, checkpoint)
    if recipe.calibrated and recipe.calibration.all_experts and not skeleton.tells_experts_apart:
        raise BadInput(
            f"calibration.all_experts: {skeleton.config.model_type} gives its experts tokens weighed or sorted "
            "by the router, so that none can see all of them; leave it out"
        )
    return _planned(Setup(recipe, source, checkpoint, reader, skeleton, skeleton.linears(), ranks=ranks))


def prepare_beside(job: Job, recipe: Recipe) -> Job:
    """As `prepare`, for the model of a job that has been prepared and is not opened again; neither recipe rotates it.

    Where transformers does not know the architecture it is opened: the recipe says what its linears are.
    """
    assert not any(isinstance(one, Hadamard) for one in (*recipe.transforms, *job.recipe.transforms))
    if isinstance(job.skeleton, ByName):
        headers = job.checkpoint if isinstance(job.checkpoint, HeadersOnly) else None
        return prepare(recipe, job.source, job.skeleton.device, headers=headers, ranks=job.ranks)
    given = {field.name: getattr(job, field.name) for field in fields(Setup)}
    return _planned(Setup(**given | {"recipe": recipe}), job.backend)


def _planned(setup: Setup, beside: Backend | None = None) -> Job:
    backend = _backend(setup, beside)
    return Job(**vars(setup), backend=backend, plan=backend.plan())


def _check_data_free(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise BadInput for a recipe that has to run the model, or to know its family."""
    why = f"{unknown_family(config)}: no text can be run through it"
    if recipe.is_gguf:
        raise BadInput(
            f"{unknown_family(config)}; make a 16-bit .gguf file with llama.cpp's converter, and give that as the model"
        )
    if recipe.calibrated or recipe.transforms:
        raise BadInput(
            f"{why}, which this recipe needs. Its weights can be rounded without: `method: rtn`, dynamic activations, "
            "no transforms, no scale_search: activation (recipes w4a16-rtn, w8a16-rtn, w8a8-rtn, fp8-dynamic, nvfp4a16)"
        )
    if recipe.smoke is not None:
        raise BadInput(f"{why}, and the smoke test compares the server with a forward pass: set `smoke: null`")


def _by_name(recipe: Recipe, reader: Any, device: torch.device) -> ByName:
    """The model by the names of its tensors; a matrix that an override matches is a linear whatever its name says."""
    patterns = [override.match for override in recipe.overrides]
    return ByName(reader, device=device, chosen=lambda name: any(matches(pattern, name) for pattern in patterns))


def _backend(setup: Setup, beside: Backend | None) -> Backend:
    """What writes the artifact of this recipe. beside: of another recipe for the same model, if there is one."""
    if not setup.recipe.is_gguf:
        return HuggingFaceFolder.of(setup)
    if isinstance(setup.recipe.method, LlamaCppQuantizer):
        return LlamaCppFile.of(setup, beside)
    return OwnGgufFile.of(setup, beside)
