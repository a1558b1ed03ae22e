"""What is known of the inputs that linears share, and the sums it is made of."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpress.calibrate import block_pass
from quantpress.calibrate.block_pass import BlockPass, paired_batches
from quantpress.calibrate.lanes import Lanes
from quantpress.calibrate.moments import add_second_moment, exact_products
from quantpress.models import experts
from quantpress.models.block_arguments import SAMPLES_FIRST, BlockArguments, ModelArguments
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.numbers.activations import round_inputs
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations

from ... import families, tiny
from ...bench import sixteen_bits

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [96, 300])
def test_products_of_sixteen_bit_values_lose_nothing(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    total = torch.zeros(n, n)
    with exact_products(dtype):
        for part in x.split(700):
            add_second_moment(total, part.float())
    after = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before
    wanted = x.double().T @ x.double()
    torch.testing.assert_close(total.triu().double(), wanted.triu(), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(
    "family", ["llama", "by rows", "by outputs", "by outputs, restarting", "mixtral", "qwen2_moe", "experts together"]
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_shared_input_is_what_a_plain_pass_would_see(
    family: str, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sum over every input, each linear changed before the next; batches of more tokens than one product."""
    together, by_rows, restarts = family == "experts together", family == "by rows", family.endswith("restarting")
    by_outputs = family.startswith("by outputs")  # as on a GPU, like "experts together"
    if by_outputs:
        monkeypatch.setattr(block_pass, "sums_by_outputs", lambda weight: len(weight) <= weight.shape[1])
        monkeypatch.setattr(torch, "mm", sixteen_bits.mm)
        monkeypatch.setattr(torch, "addmm", sixteen_bits.addmm)
    if by_rows or by_outputs:
        family = "llama"
    if together:
        family = "qwen2_moe"
        monkeypatch.setattr(experts, "can_group", lambda linears, rows: True)
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(36 * 64).reshape(36, 64) * 7 % tiny.VOCAB
    hidden = skeleton.embed(tokens)
    reference = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    arguments = skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks(0))
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    modules = {x.name: x.module for x in skeleton.linears() if x.block == 0}
    original = copy.deepcopy(block)
    arriving, wanted = (hidden.clone(), reference.clone()), _outputs(original, reference, arguments)
    passing = BlockPass(
        block, hidden, arguments, linears, device=CPU, lanes=Lanes(len(hidden), 20), keep=keep, reference=reference,
        moved=by_rows or by_outputs, restarts=restarts,
    )  # fmt: skip
    seen: list[str] = []
    elsewhere = 0
    for shared in passing:
        name = modules[shared.names[0]]
        seen += shared.names
        x = _inputs(block, name, arriving[0], arguments)
        assert shared.moment is not None
        torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-4, atol=1e-3)
        assert shared.tokens == len(x)
        if ".experts." in name:
            x0 = _of_the_same_tokens(name, block, original, arriving, arguments)
            elsewhere += len(x) != len(_inputs(original, name, arriving[1], arguments))
        else:
            x0 = _inputs(original, name, arriving[1], arguments)
        assert not shared.unmatched
        last = ("down_proj", "o_proj") if by_outputs else "down_proj"
        assert (shared.drift is None) == bool(shared.moved) == ((by_rows or by_outputs) and name.endswith(last))
        if shared.drift is not None:
            torch.testing.assert_close(shared.drift, (x0 - x).T @ x, rtol=1e-4, atol=1e-3)
        for one in shared.names:
            weight = original.get_submodule(modules[one]).weight
            if shared.moved:
                torch.testing.assert_close(shared.moved[one], weight @ (x0 - x).T @ x, rtol=1e-4, atol=1e-3)
            moved = ((x0 - x) @ weight.T).square().sum(0)
            torch.testing.assert_close(shared.drift_power[one], moved, rtol=1e-4, atol=1e-4)
            module: Any = block.get_submodule(modules[one])
            module.weight = nn.Parameter(module.weight * 1.05, requires_grad=False)
    assert sorted(seen) == sorted(linears)
    assert (elsewhere > 0) == (family != "llama")  # the router did send other tokens to some experts
    if keep:
        torch.testing.assert_close(hidden, _outputs(block, arriving[0], arguments))
        assert torch.allclose(reference, wanted, rtol=1e-4, atol=1e-5) if together else torch.equal(reference, wanted)
    else:
        assert torch.equal(hidden, arriving[0])


