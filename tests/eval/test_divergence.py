"""Perplexity and divergence against a plain whole-model forward pass."""

from pathlib import Path

import pytest
import torch

from quantpress.eval.divergence import compare, kl_divergence, windows
from quantpress.quantize.checkpoint import Checkpoint
from quantpress.quantize.errors import BadInput
from quantpress.quantize.model import Skeleton
from quantpress.quantize.recipe import Evaluation
from tests.tiny import build, text, tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(("stride", "bos"), [(None, "never"), (10, "never"), (None, "always"), (12, "always")])
def test_equals_a_plain_forward_pass(stride: int | None, bos: str, tmp_path: Path) -> None:
    models = [build("gemma2", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    wanted = Evaluation(windows=3, window=40, stride=stride, bos=bos)
    cut = windows(tokenizer(), text(), "text", wanted)
    originals = [Skeleton(Checkpoint(tmp_path / str(seed)), device=CPU) for seed in (0, 1)]
    results = compare(originals[0], originals[1], cut)

    losses: list[list[torch.Tensor]] = [[], []]
    divergences, same = [], []
    for ids, scored in zip(cut.tokens.ids, cut.scored.tolist(), strict=True):
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids[None]).logits[0, :-1].float(), -1)[-scored:] for m in models)
        for log_probs, out in zip((p, q), losses, strict=True):
            out.append(torch.nn.functional.nll_loss(log_probs, ids[-scored:], reduction="none"))
        divergences.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    first, second = (torch.cat(x) for x in losses)
    assert results["original"]["perplexity"] == pytest.approx(float(first.mean().exp()), rel=1e-4)
    assert results["artifact"]["perplexity"] == pytest.approx(float(second.mean().exp()), rel=1e-4)
    assert results["divergence"]["kl_mean"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert results["divergence"]["top1_agreement"] == pytest.approx(float(torch.cat(same).float().mean()), abs=0.02)
    assert results["text"]["tokens"] == len(first)


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    build("llama", tmp_path)
    one, two = (Skeleton(Checkpoint(tmp_path), device=CPU) for _ in range(2))
    results = compare(one, two, windows(tokenizer(), text(), "text", Evaluation(windows=2, window=32)))
    assert results["divergence"]["kl_max"] == 0
    assert results["divergence"]["top1_agreement"] == 1
    assert results["perplexity_increase"] == 0


def test_each_token_is_scored_once_with_a_stride() -> None:
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=4, window=32, stride=8, bos="never"))
    assert cut.scored.tolist() == [31, 8, 8, 8]
    ids = cut.tokens.ids
    assert torch.equal(ids[0, 8:], ids[1, :-8])


def test_bytes_are_those_of_the_scored_text() -> None:
    words = "ab cd " * 100
    cut = windows(tokenizer(), words, "text", Evaluation(windows=2, window=30, bos="always"))
    assert cut.bytes == len(tokenizer().decode(cut.tokens.ids[:, 1:].reshape(-1)).encode())


def test_short_text_is_refused() -> None:
    with pytest.raises(BadInput, match="gives 0 windows of 1024 tokens, 16 are asked for"):
        windows(tokenizer(), "short", "a.txt", Evaluation())


def test_kl_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * (2**0.5 * 0 + torch.tensor(4 / 3).log().item()), rel=1e-5)
