"""What servers refuse of the number types in compressed-tensors files, said before the work."""

import pytest

from quantpress.export.contracts import servability
from quantpress.quantize.recipe import Activations, Grid

INT8, FP8 = Activations(type="int8"), Activations(type="fp8")
W8, W4 = Grid(bits=8, group_size=-1), Grid(group_size=128)


def lints(grid: Grid, activations: Activations | None = None, name: str = "model.layers.0.mlp.up_proj") -> list[str]:
    return servability(
        ["compressed-tensors"], {name: (512, 512)}, {name: grid}, shuffled=False, activations=activations
    )


@pytest.mark.parametrize(
    ("grid", "activations"),
    [(W4, None), (W8, INT8), (W8, Activations(type="int8", dynamic=False, symmetric=False)), (W4, INT8)],
    ids=str,
)
def test_nothing_is_said_of_what_vllm_loads(grid: Grid, activations: Activations | None) -> None:
    assert lints(grid, activations) == []


@pytest.mark.parametrize(
    ("grid", "activations", "said"),
    [
        (W8, None, "no kernel for int8 channel sym weights with 16-bit activations"),
        (Grid(group_size=-1), None, "fails on int4 channel sym weights with its default kernel"),
        (Grid(type="fp8"), FP8, "no kernel for fp8 weights"),
        (Grid(type="nvfp4"), None, "no kernel for nvfp4 weights"),
        (Grid(bits=8, group_size=64), INT8, "set weights.group_size: -1"),
        (Grid(bits=8, group_size=-1, symmetric=False), INT8, "set weights.symmetric: true"),
        (W4, Activations(type="int8", dynamic=False), "leave activations.dynamic out"),
        (W4, FP8, "on Hopper GPUs only"),
    ],
    ids=str,
)
def test_one_line_says_what_vllm_refuses(grid: Grid, activations: Activations | None, said: str) -> None:
    (line,) = lints(grid, activations)
    assert said in line
    assert "vLLM" in line


def test_hopper_wants_group_128() -> None:
    assert any("set weights.group_size: 128" in line for line in lints(Grid(group_size=64), FP8))


@pytest.mark.parametrize(
    ("grid", "activations", "said"),
    [
        (Grid(type="nvfp4"), None, "answers wrongly"),
        (Grid(type="mxfp8"), None, "does not load experts of mxfp8"),
        (W8, INT8, "does not load experts of int8"),
        (Grid(type="fp8"), FP8, "leaves the inputs of experts in 16 bit"),
    ],
    ids=str,
)
def test_experts_are_for_vllm(grid: Grid, activations: Activations | None, said: str) -> None:
    assert any(said in line for line in lints(grid, activations, "model.layers.0.mlp.experts.3.up_proj"))
    assert not any(said in line for line in lints(grid, activations))


@pytest.mark.parametrize(
    ("grid", "most"),
    [(Grid(group_size=64), 2), (Grid(group_size=-1), 8), (Grid(type="fp8", group_size=0), 8), (Grid(type="mxfp4"), 4)],
    ids=str,
)
def test_tensor_parallelism_ends_where_a_group_would_be_cut(grid: Grid, most: int) -> None:
    name = "model.layers.0.mlp.down_proj"
    lines = servability(("compressed-tensors",), {name: (512, 1408)}, {name: grid}, shuffled=False)
    said = [line for line in lines if "tensor parallelism" in line]
    assert said == [] if most == 8 else said[0].startswith(f"tensor parallelism up to {most}:")