def test_the_original_waits_where_it_holds_the_least(tmp_path: Path) -> None:
    """After attention's last comparison all of it is done but what enters the experts, or the last linear's input."""
    done_at = {}
    for family in ("llama", "mixtral"):
        tiny.build(family, tmp_path / family)
        skeleton = Skeleton(Checkpoint(tmp_path / family), device=CPU)
        skeleton.open_shell()
        tokens = torch.arange(4 * 16).reshape(4, 16)
        hidden = skeleton.embed(tokens)
        reference, arguments = hidden + 0.1, skeleton.block_arguments(tokens)[0]
        _, block = next(skeleton.blocks(0))
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        wanted = _outputs(block, reference, arguments)
        for shared in BlockPass(
            block, hidden, arguments, linears, device=CPU, lanes=Lanes(len(hidden), 20), reference=reference
        ):
            if torch.equal(reference, wanted):
                done_at.setdefault(family, shared.names[0])
    assert done_at == {"llama": "mlp.down_proj", "mixtral": "self_attn.o_proj"}


class _Halves(nn.Module):
    """Sends the larger half of its tokens through a linear, in a way nobody here knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.some = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x: Tensor = self.first(hidden)
        picked = x[..., 0] > x[..., 0].median()
        out = x.clone()
        out[picked] = self.some(x[picked])
        return out


def test_tokens_that_cannot_be_matched_are_not_compared() -> None:
    """As many tokens of the original reach the linear, but other ones."""
    torch.manual_seed(0)
    block = _Halves().requires_grad_(False)
    hidden = torch.randn(6, 10, 8)
    linears = {"first": block.first, "some": block.some}
    reference = torch.randn(6, 10, 8)
    first, some = BlockPass(
        block, hidden, _none(len(hidden)), linears, device=CPU, lanes=Lanes(len(hidden), 2), reference=reference
    )
    assert first.drift is not None
    assert not first.unmatched
    assert some.tokens == 30
    assert some.drift is None
    assert some.unmatched


def test_a_static_range_is_the_largest_over_all_batches() -> None:
    """Each batch has the largest number of one end, the first and the last neither."""
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    hidden = torch.full((4, 8, 4), 0.5)
    hidden[1, 3, 2], hidden[2, 5, 1] = 9.0, -7.0
    common: dict[str, Any] = {"device": CPU, "lanes": Lanes(len(hidden), 1)}
    for symmetric, wanted in ((True, 9 / 127), (False, 16 / 255)):
        spec = Activations(type="int8", dynamic=False, symmetric=symmetric)
        shared, _ = BlockPass(
            block,
            hidden.clone(),
            _none(len(hidden)),
            {"a": block[0], "b": block[1]},
            activations=dict.fromkeys("ab", (spec, 0)),
            **common,
        )
        assert shared.inputs is not None
        assert shared.inputs.scale is not None
        assert float(shared.inputs.scale) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_paired_batches_are_what_two_plain_passes_see(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(6 * 16).reshape(6, 16)
    hidden = skeleton.embed(tokens)
    reference, arguments = hidden + 0.1 * torch.randn(hidden.shape), skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks(0))
    original = copy.deepcopy(block)
    linears = {x.module: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    for module in linears.values():
        module.weight = nn.Parameter(module.weight * 1.3, requires_grad=False)  # type: ignore[union-attr]
    arriving = hidden.clone(), reference.clone()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    common: dict[str, Any] = {"device": CPU, "batch": 4}
    for names, x, x0 in paired_batches(block, original, linears, hidden, reference, arguments, **common):
        assert x0 is not None
        for name in names:
            found.setdefault(name, []).append((x, x0))
    assert sorted(found) == sorted(linears)
    for name, parts in found.items():
        x, x0 = (torch.cat(part) for part in zip(*parts, strict=True))
        torch.testing.assert_close(x, _inputs(block, name, arriving[0], arguments))
        same = _of_the_same_tokens if ".experts." in name else lambda n, _, o, states, a: _inputs(o, n, states[1], a)
        torch.testing.assert_close(x0, same(name, block, original, arriving, arguments))
    torch.testing.assert_close(hidden, _outputs(block, arriving[0], arguments))
    torch.testing.assert_close(reference, _outputs(original, arriving[1], arguments))
    assert not any(module._forward_pre_hooks for module in (*block.modules(), *original.modules()))


def test_what_moves_a_bfloat16_model_is_summed_to_its_precision() -> None:
    """Moments are exact products; the drift's factors and partial sums are rounded to bfloat16, which has 8 bits."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, 96, generator=g).bfloat16()
    reference = (hidden + 0.05 * torch.randn(hidden.shape, generator=g)).bfloat16()
    x, x0 = hidden.double().flatten(0, 1), reference.double().flatten(0, 1)
    block = nn.Sequential(nn.Linear(96, 96, dtype=torch.bfloat16))
    common: dict[str, Any] = {"device": CPU, "lanes": Lanes(len(hidden), 20), "reference": reference}
    (shared,) = BlockPass(block, hidden, _none(len(hidden)), {"0": block[0]}, **common)
    assert shared.moment is not None
    assert shared.drift is not None
    torch.testing.assert_close(shared.moment.double(), x.T @ x, rtol=1e-5, atol=1e-3)
    wanted = (x0 - x).T @ x
    assert (shared.drift - wanted).norm() < 2**-8 * wanted.norm()


