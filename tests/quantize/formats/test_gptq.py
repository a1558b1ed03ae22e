"""GPTQ files, read by the published rule said again in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantpress.core.errors import BadInput
from quantpress.formats import FORMATS, ModelScheme
from quantpress.numbers.grid import Grid

from .records import GPTQ_GRIDS, equal, record

GPTQ, V1 = FORMATS["gptq"], FORMATS["gptq-v1-asymmetric"]
FOUR = Grid(group_size=32)


def along(words: Any, bits: int) -> Any:
    """Codes [n, columns] in uint32 [n*bits/32, columns], as AutoGPTQ's own reader takes them out."""
    if bits != 3:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
        return (words[:, None, :] >> shifts & ((1 << bits) - 1)).reshape(-1, words.shape[1])
    codes = []  # 32 codes in three words: ten, one across the border, ten, one across the border, ten
    for a, b, c in words.reshape(-1, 3, words.shape[1]):
        codes += [a >> s & 7 for s in range(0, 30, 3)] + [a >> 30 | (b & 1) << 2]
        codes += [b >> s & 7 for s in range(1, 31, 3)] + [b >> 31 | (c & 3) << 1]
        codes += [c >> s & 7 for s in range(2, 32, 3)]
    return np.stack(codes)


def published(tensors: dict[str, Tensor], bits: int, *, version: int) -> Any:
    """The weight [out, in], float32: scales[g] * (q - z), z one higher than stored in version 1."""
    codes = along(tensors["x.qweight"].numpy().view(np.uint32), bits).astype(np.int64)
    zeros = along(np.ascontiguousarray(tensors["x.qzeros"].numpy().view(np.uint32).T), bits).T.astype(np.int64)
    groups = tensors["x.g_idx"].numpy()
    scales = tensors["x.scales"].numpy().astype(np.float32)
    zeros = zeros + 1 if version == 1 else zeros
    return (scales[groups] * (codes - zeros[groups]).astype(np.float32)).T


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("grid", GPTQ_GRIDS, ids=str)
def test_the_published_rule_gives_our_weights(grid: Grid, shuffled: bool) -> None:
    q = record(grid, 32, 96, shuffled=shuffled and grid.group_size != -1)
    tensors = GPTQ.pack("x", q)
    assert (published(tensors, grid.bits, version=1 if grid.symmetric else 2) == q.dequantize().numpy()).all()
    dtypes = {name.removeprefix("x."): tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}


def test_scattered_groups_come_back() -> None:
    q = record(FOUR, 32, 96, dtype=torch.float16, shuffled=True)
    assert q.g_idx is not None
    assert equal(GPTQ.unpack("x", GPTQ.pack("x", q).__getitem__, FOUR, (32, 96)), q)


def test_a_symmetric_model_is_version_1_and_an_asymmetric_one_version_2() -> None:
    asymmetric = FOUR.model_copy(update={"symmetric": False})
    assert GPTQ.config(ModelScheme({"x": FOUR}))["checkpoint_format"] == "gptq"
    assert GPTQ.config(ModelScheme({"x": asymmetric}))["checkpoint_format"] == "gptq_v2"
    with pytest.raises(BadInput, match="cannot hold symmetric and asymmetric layers in one model"):
        GPTQ.config(ModelScheme({"x": FOUR, "y": asymmetric}))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_version_1_is_read(bits: int) -> None:
    """Zeros stored one lower, 0 as all ones, as older tools wrote them."""
    grid = Grid.model_validate({"bits": bits, "group_size": 32, "symmetric": False})
    q = record(grid, 32, 96, dtype=torch.float16)
    lower = record(grid, 32, 96, dtype=torch.float16)
    lower.zeros.copy_((q.zeros.int() - 1) & grid.levels)
    tensors = GPTQ.pack("x", lower)
    assert equal(V1.unpack("x", tensors.__getitem__, grid, (32, 96)), q)
    with pytest.raises(BadInput, match="only read"):
        V1.pack("x", q)


def test_the_zeros_of_a_symmetric_file_must_be_the_middle() -> None:
    q = record(FOUR, 32, 64)
    version_2 = record(FOUR, 32, 64)
    version_2.zeros.add_(1)  # stored one lower, that is 8 itself
    read = GPTQ.unpack("x", GPTQ.pack("x", version_2).__getitem__, FOUR, (32, 64))
    assert torch.equal(read.zeros, q.zeros)
    version_2.zeros[3, 1] = 3
    with pytest.raises(BadInput, match=r"x\.qzeros: the config says symmetric, and the zeros are not 8"):
        GPTQ.unpack("x", GPTQ.pack("x", version_2).__getitem__, FOUR, (32, 64))


