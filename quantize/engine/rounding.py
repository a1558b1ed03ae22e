"""One stage of a block rounded: the linears that share an input, those of one grid solved together."""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact.manifest import LayerRecord
from ..calibrate.stages import Stage
from ..core.errors import BadInput
from ..methods import ROUNDERS, Rounded
from ..methods.rtn import column_power
from ..models.skeleton import Linear
from ..numbers.grid import Grid, Inputs, QuantizedLinear
from ..recipe import MethodSettings


def round_stage(
    method: MethodSettings,
    schemes: dict[str, Grid | None],
    block: nn.Module,
    linears: list[Linear],
    stage: Stage,
    rounded: dict[str, QuantizedLinear],
    records: dict[str, LayerRecord],
) -> None:
    """Round the linears of one stage, those of one grid together, put the result in place and on record."""
    stacks: dict[tuple[Grid, str], list[Linear]] = {}
    for linear in linears:
        grid = schemes[linear.name]
        assert grid is not None
        apart = linear.name if grid.type == "fp8-block" else ""  # blocks of rows begin anew in each
        stacks.setdefault((grid, apart), []).append(linear)
    for (grid, _), stack in stacks.items():
        result, note = _round(method, torch.cat([weight_of(block, linear) for linear in stack]), grid, stage)
        start = 0
        for linear in stack:
            rows = slice(start, start + linear.out_features)
            one = replace(result.linear.rows(rows.start, rows.stop), inputs=stage.inputs)
            rounded[linear.name] = one
            place(block, linear, one)
            error, power = float(result.error[rows].sum()), float(result.power[rows].sum())
            if not math.isfinite(error + power):
                raise BadInput(f"{linear.name}: its weights or inputs are too large to be rounded in float32")
            records[linear.name] = record(linear, grid).changed(
                loss=error / stage.tokens if stage.tokens else None,
                relative_error=error / power if power > 0 else 0.0,
                damp=result.damp,
                tokens=stage.tokens,
                note=note,
            )
            start = rows.stop


def lend_input_scales(rounded: dict[str, QuantizedLinear], records: dict[str, LayerRecord]) -> None:
    """Give experts that no calibration token reached the widest static input scale of the other experts, and note it.

    Without rows there is nothing to measure, and a scale of nothing would round all that is served to zero.
    """
    reached = {name: q.inputs for name, q in rounded.items() if records[name].tokens and q.inputs is not None}
    for name, linear in rounded.items():
        if linear.inputs is None or linear.inputs.scale is None or name in reached:
            continue
        alike = [inputs for other, inputs in reached.items() if _any_expert(other) == _any_expert(name)]
        if alike:
            rounded[name] = replace(linear, inputs=max(alike, key=_width))
            lent = "the scale of its inputs is the widest of the other experts'"
            records[name] = records[name].changed(note="; ".join(filter(None, (records[name].note, lent))))


def _any_expert(name: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _width(inputs: Inputs) -> float:
    """Grows with the range that a static scale was measured for; nvfp4's is what values are multiplied by."""
    assert inputs.scale is not None
    scale = float(inputs.scale)
    return -scale if inputs.spec.type == "nvfp4" else scale


def _round(method: MethodSettings, weight: Tensor, grid: Grid, stage: Stage) -> tuple[Rounded, str | None]:
    """Round one stack; what is done otherwise than asked comes back as a note."""
    moment = stage.moment
    if moment is not None and not bool(column_power(moment).isfinite().all()):
        raise BadInput(f"{stage.names[0]}: its inputs hold NaN or inf; try bfloat16 or another calibration text")
    if not method.calibrated:
        result = ROUNDERS[method.name](weight, grid, method, moment, None)
        return result, result.note
    if moment is None or not bool(column_power(moment).any()):
        return ROUNDERS["rtn"](weight, grid, method, None, None), "no calibration token reached it: rounded to nearest"
    try:
        result = ROUNDERS[method.name](weight, grid, method, moment, stage.drift)
    except ValueError as error:
        raise BadInput(
            f"{stage.names[0]}: {error}; try another calibration text, or leave the layer to `ignore`"
        ) from None
    few = f"saw {stage.tokens} tokens, fewer than its {weight.shape[1]} inputs"
    said = (result.note, few if stage.tokens < weight.shape[1] else None)
    return result, "; ".join(filter(None, said)) or None


def place(block: nn.Module, linear: Linear, rounded: QuantizedLinear) -> None:
    """Let the block compute with the rounded weight."""
    module: Any = block.get_submodule(linear.module)
    weight = rounded.dequantize(module.weight.dtype)
    module.weight = nn.Parameter(weight.T.contiguous() if linear.transposed else weight, requires_grad=False)


def weight_of(block: nn.Module, linear: Linear) -> Tensor:
    """The weight [out, in] that is in place."""
    weight: Tensor = block.get_submodule(linear.module).weight  # type: ignore[assignment]
    return weight.T if linear.transposed else weight


def record(linear: Linear, grid: Grid | None) -> LayerRecord:
    """What the manifest says of one linear before it is rounded, or when it is left as it is."""
    nothing_yet = {"loss": None, "relative_error": None, "damp": None, "tokens": None, "note": None}
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
