"""Linears that are solved in one batch, as on a GPU, and the odd ones among them; the kernels are interpreted here."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantpress.artifact.manifest import LayerRecord
from quantpress.calibrate.block_pass import SharedInput
from quantpress.core.errors import BadInput
from quantpress.engine import rounding
from quantpress.models.placed_model import LinearLayer
from quantpress.numbers.grid import Grid, QuantizedLinear
from quantpress.recipe import Gptq

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/gpu/check_kernels.py runs the kernels"
)

GRID = Grid(bits=4, group_size=16, symmetric=False)
N = 32
EXPERTS = 4


def linears() -> dict[str, LinearLayer]:
    """Gate and up of each expert, 8 and 8 rows."""
    names = [f"{e}.{name}" for e in range(EXPERTS) for name in ("gate", "up")]
    return {name: LinearLayer(name, str(i), 0, 8, N, False) for i, name in enumerate(names)}


def inputs() -> list[SharedInput]:
    g = torch.Generator().manual_seed(0)
    found = []
    for e in range(EXPERTS):
        x, x0 = torch.randn(2, 40, N, generator=g).cumsum(0)
        power = {f"{e}.{name}": torch.rand(8, generator=g) for name in ("gate", "up")}
        found.append(SharedInput((f"{e}.gate", f"{e}.up"), x.T @ x, 40, (x0 - x).T @ x, power))
    return found


def rounded(
    shared: list[SharedInput], method: Gptq, grid: Grid = GRID
) -> tuple[nn.Module, Mapping[str, QuantizedLinear], dict[str, LayerRecord]]:
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Linear(N, 8) for _ in linears())).requires_grad_(False)
    doing = rounding.BlockRounding(method, dict.fromkeys(linears(), grid), block)
    doing.round(shared, linears())
    return block, doing.rounded, doing.finish()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on linears are solved in batches; how many in each."""
    from quantpress.methods import gptq_batch

    sizes: list[int] = []
    solve = gptq_batch.gptq_batch
    monkeypatch.setattr(rounding, "solves_batches", lambda method, device: True)
    monkeypatch.setattr(rounding, "kernels_refused", lambda *what: None)
    monkeypatch.setattr(gptq_batch, "gptq_batch", lambda weight, *a: sizes.append(len(weight)) or solve(weight, *a))
    return sizes


def same(one: dict[str, LayerRecord], other: dict[str, LayerRecord]) -> None:
    for name, record in one.items():
        assert record.relative_error == pytest.approx(other[name].relative_error, rel=1e-3)
        assert record.changed(loss=0.0, relative_error=0.0) == other[name].changed(loss=0.0, relative_error=0.0)


def test_a_batch_of_experts_is_rounded_as_each_alone(together: list[int]) -> None:
    block, codes, records = rounded(inputs(), Gptq())
    assert together == [EXPERTS]
    for shared in inputs():
        alone, single, told = rounded([shared], Gptq())
        for name in shared.names:
            at = int(linears()[name].module)
            assert torch.equal(codes[name].codes, single[name].codes)
            torch.testing.assert_close(block[at].weight, alone[at].weight, rtol=0, atol=0)
            torch.testing.assert_close(block[at].weight, codes[name].dequantize(), rtol=0, atol=0)
        same({name: records[name] for name in shared.names}, told)
    assert all(record.error_measure == "output_accumulated" for record in records.values())


