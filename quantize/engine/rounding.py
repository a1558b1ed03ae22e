"""Rounding of the linears of a block that share an input; those with the same grid are solved together."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact.manifest import LayerRecord
from ..calibrate.block_pass import SharedInput
from ..core.errors import BadInput
from ..methods import ROUNDERS, Rounded
from ..methods.layer_error import LayerError, layer_error
from ..methods.rtn import column_power
from ..models.skeleton import LinearLayer
from ..numbers.grid import Grid, Inputs, QuantizedLinear
from ..recipe import MethodSettings


def round_linears(
    method: MethodSettings,
    schemes: dict[str, Grid | None],
    block: nn.Module,
    linears: list[LinearLayer],
    shared: SharedInput,
    rounded: dict[str, QuantizedLinear],
    records: dict[str, LayerRecord],
) -> None:
    """Round linears that share an input: fills `rounded` and `records`, and puts the new weights into the block."""
    stacks: dict[tuple[Grid, str], list[LinearLayer]] = {}
    for linear in linears:
        grid = schemes[linear.name]
        assert grid is not None
        apart = linear.name if grid.type == "fp8-block" else ""  # its blocks of rows must not span two linears
        stacks.setdefault((grid, apart), []).append(linear)
    for (grid, _), stack in stacks.items():
        weight = torch.cat([weight_of(block, linear) for linear in stack])
        result, note = _round(method, weight, grid, shared)
        error = _error(weight, result.linear, shared, [linear.name for linear in stack])
        start = 0
        for linear in stack:
            rows = slice(start, start + linear.out_features)
            one = replace(result.linear.rows(rows.start, rows.stop), inputs=shared.inputs)
            rounded[linear.name] = one
            place(block, linear, one)
            mine = error.rows(rows)
            if not bool((mine.error + mine.power).isfinite().all()):
                raise BadInput(f"{linear.name}: its weights or inputs are too large to be rounded in float32")
            records[linear.name] = record(linear, grid).changed(
                **mine.record(shared.tokens), damp=result.damp, tokens=shared.tokens, note=note
            )
            start = rows.stop


def lend_input_scales(rounded: dict[str, QuantizedLinear], records: dict[str, LayerRecord]) -> None:
    """Give experts that no calibration token reached the widest static input scale of the other experts, with a note.

    There was nothing to measure their scale on, and without one every input would be rounded to zero when served.
    """
    reached = {name: q.inputs for name, q in rounded.items() if records[name].tokens and q.inputs is not None}
    for name, linear in rounded.items():
        if linear.inputs is None or linear.inputs.scale is None or name in reached:
            continue
        alike = [inputs for other, inputs in reached.items() if _any_expert(other) == _any_expert(name)]
        if alike:
            rounded[name] = replace(linear, inputs=max(alike, key=_width))
            lent = "static input scale taken from the other experts: the widest"
            records[name] = records[name].changed(note="; ".join(filter(None, (records[name].note, lent))))


def _any_expert(name: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _width(inputs: Inputs) -> float:
    """A number that grows with the range behind a static scale; nvfp4 stores the reciprocal of the others' scales."""
    assert inputs.scale is not None
    scale = float(inputs.scale)
    return -scale if inputs.spec.type == "nvfp4" else scale


def _round(method: MethodSettings, weight: Tensor, grid: Grid, shared: SharedInput) -> tuple[Rounded, str | None]:
    """Round stacked weights [out, in]; the note says what was not done as asked, None if all was."""
    moment = shared.moment
    if moment is not None and not bool(column_power(moment).isfinite().all()):
        raise BadInput(f"{shared.names[0]}: its inputs hold NaN or inf; try bfloat16 or another calibration text")
    if not method.calibrated:
        result = ROUNDERS[method.name](weight, grid, method, moment, None)
        return result, result.note
    if moment is None or not bool(column_power(moment).any()):
        return ROUNDERS["rtn"](weight, grid, method, None, None), "no calibration token reached it: rounded to nearest"
    try:
        result = ROUNDERS[method.name](weight, grid, method, moment, shared.drift)
    except ValueError as error:
        raise BadInput(
            f"{shared.names[0]}: {error}; try another calibration text, or leave the layer to `ignore`"
        ) from None
    notes = [result.note]
    if shared.tokens < weight.shape[1]:
        notes.append(f"saw {shared.tokens} tokens, fewer than its {weight.shape[1]} inputs")
    if shared.unmatched and method.paired:
        notes.append("no error correction: its inputs cannot be matched with the original model's token by token")
    return result, "; ".join(filter(None, notes)) or None


def _error(weight: Tensor, rounded: QuantizedLinear, shared: SharedInput, names: list[str]) -> LayerError:
    """The error of the linears `names`, stacked in this order."""
    powers = [shared.drift_power[name] for name in names] if shared.drift is not None else []
    w, power = weight.to(torch.float32), torch.cat(powers) if powers else None
    return layer_error(w, rounded.dequantize(), shared.moment, shared.drift, power)


def place(block: nn.Module, linear: LinearLayer, rounded: QuantizedLinear) -> None:
    """Put the rounded weight into the block."""
    module: Any = block.get_submodule(linear.module)
    weight = rounded.dequantize(module.weight.dtype)
    module.weight = nn.Parameter(weight.T.contiguous() if linear.transposed else weight, requires_grad=False)


def with_weights(block: nn.Module, weights: Mapping[LinearLayer, Tensor]) -> nn.Module:
    """A copy of the block with other weights [out, in] in some linears; all other parameters are shared."""
    other = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    for linear, weight in weights.items():
        module: Any = other.get_submodule(linear.module)
        module.weight = nn.Parameter(weight.T if linear.transposed else weight, requires_grad=False)
    return other


def weight_of(block: nn.Module, linear: LinearLayer) -> Tensor:
    """The weight [out, in] that the block now has for a linear."""
    weight: Tensor = block.get_submodule(linear.module).weight  # type: ignore[assignment]
    return weight.T if linear.transposed else weight


def record(linear: LinearLayer, grid: Grid | None) -> LayerRecord:
    """The manifest's record of a linear that is not rounded (yet)."""
    nothing_yet = dict.fromkeys(("loss", "relative_error", "error_measure", "damp", "tokens", "note"))
    return LayerRecord(
        name=linear.name,
        block=linear.block,
        shape=(linear.out_features, linear.in_features),
        bits=16 if grid is None else grid.bits,
        group_size=None if grid is None else grid.group_size,
        symmetric=None if grid is None else grid.symmetric,
        scheme="16 bit" if grid is None else str(grid),
        **nothing_yet,
    )
