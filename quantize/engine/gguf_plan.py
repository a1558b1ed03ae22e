"""What a run to a GGUF file will need, from config.json and the shards' headers alone."""

from dataclasses import replace
from typing import cast

from ..gguf.conversion import Conversion, FloatType
from ..gguf.rounded_file import RoundedFile
from ..gguf.tensor_types import expected_types, fallbacks, summed_up
from ..gguf.writer import sizes
from ..numbers.types import Grid
from ..recipe.gguf_file import FLOATS
from .backend import Setup
from .budgeting import with_sensitivity
from .needs import process_bytes
from .plan import Plan, make_plan


def plan_rounded(setup: Setup, file: RoundedFile, schemes: dict[str, Grid | None]) -> Plan:
    """Of a file that our own methods round, linears by `schemes`.

    Raises BadInput for a budget that even the smallest types exceed.
    """
    recipe, conversion, checkpoint = setup.recipe, file.conversion, setup.checkpoint
    artifact, notes = file.allowed_bytes, (*checkpoint.notes, *conversion.notes)
    plan = make_plan(recipe, setup.skeleton, setup.linears, schemes)
    if artifact is not None:
        artifact = file.most_bytes(artifact)
        plan = with_sensitivity(plan, recipe, setup.skeleton, setup.linears)
        plan = replace(plan, layers=dict.fromkeys(plan.layers, "within the budget"))
    else:
        artifact = sum(file.sizes())
        notes = (*notes, *summed_up(fallbacks(conversion, file.types)))
    if recipe.gguf_file.calibrated:  # the head's inputs are measured while the last block is still in memory
        nbytes = conversion.skeleton.reader.nbytes
        around = sum(nbytes(name) for entry in conversion.outside() for name in entry.parameters)
        plan = replace(plan, memory_bytes=max(plan.memory_bytes, _calibration_bytes(setup) + around))
    return replace(plan, artifact_bytes=artifact, original_bytes=checkpoint.total_bytes, notes=(*notes, *plan.notes))


def plan_llama_cpp(setup: Setup, conversion: Conversion) -> Plan:
    """Of a file that llama.cpp quantizes; where it alone decides the tensors' types, a note says it is an estimate."""
    recipe, checkpoint, linears = setup.recipe, setup.checkpoint, setup.linears
    wanted, original, notes = recipe.gguf_file, checkpoint.total_bytes, (*checkpoint.notes, *conversion.notes)
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
        layers = {x.name: kinds[of[f"{x.name}.weight"]].name for x in linears if f"{x.name}.weight" in of}
        if not known:
            notes = (*notes, f"the size is an estimate: llama.cpp decides which tensors of {wanted.type} get more bits")
    artifact = sum(sizes(metadata, tensors, wanted.split))
    nbytes = conversion.skeleton.reader.nbytes
    largest = max(sum(nbytes(name) for name in entry.parameters) for entry in conversion.entries)
    memory, operations = process_bytes() + 6 * largest, 0.0
    if recipe.calibrated:
        memory = max(memory, _calibration_bytes(setup) + 6 * largest)
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        operations = 2.0 * tokens * sum(x.in_features * x.out_features for x in linears)
    return Plan(
        layers=layers,
        original_bytes=original,
        artifact_bytes=artifact,
        memory_bytes=memory,
        disk_bytes=artifact + (0 if floats else _weights_bytes(setup)),
        operations=operations,
        seconds=_weights_bytes(setup) / (2e8 if floats else 2e7),
        passes=1 if recipe.calibrated else 0,
        notes=notes,
    )


def _calibration_bytes(setup: Setup) -> int:
    """The process with a block and the next one, read ahead, and the hidden states of all tokens."""
    wanted, skeleton = setup.recipe.calibration, setup.skeleton
    states = 4 * wanted.samples * wanted.seq_len * int(skeleton.config.hidden_size)
    return process_bytes() + 2 * _weights_bytes(setup) // max(1, skeleton.n_blocks) + states


def _weights_bytes(setup: Setup) -> int:
    """Bytes of the weights as they are read: dequantized, where the original is itself quantized."""
    return sum(setup.checkpoint.nbytes(name) for name in setup.checkpoint.names())
