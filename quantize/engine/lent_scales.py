"""Static input scales of experts on which no token of the calibration could measure them."""

import re
from dataclasses import replace

from ..artifact.manifest import LayerRecord
from ..numbers.grid import Inputs, QuantizedLinear


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
