"""Perplexity and divergence against a plain whole-model forward pass, and the kept reference."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.eval.measure import reference as references
from quantpress.eval.measure.divergence import (
    TokenScores,
    Windows,
    compare,
    divergence,
    kl_divergence,
    last_hidden,
    perplexity_increase,
    quality,
    windows,
)
from quantpress.eval.measure.reference import reference
from quantpress.eval.measure.statistics import around, quantile_interval, standard_error
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.recipe import Evaluation

from ...tiny import build, text, tokenizer

CPU = torch.device("cpu")


def scores_of(models: tuple[Skeleton, Skeleton], cut: Windows) -> TokenScores:
    first, second = (last_hidden(model, cut.tokens.ids, lambda: None) for model in models)
    return compare(models, (first, second), cut)


def open_tiny(folder: Path) -> Skeleton:
    return Skeleton(Checkpoint(folder), device=CPU)


@pytest.mark.parametrize(("stride", "bos"), [(None, "never"), (10, "never"), (None, "always"), (12, "always")])
def test_equals_a_plain_forward_pass(stride: int | None, bos: Any, tmp_path: Path) -> None:
    models = [build("gemma2", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=3, window=40, stride=stride, bos=bos))
    scores = scores_of((open_tiny(tmp_path / "0"), open_tiny(tmp_path / "1")), cut)

    plain: dict[str, list[torch.Tensor]] = {"first": [], "second": [], "kl": [], "same": [], "top": []}
    for ids, scored in zip(cut.tokens.ids, cut.scored.tolist(), strict=True):
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids[None]).logits[0, :-1].float(), -1)[-scored:] for m in models)
        for log_probs, name in ((p, "first"), (q, "second")):
            plain[name].append(torch.nn.functional.nll_loss(log_probs, ids[-scored:], reduction="none"))
        plain["kl"].append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        plain["same"].append(p.argmax(-1) == q.argmax(-1))
        plain["top"].append(p.max(-1).values.exp())
    first, second, kl, same, top = (torch.cat(parts).double().numpy() for parts in plain.values())
    np.testing.assert_allclose(scores.original_nll, first, atol=1e-4)
    np.testing.assert_allclose(scores.artifact_nll, second, atol=1e-4)
    np.testing.assert_allclose(scores.kl, kl, atol=1e-5)
    np.testing.assert_allclose(scores.confidence, top, atol=1e-5)
    assert np.mean(scores.same == same) > 0.98

    measured = quality(scores.artifact_nll, cut, 7)
    assert measured.perplexity == pytest.approx(math.exp(second.mean()), rel=1e-4)
    assert measured.bits_per_byte == pytest.approx(second.sum() / math.log(2) / cut.bytes, rel=1e-4)
    assert measured.byte_perplexity == pytest.approx(math.exp(second.sum() / cut.bytes), rel=1e-4)
    assert divergence(scores).kl_p90 == pytest.approx(float(np.quantile(kl, 0.9)), rel=1e-3)
    assert cut.record().tokens == len(first)
    assert cut.record().bos is (bos == "always")


@pytest.mark.parametrize("size", [4 * 301, 300])  # tiles of four rows, the last of one; less than a row
def test_tiles_on_a_cpu_equal_the_comparison_as_a_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantpress.eval.measure.divergence import _compare, _tiles

    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 21, 301, generator=g)
    target = torch.randint(301, (21,), generator=g)
    monkeypatch.setattr("quantpress.eval.measure.divergence._TILE", size)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for tiled, whole in zip(_tiles(pool, p, q, target), _compare(p, q, target), strict=True):
            torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=1e-5)
    assert torch.get_num_threads() == before  # a worker's setting is its own


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    build("llama", tmp_path)
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=2, window=32))
    scores = scores_of((open_tiny(tmp_path), open_tiny(tmp_path)), cut)
    assert scores.kl.max() == 0
    assert scores.same.all()
    assert perplexity_increase(scores.original_nll, scores.artifact_nll, cut) == (0.0, (0.0, 0.0))


def test_an_artifact_that_fell_apart_is_infinitely_worse() -> None:
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=2, window=32))
    before, n = np.full(62, 3.0), 62
    for after in (np.full(n, np.inf), np.full(n, 1e4)):
        assert perplexity_increase(before, after, cut)[0] == math.inf
        assert quality(after, cut, 1).perplexity == math.inf


def test_the_buckets_hold_every_token_once_by_the_originals_confidence() -> None:
    confidence = np.array([0.05, 0.1, 0.3, 0.6, 0.95, 1.0])
    kl = np.arange(6.0)
    scores = TokenScores(kl, kl, kl, np.array([True, False, True, True, True, False]), confidence, np.arange(6))
    buckets = divergence(scores).confidence
    assert [(b.low, b.high, b.tokens, b.kl_mean) for b in buckets] == [
        (0.0, 0.1, 1, 0.0), (0.1, 0.25, 1, 1.0), (0.25, 0.5, 1, 2.0), (0.5, 0.75, 1, 3.0), (0.9, 1.0, 2, 4.5),
    ]  # fmt: skip
    assert buckets[-1].top1_agreement == 0.5


def test_the_figures_of_a_divergence_are_those_of_its_tokens() -> None:
    make = np.random.default_rng(0)
    kl, run, same = make.exponential(size=320), np.repeat(np.arange(20), 16), make.random(320) < 0.9
    found = divergence(TokenScores(kl, kl, kl, same, np.full(320, 0.6), run))
    assert (found.kl_mean, found.kl_max) == (kl.mean(), kl.max())
    assert (found.kl_median, found.kl_p90, found.kl_p99) == tuple(np.quantile(kl, [0.5, 0.9, 0.99]))
    assert found.kl_p99_interval == quantile_interval(kl, 0.99, run)
    assert found.kl_stderr == standard_error(kl, run)
    assert found.kl_interval == around(kl.mean(), standard_error(kl, run), 20)
    assert found.top1_agreement == same.mean()
    assert found.top1_stderr == standard_error(same.astype(float), run)
    assert found.top1_interval == around(same.mean(), standard_error(same.astype(float), run), 20)
    (bucket,) = found.confidence
    assert (bucket.low, bucket.high, bucket.tokens) == (0.5, 0.75, 320)
    assert (bucket.kl_mean, bucket.top1_agreement) == (kl.mean(), same.mean())
    assert bucket.kl_stderr == standard_error(kl, run)


def test_the_increase_of_the_perplexity_has_the_interval_of_the_paired_difference() -> None:
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=8, window=32, bos="always"))
    make = np.random.default_rng(0)
    before = make.exponential(size=8 * 31)
    off = make.normal(0.1, 0.2, size=8 * 31)
    increase, interval = perplexity_increase(before, before + off, cut)
    ends = around(off.mean(), standard_error(off, cut.runs), int(cut.runs.max()) + 1)
    assert ends is not None
    assert increase == pytest.approx(math.exp(off.mean()) - 1)
    assert interval == pytest.approx((math.exp(ends[0]) - 1, math.exp(ends[1]) - 1))
    measured = quality(before, cut, 9)
    assert (measured.nll, measured.nll_stderr, measured.bytes) == (before.mean(), standard_error(before, cut.runs), 9)
    assert measured.stderr == pytest.approx(math.exp(before.mean()) * measured.nll_stderr)
    record = cut.record()
    assert (record.windows, record.window, record.stride, record.source) == (8, 32, 31, "text")
    assert (record.tokens, record.bytes, record.sha256) == (8 * 31, cut.bytes, cut.tokens.sha256)


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
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * (math.log(2) + math.log(2 / 3)), rel=1e-5)


# ---- the kept reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_is_kept_bit_for_bit_and_not_computed_twice(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model", dtype)
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=3, window=32, bos="always"))
    plain = last_hidden(open_tiny(tmp_path / "model"), cut.tokens.ids, lambda: None)
    blocks: list[int] = []
    first, noise = reference(open_tiny(tmp_path / "model"), tmp_path / "model", cut, tmp_path, lambda: blocks.append(1))
    assert torch.equal(first, plain)
    assert len(blocks) == 2
    if dtype == torch.bfloat16:
        assert "bfloat16 against float32" in noise.what
        assert 0 < noise.kl_mean < 1e-2
    else:
        assert "one window at a time" in noise.what
        assert noise.kl_mean < 1e-6

    monkeypatch.setattr(references, "last_hidden", lambda *_: pytest.fail("computed again"))
    skeleton = open_tiny(tmp_path / "model")
    again, same = reference(skeleton, tmp_path / "model", cut, tmp_path, lambda: blocks.append(1))
    assert torch.equal(again, plain)
    assert same == noise
    assert len(blocks) == 4
    assert compare((skeleton, skeleton), (again, again), cut).kl.max() == 0  # the shell is open


def test_other_weights_or_other_text_are_another_reference(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    wanted = Evaluation(windows=2, window=32)
    cuts = [windows(tokenizer(), text(), "a", wanted), windows(tokenizer(), text()[1:], "b", wanted)]
    seen = [reference(open_tiny(tmp_path / "model"), tmp_path / "model", cut, tmp_path)[0].clone() for cut in cuts]
    build("llama", tmp_path / "model", seed=1)
    seen.append(reference(open_tiny(tmp_path / "model"), tmp_path / "model", cuts[0], tmp_path)[0].clone())
    assert len({json.dumps(one.double().sum().item()) for one in seen}) == 3


def test_another_dtype_or_other_libraries_are_another_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model")
    cut = windows(tokenizer(), text(), "a", Evaluation(windows=2, window=32))

    def made(dtype: torch.dtype) -> torch.Tensor:
        model = Skeleton(Checkpoint(tmp_path / "model"), device=CPU, dtype=dtype)
        found = reference(model, tmp_path / "model", cut, tmp_path)[0].clone()
        assert torch.equal(found, last_hidden(model, cut.tokens.ids, lambda: None))
        return found

    def places() -> int:
        return len(list((tmp_path / "reference").iterdir()))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert made(dtype).dtype == dtype
    assert places() == 3
    now = machine.libraries()
    for number, name in enumerate(("torch", "transformers"), 4):
        monkeypatch.setattr(machine, "libraries", lambda name=name: now | {name: "0.1"})
        made(torch.float32)
        assert places() == number


@pytest.mark.parametrize(("asked", "used"), [(3, 3), (6, 4)])
def test_the_noise_floor_is_measured_on_the_first_four_windows(asked: int, used: int, tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=asked, window=32, stride=8))
    _, noise = reference(open_tiny(tmp_path / "model"), tmp_path / "model", cut, tmp_path)
    tokens = int(cut.scored[:used].sum())
    assert noise.what == f"bfloat16 against float32, {tokens:,} tokens"
    half, whole = (
        Skeleton(Checkpoint(tmp_path / "model"), device=CPU, dtype=d) for d in (torch.bfloat16, torch.float32)
    )
    ids = cut.tokens.ids[:used]
    hidden = last_hidden(half, ids, lambda: None), last_hidden(whole, ids, lambda: None)
    few = Windows(replace(cut.tokens, ids=ids), cut.scored[:used], 0)
    scores = compare((half, whole), hidden, few)
    assert noise.kl_mean == pytest.approx(float(scores.kl.mean()), rel=1e-6)
    assert noise.top1_agreement == float(scores.same.mean())
    growth = math.exp((scores.artifact_nll - scores.original_nll).mean()) - 1
    assert noise.perplexity_increase == pytest.approx(growth, rel=1e-3, abs=1e-9)


def test_the_references_used_longest_ago_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_KEPT", 2)
    build("llama", tmp_path / "model")

    def use(n: int) -> None:
        cut = windows(tokenizer(), text(), "text", Evaluation(windows=n, window=32))
        reference(open_tiny(tmp_path / "model"), tmp_path / "model", cut, tmp_path)

    use(1)
    for n in range(2, 7):
        use(n)
        sizes = {(p / "hidden.bin").stat().st_size for p in (tmp_path / "reference").iterdir()}
        assert sizes == {kept * 32 * 64 * 4 for kept in (1, n)}
        use(1)  # read again, and so kept