@pytest.mark.parametrize("scale", [1e-7, 1e5])
def test_scales_that_float16_cannot_hold_are_refused(scale: float) -> None:
    q = record(FOUR, 32, 64)
    q.scales[2, 1] = scale
    with pytest.raises(BadInput, match=r"x: gptq stores scales in float16, and .*bfloat16.* is not exact"):
        GPTQ.pack("x", q)


@pytest.mark.parametrize(
    ("bits", "n_out", "n_in", "message"),
    [
        (4, 36, 64, "out_features 36, which is not a multiple of 8"),
        (3, 48, 96, "out_features 48, which is not a multiple of 32"),
        (3, 64, 112, "in_features 112, which is not a multiple of 32"),
        (2, 24, 64, "out_features 24, which is not a multiple of 16"),
        (8, 6, 64, "out_features 6, which is not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fill_words_are_refused(bits: int, n_out: int, n_in: int, message: str) -> None:
    grid = Grid.model_validate({"bits": bits, "group_size": 16})
    with pytest.raises(BadInput, match=message):
        GPTQ.check(grid, n_out, n_in, False)
    with pytest.raises(BadInput, match=message):
        GPTQ.pack("x", record(grid, n_out, n_in))


def test_a_group_that_does_not_exist_is_refused() -> None:
    tensors = GPTQ.pack("x", record(FOUR, 32, 64))
    tensors["x.g_idx"][5] = 2
    with pytest.raises(BadInput, match=r"x\.g_idx: names groups 0 to 2 where there are 2"):
        GPTQ.unpack("x", tensors.__getitem__, FOUR, (32, 64))


def test_the_config_is_what_readers_expect() -> None:
    names = [f"model.layers.{k}.{p}" for k in range(2) for p in ("q_proj", "k_proj", "v_proj", "down_proj")]
    schemes: dict[str, Grid | None] = {n: FOUR if "down" in n else FOUR.model_copy(update={"bits": 8}) for n in names}
    schemes |= {f"model.layers.{k}.{p}": FOUR for k in range(2) for p in ("up_proj", "o_proj")}
    schemes["model.layers.0.o_proj"] = None
    assert GPTQ.config(ModelScheme(schemes, outside=["lm_head", "model.layers.0.gate"], shuffled=True)) == {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {
            r"+:^model\.layers\.\d+\.down_proj$": {"bits": 4, "group_size": 32, "sym": True},
            r"+:^model\.layers\.\d+\.up_proj$": {"bits": 4, "group_size": 32, "sym": True},
            r"-:^model\.layers\.0\.o_proj$": {},
            r"+:^model\.layers\.1\.o_proj$": {"bits": 4, "group_size": 32, "sym": True},
            r"-:^model\.layers\.\d+\.gate$": {},
        },
    }


def test_a_server_that_fuses_finds_the_rule() -> None:
    """One rule each for q_proj, k_proj, v_proj, and one for the qkv_proj a server makes of them."""
    eight = FOUR.model_copy(update={"bits": 8})
    names = [f"a.{k}.{p}" for k in range(2) for p in ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "o_proj")]
    schemes: dict[str, Grid | None] = {n: eight if n[-6] in "qkv" else FOUR for n in names}
    schemes |= {f"a.{k}.down_proj": FOUR for k in range(9)}
    schemes["a.1.up_proj"] = None
    rules = list(GPTQ.config(ModelScheme(schemes))["dynamic"])
    assert r"+:^a\.\d+\.qkv_proj$" in rules
    assert not any("gate_up_proj" in rule for rule in rules)


def test_configs_of_other_tools_are_read() -> None:
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert GPTQ.grids(config, ["a.b"]) == {"a.b": Grid()}
    config["dynamic"] = {r".*\.1\..*": {"bits": 8}, r"+:.*\.1\..*": {"bits": 2}, r"-:.*\.2\.": {}}
    assert GPTQ.grids(config, ["a.0.b", "a.1.b", "a.2.b"]) == {"a.0.b": Grid(), "a.1.b": Grid(bits=8), "a.2.b": None}
    config["modules_in_block_to_quantize"] = [["mlp.up"], ["mlp.down"]]
    assert GPTQ.grids(config, ["a.0.mlp.up", "a.0.attn.q"]) == {"a.0.mlp.up": Grid(), "a.0.attn.q": None}
    with pytest.raises(BadInput, match="quantized to 4 bits, group size 5"):
        GPTQ.grids(config | {"group_size": 5}, ["a.0.mlp.up"])
    with pytest.raises(BadInput, match="needs `bits` and `group_size`"):
        GPTQ.grids({"quant_method": "gptq"}, ["a"])
    with pytest.raises(BadInput, match="not a regular expression"):
        GPTQ.grids(config | {"dynamic": {"-:[": {}}}, ["a"])