def test_the_plain_loop_says_the_same(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, codes, records = rounded(inputs(), Gptq())
    monkeypatch.setattr(rounding, "solves_batches", lambda method, device: False)
    _, plain, told = rounded(inputs(), Gptq())
    assert together == [EXPERTS]
    assert sum((codes[n].codes != plain[n].codes).sum().item() for n in codes) <= 2
    same(records, told)


def test_sums_by_rows_stand_for_drifts_in_batches_and_alone(
    together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights = {name: nn.Linear(N, 8).weight.detach() for name in linears()}  # as `rounded` makes them
    by_rows = [
        replace(one, drift=None, moved={name: weights[name] @ one.drift for name in one.names if one.drift is not None})
        for one in inputs()
    ]
    want, got = rounded(inputs(), Gptq()), rounded(by_rows, Gptq())
    monkeypatch.setattr(rounding, "solves_batches", lambda method, device: False)
    alone = rounded(by_rows, Gptq())
    assert together == [EXPERTS, EXPERTS]
    for _, codes, records in (got, alone):
        assert sum((codes[n].codes != want[1][n].codes).sum().item() for n in codes) <= 2
        same(records, want[2])


def test_pieces_stay_within_memory(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "TOGETHER", 3 * N * N)
    rounded(inputs(), Gptq())
    assert together == [3, 1]


def test_the_odd_ones_are_rounded_alone(together: list[int]) -> None:
    """No token, inputs that are all zero, and a Hessian that needs more damping."""
    some = inputs()
    zero = torch.zeros(N, N)
    power = {name: torch.zeros(8) for name in some[1].names}
    some[0] = SharedInput(some[0].names)
    some[1] = SharedInput(some[1].names, zero, 40, zero, power)
    x = 1e3 * torch.randn(3, N, generator=torch.Generator().manual_seed(5))
    some[2] = SharedInput(
        some[2].names,
        x.T @ x - 50 * torch.eye(N),
        40,
        zero,
        power | dict.fromkeys(some[2].names, power[some[1].names[0]]),
    )
    _, _, records = rounded(some, Gptq(damp=1e-8))
    assert together == [3, 2]
    nearest = "no calibration token reached it: rounded to nearest"
    assert [records[f"{e}.gate"].note for e in (0, 1)] == [nearest, nearest]
    assert str(records["2.up"].note).startswith("singular Hessian: damping raised from 1e-08 to ")
    assert (records["3.up"].note, records["3.up"].damp) == (None, 1e-8)


@pytest.mark.parametrize(("value", "what"), [(torch.nan, "its inputs hold NaN or inf"), (1e20, "stays singular")])
def test_a_hessian_that_cannot_be_solved_is_refused_by_name(value: float, what: str, together: list[int]) -> None:
    some = inputs()
    assert some[2].moment is not None
    some[2].moment[3, 3] = value
    some[2].moment[3, 4] = some[2].moment[4, 3] = 2 * value
    some[2].moment[4, 4] = value
    with pytest.raises(BadInput, match=f"2.gate: .*{what}"):
        rounded(some, Gptq())


def test_weights_too_large_for_float32_are_refused_by_name(together: list[int]) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Linear(N, 8) for _ in linears())).requires_grad_(False)
    block[3].weight[2, 2] = 3e38
    doing = rounding.BlockRounding(Gptq(), dict.fromkeys(linears(), GRID), block)
    doing.round(inputs(), linears())
    with pytest.raises(BadInput, match=r"1.up: its weights or inputs are too large to be rounded in float32"):
        doing.finish()


def test_groups_that_outgrow_nvfp4s_global_scale_are_told(together: list[int]) -> None:
    """As `gptq` tells it; see test_gptq."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=g)
    rows = torch.cat([100 * x, x + 0.01 * torch.randn(400, 16, generator=g)], 1)
    weight = torch.cat([0.9 * torch.ones(8, 16), 0.01 * torch.ones(8, 16)], 1)
    weight[:, 0] = 6 * 448 / 2**11 / 1.89  # as large as a global scale of 2^11 allows
    block = nn.Sequential(*(nn.Linear(N, 8) for _ in linears())).requires_grad_(False)
    for linear in block:
        linear.weight.copy_(weight)
    grid = Grid(type="nvfp4", scale_search="minmax")
    doing = rounding.BlockRounding(Gptq(order="natural", damp=1e-6), dict.fromkeys(linears(), grid), block)
    doing.round([SharedInput(("0.gate", "0.up"), rows.T @ rows, 400)], linears())
    assert together == [1]
    assert "of 32 groups outgrew the global scale and are clipped" in str(doing.finish()["0.up"].note)


def test_kernels_that_fail_their_trial_are_not_used_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "solves_batches", lambda method, device: True)
    monkeypatch.setattr(rounding, "kernels_refused", lambda *what: "rounded without GPTQ's kernels: why")
    _, codes, records = rounded(inputs(), Gptq())
    monkeypatch.setattr(rounding, "solves_batches", lambda method, device: False)
    _, plain, _ = rounded(inputs(), Gptq())
    assert all(torch.equal(codes[name].codes, plain[name].codes) for name in plain)
    assert {record.note for record in records.values()} == {"rounded without GPTQ's kernels: why"}