def test_a_pass_for_diagonals_and_one_with_rounded_inputs_see_the_same_as_a_plain_one(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.arange(24 * 64).reshape(24, 64) * 7 % tiny.VOCAB
    hidden = skeleton.embed(tokens)
    arguments = skeleton.block_arguments(tokens)[0]
    _, block = next(skeleton.blocks(0))
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    common: dict[str, Any] = {"device": CPU, "lanes": Lanes(len(hidden), 20)}
    for shared in BlockPass(block, hidden.clone(), arguments, linears, keep=False, diagonal=True, **common):
        x = _inputs(block, shared.names[0], hidden, arguments)
        assert shared.moment is not None
        torch.testing.assert_close(shared.moment, x.square().sum(0), rtol=1e-4, atol=1e-4)

    spec = Activations(type="int8")
    rounded = copy.deepcopy(block)
    for name in linears:
        rounded.get_submodule(name).register_forward_pre_hook(lambda _, args: (round_inputs(args[0], Inputs(spec, 0)),))
    made = hidden.clone()
    for shared in BlockPass(block, made, arguments, linears, activations=dict.fromkeys(linears, (spec, 0)), **common):
        x = _inputs(rounded, shared.names[0], hidden, arguments)  # this hook comes after the one that rounds
        assert shared.moment is not None
        torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(made, _outputs(rounded, hidden, arguments))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2", "qwen3_moe"])
def test_moments_are_those_of_each_linears_own_input(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.randint(tiny.VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    own: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, a, n=n: own.setdefault(n, []).append(a[0].reshape(-1, a[0].shape[-1])))
        for n, m in linears.items()
    ]
    run_block(block, hidden.clone(), arguments[0], device=CPU, batch=2)
    for handle in handles:
        handle.remove()
    expected = hidden.clone()
    run_block(block, expected, arguments[0], device=CPU, batch=2)
    passing = list(
        BlockPass(
            block, hidden, arguments[0], linears, device=CPU, lanes=Lanes(len(hidden), 2), reference=hidden.clone()
        )
    )
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert sorted(name for shared in passing for name in shared.names) == sorted(linears)
    for shared in passing:
        for name in shared.names:
            x = torch.cat(own[name])
            assert shared.tokens == len(x)
            assert shared.moment is not None
            torch.testing.assert_close(shared.moment, x.T @ x, rtol=1e-4, atol=1e-4)
        assert shared.drift is not None
        assert not shared.drift.any()
    shared = len(linears) - len(passing)
    assert shared == {"llama": 3, "phi3": 0, "gpt_neox": 0, "gpt2": 0, "qwen3_moe": 2 + 4}[family]


def test_a_block_pass_goes_on_with_what_was_rounded(tmp_path: Path) -> None:
    """Weights replaced at a halt are the ones the pass goes on with; the reference keeps the original ones."""
    tiny.build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.randint(tiny.VOCAB, (5, 16), generator=torch.Generator().manual_seed(0))
    start, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    original, reference, hidden = start.clone(), start.clone(), start.clone()
    run_block(block, original, arguments[0], device=CPU, batch=2)
    drifted = []
    for shared in BlockPass(
        block, hidden, arguments[0], linears, device=CPU, lanes=Lanes(len(hidden), 2), reference=reference
    ):
        assert shared.drift is not None
        drifted.append(bool(shared.drift.any()))
        for name in shared.names:
            linears[name].weight = torch.nn.Parameter(linears[name].weight * 0.9, requires_grad=False)
    assert drifted == [False, True, True, True]  # q/k/v, o, gate/up, down
    torch.testing.assert_close(reference, original, rtol=0, atol=0)
    propagated = start.clone()
    run_block(block, propagated, arguments[0], device=CPU, batch=2)
    torch.testing.assert_close(hidden, propagated, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_block_pass_given_up_leaves_no_trace(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=CPU)
    skeleton.open_shell()
    tokens = torch.zeros(3, 8, dtype=torch.int64)
    hidden, arguments = skeleton.embed(tokens), skeleton.block_arguments(tokens)
    before = hidden.clone()
    _, block = next(skeleton.blocks())
    linears = {x.name: block.get_submodule(x.module) for x in skeleton.linears() if x.block == 0}
    passing = BlockPass(block, hidden, arguments[0], linears, device=CPU, lanes=Lanes(len(hidden), 2)).__iter__()
    next(passing)
    passing.close()  # what an exception in the caller comes to
    assert torch.equal(hidden, before)
    assert not any(module._forward_pre_hooks for module in block.modules())


def _none(samples: int) -> BlockArguments:
    """Of a block that takes nothing but hidden states."""
    return ModelArguments(torch.zeros(samples, 1), CPU, [((), {})], None, SAMPLES_FIRST, (8,))[0]


def _outputs(block: nn.Module, hidden: Tensor, arguments: Any) -> Tensor:
    """What the block makes of hidden [samples, seq_len, hidden], in the batches of the test."""
    args, kwargs = arguments.of(slice(0, 1))
    with torch.no_grad():
        made = [block(part, *args, **kwargs) for part in hidden.split(20)]
    return torch.cat([x[0] if isinstance(x, tuple) else x for x in made])


def _inputs(block: nn.Module, name: str, hidden: Tensor, arguments: Any) -> Tensor:
    """All that linear `name` receives [tokens, in]."""
    seen: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _outputs(block, hidden, arguments)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def _of_the_same_tokens(
    name: str, block: nn.Module, original: nn.Module, arriving: tuple[Tensor, Tensor], arguments: Any
) -> Tensor:
    """What the original's expert would give linear `name` for the tokens that `block` routes to that expert."""
    where, _, rest = name.partition(".experts.")
    e, linear = rest.split(".")
    calls: dict[str, list[tuple[Tensor, ...]]] = {"block": [], "original": []}
    handles = [
        one.get_submodule(f"{where}.experts").register_forward_pre_hook(lambda _, args, k=k: calls[k].append(args))
        for k, one in (("block", block), ("original", original))
    ]
    for one, states in zip((block, original), arriving, strict=True):
        _outputs(one, states, arguments)
    for handle in handles:
        handle.remove()
    x0 = torch.cat(
        [
            entering[(chosen == int(e)).any(1)]
            for (_, chosen, _), (entering, _, _) in zip(calls["block"], calls["original"], strict=True)
        ]
    )
    expert: Any = original.get_submodule(f"{where}.experts.{e}")
    if linear not in ("w2", "down_proj"):
        return x0
    gate, up = (expert.w1, expert.w3) if linear == "w2" else (expert.gate_proj, expert.up_proj)
    return nn.functional.silu(x0 @ gate.weight.T) * (x0 @ up.weight.T)


@pytest.mark.parametrize("family", ["gemma4_text", "zaya"])
def test_what_blocks_hand_on_goes_with_its_own_states(family: str, tmp_path: Path) -> None:
    families.build(family, tmp_path, torch.float32)
    tokens = torch.randint(tiny.VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))

    def skeleton() -> Skeleton:
        opened = Skeleton(Checkpoint(tmp_path), device=CPU)
        opened.open_shell()
        return opened

    def alone(entering: Tensor) -> Tensor:
        one, states = skeleton(), entering.clone()
        arguments = one.block_arguments(tokens)
        assert arguments.hands_on
        for k, block in one.blocks():
            run_block(block, states, arguments[k], device=CPU, batch=2)
        return states

    model = skeleton()
    hidden, arguments = model.embed(tokens), model.block_arguments(tokens)
    reference = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    wanted = alone(hidden), alone(reference)
    for k, block in model.blocks():
        linears = {x.name: block.get_submodule(x.module) for x in model.linears() if x.block == k}
        for _ in BlockPass(
            block, hidden, arguments[k], linears, device=CPU, lanes=Lanes(len(hidden), 2), reference=reference
        ):
            pass
        if k == 2:  # as a run that is stopped here and resumed
            kept, arguments = arguments.carried(k), model.block_arguments(tokens)
            assert kept
            arguments.restore(k, kept)
    torch.testing.assert_close(hidden, wanted[0])
    torch.testing.assert_close(reference, wanted[1])
