"""What is said of records that cannot be weights, and of layers that are unlike the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpress.exports.verifying import original
from quantpress.exports.verifying.gaps import Gap, gap, nearest
from quantpress.exports.verifying.values import impossible, unlike_layers
from quantpress.numbers.fitting import fit
from quantpress.numbers.grid import Grid, QuantizedLinear, snap


def rounded(weight: torch.Tensor, grid: Grid) -> QuantizedLinear:
    """`weight` [out, in] rounded to nearest."""
    groups = weight.reshape(-1, grid.columns(weight.shape[1]))
    scales, zeros = fit(groups, grid, torch.float32)
    codes = snap(groups, scales[:, None], zeros[:, None], grid).reshape(weight.shape).to(torch.uint8)
    shape = weight.shape[0], -1
    return QuantizedLinear(codes, scales.reshape(shape), zeros.reshape(shape).to(torch.uint8), grid)


WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
GRID = Grid(bits=4, group_size=32, symmetric=False)


def test_a_padded_weight_is_one() -> None:
    """Rows of zeros, as models padded for several GPUs have them, are no damage."""
    padded = WEIGHT.clone()
    padded[40:] = 0
    assert list(impossible("x", rounded(padded, GRID))) == []


def test_one_of_zeros_alone_or_of_one_code_is_not() -> None:
    assert "all its weights are zero" in next(impossible("x", rounded(torch.zeros(64, 128), GRID)))
    assert list(impossible("x", rounded(torch.zeros(64, 128), GRID), may_be_zero=True)) == []
    broken = rounded(WEIGHT, GRID)
    broken.codes[3, 32:64] = 15
    assert list(impossible("x", broken)) == ["x: 1 times 32 weights beside each other have one code: no weight is so"]


def test_a_gap_is_that_of_rounding_and_of_each_kind_of_damage() -> None:
    q = rounded(WEIGHT, GRID)
    found = gap(q, WEIGHT)
    exact = (q.dequantize() - WEIGHT).square().sum() / WEIGHT.square().sum()
    torch.testing.assert_close(found.whole, float(exact))
    assert found.whole < 1.5 * nearest(WEIGHT, GRID)
    assert abs(found.length - 1) < 0.02
    q.scales[5, 2] *= 2
    off = gap(q, WEIGHT)
    assert (off.row, off.group) == (5, 2)
    assert 0.8 < off.worst_group < 1.2  # (2 w - w)^2 / w^2
    assert off.whole < 0.02


def test_error_correction_shortens_weights_whose_inputs_are_no_longer_the_originals() -> None:
    """A block's last linear in a tiny random mixture: 0.78 of its length, its error 0.78 on the inputs it gets."""

    def found(length: float, error: float, strength: float) -> list[str]:
        pair: Any = SimpleNamespace(stored=SimpleNamespace(linears={"x": GRID}))
        recipe = {"method": {"name": "gptq", "error_correction": strength}}
        manifest: Any = SimpleNamespace(layers=[SimpleNamespace(name="x", relative_error=error)], recipe=recipe)
        gaps = {"x": Gap(0.06, 0.1, 0.1, 0.01, length=length)}
        return list(original._too_far(pair, gaps, original._Scales(), manifest))

    assert found(0.78, 0.78, 0.5) == found(0.55, 1.25, 0.5) == []
    for length, error, strength in ((0.78, 0.1, 0.5), (0.78, 0.78, 0.0), (1.22, 0.78, 0.5), (0.4, 0.78, 0.5)):
        assert "times the original's" in found(length, error, strength)[0]


def test_an_error_beside_a_row_is_not_another_row() -> None:
    """As GPTQ with error correction leaves rows that make huge channels; of another row all is off."""
    fine = Grid(bits=8, group_size=32, symmetric=False)
    beside = torch.randn(128, generator=torch.Generator().manual_seed(1))
    for group in range(4):  # at a right angle in each group, and as long
        columns = slice(32 * group, 32 * group + 32)
        along = WEIGHT[7, columns]
        beside[columns] -= along * (beside[columns] @ along) / (along @ along)
        beside[columns] *= along.norm() / beside[columns].norm()
    moved, swapped = WEIGHT.clone(), WEIGHT.clone()
    moved[7] += beside
    swapped[7] = WEIGHT[8]
    assert gap(rounded(moved, fine), WEIGHT).worst_row == pytest.approx(0.5, abs=0.02)
    assert gap(rounded(moved, fine), WEIGHT).worst_group < 0.01  # judged as a row
    for wrong in (swapped, -WEIGHT, 0 * WEIGHT, 2.5 * WEIGHT):
        assert gap(rounded(wrong, fine), WEIGHT).worst_row > 0.9
    half = WEIGHT.clone()
    half[7, :64] = WEIGHT[8, :64]
    assert gap(rounded(half, fine), WEIGHT).worst_group > 0.9


def test_what_transforms_did_is_undone() -> None:
    by_columns, by_rows = torch.rand(128) + 0.5, torch.rand(64) + 0.5
    q = rounded(WEIGHT * by_columns * by_rows[:, None], Grid(bits=8, group_size=-1))
    found = gap(q, WEIGHT, by_columns, by_rows)
    assert found.whole < 1e-3
    assert found.columns < 0.01
    assert gap(q, WEIGHT, by_columns.flip(0), by_rows).columns > 0.1


def test_a_layer_unlike_the_others_is_named() -> None:
    sizes = {f"model.layers.{k}.mlp.up_proj": 0.01 * (1 + k) for k in range(6)}
    assert list(unlike_layers(sizes)) == []
    (line,) = unlike_layers(sizes | {"model.layers.3.mlp.up_proj": 5.0})
    assert line.startswith("model.layers.3.mlp.up_proj: its scales are 125 times those of 5 other layers")
    assert list(unlike_layers({"a.0.b": 1.0, "a.1.b": 1e9})) == []  # of two, which?
