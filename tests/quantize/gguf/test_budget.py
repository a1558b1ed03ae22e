"""Types within a budget: the best assignment there is, and costs that foresee the divergence."""

import itertools
import random
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
import torch

from quantpress.calibrate.sensitivity import Sensitivity
from quantpress.core.errors import BadInput
from quantpress.gguf.budget import assign, bytes_in_file, candidates, costs
from quantpress.methods import ROUNDERS
from quantpress.numbers.types import BlockGrid, GgmlType
from quantpress.recipe import Rtn

TYPES = get_args(GgmlType)


@pytest.mark.parametrize("seed", range(6))
def test_the_assignment_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    shapes = {f"t{i}": (draw.randint(1, 9), 256 * draw.randint(1, 3)) for i in range(4)}
    kinds = draw.sample(TYPES, 4)
    prices = {
        name: {kind: draw.random() / bytes_in_file(shape, kind) for kind in kinds} for name, shape in shapes.items()
    }
    every = [dict(zip(shapes, choice, strict=True)) for choice in itertools.product(kinds, repeat=4)]
    sizes = [sum(bytes_in_file(shapes[n], k) for n, k in choice.items()) for choice in every]
    for room in (min(sizes), (min(sizes) + max(sizes)) // 2, max(sizes)):
        fits = [choice for choice, size in zip(every, sizes, strict=True) if size <= room]
        best = min(sum(prices[n][k] for n, k in choice.items()) for choice in fits)
        got = assign(shapes, prices, room)
        assert sum(bytes_in_file(shapes[n], k) for n, k in got.items()) <= room
        assert sum(prices[n][k] for n, k in got.items()) == pytest.approx(best, rel=1e-5)


def test_too_small_a_budget_is_refused_with_the_smallest_size() -> None:
    shapes, prices = {"a": (4, 256)}, {"a": {"Q2_K": 1.0, "Q8_0": 0.1}}
    assert assign(shapes, prices, 352) == {"a": "Q2_K"}  # 4 blocks of 84 bytes, padded to a multiple of 32
    with pytest.raises(BadInput, match="smallest types take 352"):
        assign(shapes, prices, 351)


def test_sizes_are_those_of_a_file(tmp_path: Path) -> None:
    shapes = {"a.weight": (3, 256), "b.weight": (5, 512), "c.weight": (2, 3, 256), "d.weight": (1, 96)}
    picked = {"a.weight": "Q6_K", "b.weight": "Q3_K", "c.weight": "Q2_K", "d.weight": "Q5_0"}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[picked[name]]
        n, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // n * size), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    start = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data_offset
    predicted = sum(bytes_in_file(shape, picked[name]) for name, shape in shapes.items())  # type: ignore[arg-type]
    assert (tmp_path / "x.gguf").stat().st_size == start + predicted


def test_candidates_are_the_types_whose_blocks_fill_a_row() -> None:
    assert set(candidates(512)) == set(TYPES)
    assert set(candidates(96)) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert candidates(80) == ("F16",)


def test_fewer_bits_cost_more() -> None:
    make = torch.Generator().manual_seed(0)
    w = torch.randn(80, 256, generator=make) * 0.05
    uses = [Sensitivity(torch.rand(80, generator=make), torch.rand(256, generator=make))]
    found = costs([w], [uses])
    order: list[GgmlType] = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
    assert [found[kind] for kind in order] == sorted(found[kind] for kind in order)
    error = ROUNDERS["rtn"](w, BlockGrid(type="Q3_K", scale_search="activation"), Rtn(), uses[0].columns, None)
    whole = uses[0].cost(error.linear.dequantize() - w, torch.arange(80))
    assert found["Q3_K"] == pytest.approx(whole, rel=0.05)  # from 64 of the 80 rows


def test_experts_are_priced_together() -> None:
    """Each by the tokens it is given: one that no token reaches costs nothing."""
    make = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 256, generator=make) * 0.05 for _ in range(3)]
    uses = [[Sensitivity(torch.rand(16, generator=make), torch.rand(256, generator=make))] for _ in range(2)]
    idle = [Sensitivity(torch.zeros(16), torch.zeros(256))]
    alone = [costs([w], [use]) for w, use in zip(weights, uses, strict=False)]
    found = costs(weights, [*uses, idle])
    for kind in found:
        assert found[kind] == pytest.approx(alone[0][kind] + alone[1][kind], rel=0.2)  # of eight rows or of sixteen
