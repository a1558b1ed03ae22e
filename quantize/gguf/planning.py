"""What a run to a GGUF file will need, from config.json and the shards' headers alone."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from ..checkpoint import Checkpoint
from ..grid import Grid
from ..model import Linear
from ..plan import PROCESS_BYTES, Plan, make_plan
from ..recipe import LlamaCppQuantizer, Recipe
from ..recipe.gguf import FLOATS
from . import rounding
from .convert import Conversion, FloatType
from .tensor_types import expected_types, fallbacks, our_types
from .writer import sizes


def make_gguf_plan(
    recipe: Recipe, conversion: Conversion, linears: list[Linear], grids: dict[str, Grid | None]
) -> Plan:
    """What the run needs, by the types the tensors will get; where llama.cpp alone knows these the plan says so."""
    wanted, checkpoint = recipe.gguf_file, conversion.reader
    assert isinstance(checkpoint, Checkpoint)
    if not isinstance(recipe.method, LlamaCppQuantizer):
        chosen = our_types(recipe, conversion)
        artifact = rounding.allowed(recipe, conversion) or sum(rounding.file_sizes(recipe, conversion, chosen))
        own = make_plan(recipe, conversion.skeleton, linears, grids)
        notes = (*conversion.notes, *summed_up(fallbacks(conversion, chosen)))
        return replace(own, artifact_bytes=artifact, original_bytes=checkpoint.total_bytes, notes=notes)
    original, notes = checkpoint.total_bytes, conversion.notes
    of = {parameter: entry.name for entry in conversion.entries for parameter in entry.parameters}
    if wanted.type in FLOATS:
        kind = cast(FloatType, wanted.type)
        tensors, metadata = conversion.tensors(kind), conversion.file_type(kind)
        layers = {x.name: str(kind) for x in linears}
    else:
        kinds, known = expected_types(recipe, conversion)
        tensors = [*conversion.constants(), *(conversion.tensor(e, kinds[e.name]) for e in conversion.entries)]
        metadata = conversion.metadata | {"general.file_type": 0, "general.quantization_version": 0}
        layers = {x.name: kinds[of[f"{x.name}.weight"]].name for x in linears}
        if not known:
            notes = (*notes, f"the size is an estimate: which tensors of {wanted.type} get more bits llama.cpp decides")
    artifact = sum(sizes(metadata, tensors, wanted.split))
    largest = max(sum(checkpoint.nbytes(name) for name in entry.parameters) for entry in conversion.entries)
    memory, operations = PROCESS_BYTES + 6 * largest, 0.0
    if recipe.calibrated:
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        width = conversion.config.hidden_size
        memory += 2 * original // max(1, conversion.skeleton.n_blocks) + 4 * tokens * width
        operations = 2.0 * tokens * sum(x.in_features * x.out_features for x in linears)
    intermediate = 0 if wanted.type in FLOATS else original
    return Plan(
        layers=layers,
        original_bytes=original,
        artifact_bytes=artifact,
        memory_bytes=memory,
        disk_bytes=artifact + intermediate,
        operations=operations,
        seconds=original / 2e7 if wanted.type not in FLOATS else original / 2e8,
        passes=1 if recipe.calibrated else 0,
        notes=notes,
    )


def summed_up(notes: Mapping[str, str]) -> list[str]:
    """One line for all the tensors with the same note."""
    kinds: dict[str, list[str]] = {}
    for name, note in notes.items():
        kinds.setdefault(note, []).append(re.sub(r"^blk\.\d+", "blk.*", name))
    return [f"{len(names)} tensors ({', '.join(dict.fromkeys(names))}): {note}" for note, names in kinds.items()]
