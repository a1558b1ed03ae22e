"""Norms, gates and rotations by kernels, run by Triton's interpreter on the CPU, beside the models' own code."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from quantpress.models import fused as fusing
from quantpress.models.fused import fused

pytest.importorskip("triton")
from quantpress.models.fused_kernels import rms_norm, rotate, silu_times

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run on the CPU")
CUDA = torch.device("cuda")  # where parts are fused; the tensors of these tests are the CPU's


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def norm(kind: type[Any] = LlamaRMSNorm, width: int = 96) -> Any:
    made = kind(width, eps=1e-5).bfloat16()
    made.weight.data = normal(width, seed=1)
    return made


def mlp() -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=96, intermediate_size=160)).bfloat16()


def attention() -> LlamaAttention:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa")
    return LlamaAttention(config, 0).bfloat16()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were used."""
    used: list[str] = []
    for name in ("_norm", "_gated", "_rotated"):
        kernel = getattr(fusing, name)
        monkeypatch.setattr(fusing, name, lambda *given, k=kernel, n=name: used.append(n) or k(*given))
    return used


@pytest.mark.parametrize("width", [7, 96, 128, 300])
def test_a_norm_has_the_bits_of_the_models_own(width: int) -> None:
    own, x = norm(width=width), normal(3, 50, width)
    x[0, 0], x[0, 1] = 0, 1e4
    got, want = rms_norm(x, own.weight, 1e-5), own(x)
    assert got.shape == want.shape
    assert (got == want).float().mean() > 0.99  # the mean is a sum in another order
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


def test_a_norm_reads_rows_that_do_not_lie_next_to_each_other() -> None:
    own, x = norm(width=32), normal(4, 10, 3, 32)[:, :, 1]
    torch.testing.assert_close(rms_norm(x, own.weight, 1e-5), own(x), rtol=2**-7, atol=0)


def test_a_gate_has_the_bits_of_silu_times_up() -> None:
    gate, up = 20 * normal(70, 90), normal(70, 90, seed=1)
    gate[0, :2] = torch.tensor([-1e4, 1e4])
    got, want = silu_times(gate, up), nn.functional.silu(gate) * up
    assert (got == want).float().mean() > 0.999
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize(("heads", "size", "turns"), [(3, 64, 1), (5, 80, 2), (1, 2, 1)])
def test_a_rotation_has_the_bits_of_the_models_own(heads: int, size: int, turns: int) -> None:
    q, k = normal(2, 10, heads, size).transpose(1, 2), normal(2, 1, 10, size, seed=1)
    cos, sin = normal(turns, 10, size, seed=2), normal(turns, 10, size, seed=3)
    wanted = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for x, want in zip((q, k), wanted, strict=True):
        got = rotate(x, cos, sin)
        assert torch.equal(got, want)
        assert got.transpose(1, 2).is_contiguous()  # as attention reads it


def test_a_rotation_reads_a_slice_of_wider_rows() -> None:
    wide = normal(2, 7, 4 * 32)
    x, cos, sin = wide[..., 32:96].view(2, 7, 2, 32).transpose(1, 2), normal(1, 7, 32, seed=1), normal(1, 7, 32, seed=2)
    assert torch.equal(rotate(x, cos, sin), modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_attention_rotates_by_the_kernel_until_the_end(interpreted: list[str]) -> None:
    own, block = modeling_llama.apply_rotary_pos_emb, attention()
    x, turn = normal(2, 9, 96), (normal(1, 9, 16, seed=1), normal(1, 9, 16, seed=2))
    with torch.no_grad():
        want = block(x, turn, None)[0]
        with fused(block, CUDA), fused(copy.deepcopy(block), CUDA):  # a pass within a pass
            interpreted.clear()
            got = block(x, turn, None)[0]
            assert interpreted == ["_rotated"]
            long = turn[0].float(), turn[1].float()
            assert own(x[:, None, :, :16], x[:, None, :, :16], *long)[0].dtype == torch.float32
            assert modeling_llama.apply_rotary_pos_emb(*[x[:, None, :, :16]] * 2, *long)[0].dtype == torch.float32
    assert torch.equal(got, want)
    assert modeling_llama.apply_rotary_pos_emb is own


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 9, 8), (3, 9, 16)], ids=["one position", "a part", "other samples"])
def test_what_the_kernel_does_not_turn_is_left_to_the_model(shape: tuple[int, ...]) -> None:
    q, turn = normal(2, 3, 9, 16), normal(*shape)
    asked: list[tuple[int, ...]] = []

    def own(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        asked.append(tuple(cos.shape))
        return q

    with torch.no_grad():
        fusing._rotated(own, q, q, turn, turn)
    assert asked == [shape]


def test_gradients_pass_the_models_own_rotation() -> None:
    block, x = attention(), normal(1, 9, 96).requires_grad_()
    with fused(block, CUDA):
        block(x, (normal(1, 9, 16), normal(1, 9, 16)), None)[0].sum().backward()
    assert x.grad is not None


def test_a_rotation_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs of neighbours, of part of the numbers."""
    others = modeling_deepseek_v3.apply_rotary_pos_emb_interleave, modeling_glm.apply_rotary_pos_emb
    for other in others:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        with fused(attention(), CUDA):
            assert modeling_llama.apply_rotary_pos_emb is other


def test_parts_of_a_block_and_of_its_copy_are_fused_until_the_end(interpreted: list[str]) -> None:
    block = nn.ModuleDict({"norm": norm(), "mlp": mlp()})
    x = normal(9, 96)
    with torch.no_grad():
        want = block["mlp"](block["norm"](x))
        with fused(block, CUDA):
            other = copy.deepcopy(block)
            other["norm"].weight.data.mul_(2)
            interpreted.clear()
            got = block["mlp"](block["norm"](x))
            assert interpreted == ["_norm", "_gated"]
            torch.testing.assert_close(other["norm"](x), 2 * block["norm"](x))
        assert torch.equal(block["mlp"](block["norm"](x)), want)
    assert len(interpreted) == 4
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-7 * float(want.abs().max()))


def test_gradients_are_those_of_the_models_own_code(interpreted: list[str]) -> None:
    own = norm()
    with fused(own, CUDA):
        interpreted.clear()
        own(normal(2, 96)).sum().backward()
    assert own.weight.grad is not None
    assert interpreted == []


class _Clamped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "module",
    [norm(GemmaRMSNorm), nn.LayerNorm(96, bias=False).bfloat16(), norm().float(), nn.Linear(96, 96).bfloat16()],
    ids=lambda module: f"{type(module).__name__} {next(module.parameters()).dtype}",
)
def test_what_only_looks_like_them_is_left_alone(module: nn.Module) -> None:
    with fused(module, CUDA):
        assert "forward" not in vars(module)


def test_a_gate_that_clamps_large_numbers_is_left_alone() -> None:
    torch.manual_seed(0)
    module = _Clamped(LlamaConfig(hidden_size=96, intermediate_size=160)).bfloat16()
    with fused(module, CUDA):
        assert "forward" not in vars(module)


def test_nothing_is_fused_on_a_cpu() -> None:
    own = norm()
    with fused(own, torch.device("cpu")):
        assert "forward" not in vars(own)


def test_a_kernel_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fusing, "_norm", fails)
    own = norm()
    with fused(own, CUDA):
        assert "forward" not in vars(own)
