"""A recipe that has been found to fit its model: everything a run needs to know before the work."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..artifact.config_only import HeadersOnly
from ..artifact.original import OriginalCheckpoint, check_no_codes
from ..calibrate.tokens import Tokens
from ..core import machine
from ..core.errors import BadInput
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
    recipe: Recipe, source: Source, device: torch.device | None = None, *, headers: HeadersOnly | None = None
) -> Job:
    """Check the recipe against the model from config and shard headers alone; raises BadInput for what cannot run.

    headers: of a source whose files are not there; such a job is good for its plan.
    """
    machine.flush_denormals()
    checkpoint = headers or OriginalCheckpoint(source.path)
    source = replace(source, caveat="; ".join(filter(None, (source.caveat, *checkpoint.notes))) or None)
    if checkpoint.quantization is not None and recipe.calibrated and recipe.calibration.source == "self":
        raise BadInput(
            f"calibration.source self: transformers would have to run {source.id} quantized ({checkpoint.quantization})"
            " to generate text; give a text as calibration.source"
        )
    first = recipe.transforms[0] if recipe.transforms else None
    reader = RotatedCheckpoint(checkpoint, first.seed) if isinstance(first, Hadamard) else checkpoint
    skeleton = Skeleton(reader, device=device or machine.device())
    skeleton.check_shapes(reader.shape)
    check_no_codes(skeleton, checkpoint)
    setup = Setup(recipe, source, checkpoint, reader, skeleton, skeleton.linears())
    backend = _backend(setup)
    return Job(**vars(setup), backend=backend, plan=backend.plan())


def _backend(setup: Setup) -> Backend:
    """What writes the artifact of this recipe."""
    if not setup.recipe.is_gguf:
        return HuggingFaceFolder.of(setup)
    if isinstance(setup.recipe.method, LlamaCppQuantizer):
        return LlamaCppFile.of(setup)
    return OwnGgufFile.of(setup)
