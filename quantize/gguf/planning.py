"""What a run to a GGUF file will need, from config.json and the shards' headers alone."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from ..engine.plan import PROCESS_BYTES, Plan, make_plan
from ..models.checkpoint import Checkpoint
from ..models.skeleton import Linear, Skeleton
from ..numbers.grid import Grid
from ..recipe import LlamaCppQuantizer, Recipe
from ..recipe.gguf_file import FLOATS
from . import rounded_file as rounding
from .conversion import Conversion, FloatType
from .tensor_types import expected_types, fallbacks, our_types
from .writer import sizes


def make_gguf_plan(
    recipe: Recipe, conversion: Conversion, linears: list[Linear], grids: dict[str, Grid | None]
) -> Plan:
    """What the run needs, by the types the tensors will get; where llama.cpp alone knows these the plan says so."""
    checkpoint = conversion.reader
    assert isinstance(checkpoint, Checkpoint)
    if isinstance(recipe.method, LlamaCppQuantizer):
        return _plan_of_llama_cpp(recipe, conversion, checkpoint, linears)
    wanted, chosen = recipe.gguf_file, our_types(recipe, conversion)
    artifact, notes = rounding.allowed(recipe, conversion), conversion.notes
    own = make_plan(recipe, conversion.skeleton, linears, grids)
    if artifact is not None:
        rounding.check_budget(recipe, conversion, chosen)
        own = _with_sensitivity(own, recipe, conversion.skeleton, linears)
        own = replace(own, layers=dict.fromkeys(own.layers, "within the budget"))
    else:
        artifact = sum(rounding.file_sizes(recipe, conversion, chosen))
        notes = (*notes, *summed_up(fallbacks(conversion, chosen)))
    if wanted.calibrated:  # the head is looked at while the last block is still there
        around = sum(checkpoint.nbytes(name) for entry in conversion.outside() for name in entry.parameters)
        own = replace(own, memory_bytes=max(own.memory_bytes, _calibration_bytes(recipe, conversion) + around))
    return replace(own, artifact_bytes=artifact, original_bytes=checkpoint.total_bytes, notes=notes)


def _plan_of_llama_cpp(recipe: Recipe, conversion: Conversion, checkpoint: Checkpoint, linears: list[Linear]) -> Plan:
    wanted, original, notes = recipe.gguf_file, checkpoint.total_bytes, conversion.notes
    floats = wanted.type in FLOATS
    if floats:
        kind = cast(FloatType, wanted.type)
        tensors, metadata = conversion.tensors(kind), conversion.file_type(kind)
        layers = {x.name: str(kind) for x in linears}
    else:
        kinds, known = expected_types(recipe, conversion)
        tensors = [*conversion.constants(), *(conversion.tensor(e, kinds[e.name]) for e in conversion.entries)]
        metadata = conversion.metadata | {"general.file_type": 0, "general.quantization_version": 0}
        of = {parameter: entry.name for entry in conversion.entries for parameter in entry.parameters}
        layers = {x.name: kinds[of[f"{x.name}.weight"]].name for x in linears}
        if not known:
            notes = (*notes, f"the size is an estimate: which tensors of {wanted.type} get more bits llama.cpp decides")
    artifact = sum(sizes(metadata, tensors, wanted.split))
    largest = max(sum(checkpoint.nbytes(name) for name in entry.parameters) for entry in conversion.entries)
    memory, operations = PROCESS_BYTES + 6 * largest, 0.0
    if recipe.calibrated:
        memory = max(memory, _calibration_bytes(recipe, conversion) + 6 * largest)
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        operations = 2.0 * tokens * sum(x.in_features * x.out_features for x in linears)
    return Plan(
        layers=layers,
        original_bytes=original,
        artifact_bytes=artifact,
        memory_bytes=memory,
        disk_bytes=artifact + (0 if floats else original),
        operations=operations,
        seconds=original / (2e8 if floats else 2e7),
        passes=1 if recipe.calibrated else 0,
        notes=notes,
    )


def _calibration_bytes(recipe: Recipe, conversion: Conversion) -> int:
    """A block and the one read ahead, and the hidden states of all tokens."""
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    states = 4 * tokens * int(conversion.config.hidden_size)
    checkpoint = conversion.reader
    assert isinstance(checkpoint, Checkpoint)
    return PROCESS_BYTES + 2 * checkpoint.total_bytes // max(1, conversion.skeleton.n_blocks) + states


def _with_sensitivity(plan: Plan, recipe: Recipe, skeleton: Skeleton, linears: list[Linear]) -> Plan:
    """The plan with the pass that measures what errors cost, in float32: forwards, and backwards with blocks run again.

    On disk lie the states that enter each block; in memory a block and the one read ahead, or what is around them with
    the logits of a sequence, the tensors kept for the gradient of one, and states and gradients of all tokens.
    """
    hidden, seq_len = int(skeleton.config.hidden_size), recipe.calibration.seq_len
    tokens, outside = recipe.calibration.samples * seq_len, int(skeleton.config.vocab_size) * hidden
    blocks, widths = [0] * skeleton.n_blocks, [0] * skeleton.n_blocks
    for x in linears:
        blocks[x.block] += x.in_features * x.out_features
        widths[x.block] += x.in_features + x.out_features
    shell = 2 * outside + 4 * seq_len * int(skeleton.config.vocab_size)
    work = 4 * (max(shell, 2 * max(blocks) + 3 * seq_len * max(widths)) + 3 * tokens * hidden)
    return replace(
        plan,
        memory_bytes=max(plan.memory_bytes, PROCESS_BYTES + work),
        disk_bytes=max(plan.disk_bytes, 4 * tokens * hidden * skeleton.n_blocks),  # gone before the first block is kept
        operations=plan.operations + 2.0 * tokens * (4 * sum(blocks) + 3 * outside),
        seconds=plan.seconds * (1 + 2.0 * tokens * (4 * sum(blocks) + 3 * outside) / plan.operations),
        passes=plan.passes + 1,
    )


def summed_up(notes: Mapping[str, str]) -> list[str]:
    """One line for all the tensors with the same note."""
    kinds: dict[str, list[str]] = {}
    for name, note in notes.items():
        kinds.setdefault(note, []).append(re.sub(r"^blk\.\d+", "blk.*", name))
    return [f"{len(names)} tensors ({', '.join(dict.fromkeys(names))}): {note}" for note, names in kinds.items()]
