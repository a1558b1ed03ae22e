"""A recipe that has been found to fit its model: everything a run needs to know before the work."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.manifest import Sizes
from ..calibrate import kv_cache
from ..core import machine
from ..core.errors import BadInput
from ..formats import FORMATS, Contents
from ..gguf import gguf_run as gguf_run
from ..gguf.mixes import Choice
from ..gguf.planning import make_gguf_plan
from ..gguf.reader import GgufCheckpoint
from ..models.checkpoint import Checkpoint
from ..models.rotated import Rotated
from ..models.skeleton import Linear, Skeleton
from ..numbers.grid import Grid
from ..recipe import Hadamard, Recipe
from .plan import Plan, make_plan
from .sharing import Shared
from .sources import Source
from .transforms import BlockTransforms


@dataclass(frozen=True)
class Progress:
    """A block has been finished."""

    block: int
    blocks: int
    loss: float | None  # mean relative error of its linears
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What the command line decides, beside the recipe."""

    out: Path
    cache: Path
    overwrite: bool = False
    ignore_limits: bool = False
    trust_remote_code: bool = False
    on_block: Callable[[Progress], None] = lambda progress: None
    on_note: Callable[[str], None] = lambda line: None
    shared: Shared = field(default_factory=Shared)


@dataclass(frozen=True)
class Job:
    """A recipe that has been found to fit its model: everything but the work.

    checkpoint: the original. reader: what is quantized, the original or its rotation.
    """

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    reader: Checkpoint | Rotated
    skeleton: Skeleton
    linears: list[Linear]
    schemes: dict[str, Grid | None]
    plan: Plan
    gguf_types: dict[str, Choice | None] | None = None  # of a GGUF file's tensors, where a budget chose them
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # of columns [in] by linear, from a matrix given

    @property
    def contents(self) -> Contents:
        return _contents(self.recipe, self.skeleton, self.schemes)

    @property
    def weighs_head(self) -> bool:
        """Whether the output head is rounded by what it gets in calibration, which the last block's part then holds."""
        return self.recipe.is_gguf and self.recipe.gguf_file.calibrated

    def sizes(self, format: str, artifact: Checkpoint | GgufCheckpoint, packed_bytes: int, weights: int) -> Sizes:
        """What a manifest says of an artifact on disk; packed_bytes: of its quantized `weights`, with scales."""
        parameters = sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())
        return Sizes(
            format=format,
            bytes=artifact.total_bytes,
            original_bytes=self.checkpoint.total_bytes,
            quantized_bits_per_weight=8 * packed_bytes / weights,
            bits_per_parameter=8 * artifact.total_bytes / parameters,
            parameters=parameters,
            files=artifact.file_hashes(),
        )


def prepare(recipe: Recipe, source: Source, device: torch.device | None = None) -> Job:
    """Check the recipe against the model from config and shard headers alone; raises BadInput for what cannot run."""
    machine.flush_denormals()
    checkpoint = Checkpoint(source.path)
    if quantized := checkpoint.config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise BadInput(f"{source.id} is already quantized ({method}); give the original checkpoint")
    first = recipe.transforms[0] if recipe.transforms else None
    reader = Rotated(checkpoint, first.seed) if isinstance(first, Hadamard) else checkpoint
    skeleton = Skeleton(reader, device=device or machine.device())
    skeleton.check_shapes(reader.shape)
    linears = skeleton.linears()
    if recipe.is_gguf:
        conversion = gguf_run.check(recipe, checkpoint, source)
        grids = gguf_run.schemes(recipe, conversion, linears)
        plan = make_gguf_plan(recipe, conversion, linears, grids)
        given = gguf_run.importance(recipe, conversion)
        return Job(recipe, source, checkpoint, reader, skeleton, linears, grids, plan, importance=given)
    schemes = recipe.schemes({linear.name: linear.in_features for linear in linears})
    for name in recipe.formats:
        _check_format(name, linears, schemes, skeleton, recipe)
    BlockTransforms(recipe, skeleton)
    if recipe.kv_cache is not None:
        kv_cache.attentions(skeleton)
    plan = make_plan(recipe, skeleton, linears, schemes)
    notes = reader.notes if isinstance(reader, Rotated) else ()
    plan = replace(plan, original_bytes=checkpoint.total_bytes, notes=notes)
    return Job(recipe, source, checkpoint, reader, skeleton, linears, schemes, plan)


def _check_format(
    format: str, linears: list[Linear], schemes: dict[str, Grid | None], skeleton: Skeleton, recipe: Recipe
) -> None:
    """Raise BadInput for what `format` cannot hold, layer by layer and as a whole."""
    for linear in linears:
        grid = schemes[linear.name]
        if grid is None:
            continue
        if linear.transposed and not FORMATS[format].holds.conv1d:
            raise BadInput(
                f"{linear.name} is a Conv1D, which readers of {format} leave unquantized without a word; "
                "write it with --set formats=[gptq]"
            )
        try:
            FORMATS[format].check(grid, linear.out_features, linear.in_features, recipe.shuffled)
        except BadInput as error:
            raise BadInput(f"{linear.name}: {error}") from None
    FORMATS[format].config(_contents(recipe, skeleton, schemes))


def _contents(recipe: Recipe, skeleton: Skeleton, schemes: dict[str, Grid | None]) -> Contents:
    return Contents(schemes, skeleton.outside(), recipe.shuffled, recipe.activations, recipe.kv_cache)
