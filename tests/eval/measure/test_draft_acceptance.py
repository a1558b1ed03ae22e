"""Acceptance of a draft against the algorithm of the paper, drawn token by token."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.eval.measure.divergence import last_hidden, windows
from quantpress.eval.measure.draft_acceptance import DRAFTED, measure_draft, rates, tokens_a_pass
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.recipe import Evaluation

from ...tiny import FAMILIES, build, text, tokenizer

CPU = torch.device("cpu")
CUT = windows(tokenizer(), text(), "text", Evaluation(windows=3, window=40, stride=30))


def test_rates_are_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    models = [build("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    pair = tuple(Skeleton(Checkpoint(tmp_path / str(seed)), device=CPU) for seed in (0, 1))
    hidden = tuple(last_hidden(model, CUT.tokens.ids, lambda: None) for model in pair)
    sampled, greedy = rates(pair, hidden, CUT)  # type: ignore[arg-type]
    expected: list[float] = []
    same: list[bool] = []
    for ids, scored in zip(CUT.tokens.ids, CUT.scored.tolist(), strict=True):
        with torch.no_grad():
            p, q = (m(ids[None]).logits[0, -1 - scored : -1].softmax(-1) for m in models)
        expected += [sum(min(float(a), float(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    np.testing.assert_allclose(sampled, expected, atol=1e-5)
    assert greedy.tolist() == same
    assert 0 < sampled.mean() < 1


def test_the_sum_of_minima_is_how_often_the_sampling_of_the_paper_accepts() -> None:
    """Algorithm 1: x from q is kept when a number below 1 is at most p(x) / q(x)."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(12, generator=g).softmax(-1) for _ in range(2))
    x = torch.multinomial(q, 200_000, replacement=True, generator=g)
    accepted = torch.rand(len(x), generator=g) <= p[x] / q[x]
    assert float(accepted.float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.005)


def test_tokens_a_pass_are_those_of_drafting_and_checking() -> None:
    generator = np.random.default_rng(0)
    rate = generator.random(90)
    plain = []
    for first, length in ((0, 50), (50, 40)):
        for start in range(first, first + length - 3 + 1):
            kept, total = 1.0, 1.0
            for k in range(3):
                kept *= rate[start + k]
                total += kept
            plain.append(total)
    assert tokens_a_pass(rate, [50, 40], 3) == pytest.approx(np.mean(plain))


@pytest.mark.parametrize("drafted", DRAFTED)
def test_one_rate_everywhere_gives_equation_1(drafted: int) -> None:
    assert tokens_a_pass(np.full(30, 0.8), [30], drafted) == pytest.approx((1 - 0.8 ** (drafted + 1)) / (1 - 0.8))


def test_a_model_drafts_perfectly_for_itself_and_less_so_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        build("llama", tmp_path / str(seed), seed=seed)
    seen: list[int] = []
    itself = measure_draft(tmp_path / "0", tmp_path / "0", CUT, tmp_path / "cache", seen.append)
    assert itself.greedy.rate == 1
    assert itself.sampled.rate == pytest.approx(1, abs=1e-6)
    assert itself.sampled.tokens_a_pass[4] == pytest.approx(5, abs=1e-4)
    assert seen == [4] * 4
    other = measure_draft(tmp_path / "0", tmp_path / "1", CUT, tmp_path / "cache")
    assert other.sampled.rate < 0.99
    assert other.sampled.stderr > 0
    assert other.sampled.interval is not None
    assert other.sampled.interval[0] < other.sampled.rate < other.sampled.interval[1]
    assert other.greedy.rate < itself.greedy.rate
    assert (other.original_bytes, other.artifact_bytes) == (itself.original_bytes, itself.artifact_bytes)
    assert json.loads(other.model_dump_json())["text"]["windows"] == 3
    name, settings = FAMILIES["gpt2"]
    monkeypatch.setitem(FAMILIES, "gpt2", (name, settings | {"vocab_size": 300}))
    build("gpt2", tmp_path / "gpt2")
    with pytest.raises(BadInput, match="vocabularies differ"):
        measure_draft(tmp_path / "0", tmp_path / "gpt2", CUT, tmp_path / "cache")
