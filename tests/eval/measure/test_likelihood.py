"""Log-likelihoods and greedy text against plain whole-model forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.eval.measure import likelihood
from quantpress.eval.measure.generations import first_difference, side_by_side
from quantpress.eval.measure.likelihood import Pair, Scorer
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ...tiny import FAMILIES, build, tokenizer

CPU = torch.device("cpu")


def scorer(folder: Path) -> Scorer:
    return Scorer(Skeleton(Checkpoint(folder), device=CPU), tokenizer())


def some_pairs() -> list[Pair]:
    """Contexts and continuations of many lengths, one longer than the tiny models' 128 positions."""
    g = torch.Generator().manual_seed(3)
    sizes = [(1, 1), (3, 4), (17, 1), (40, 9), (40, 9), (5, 30), (150, 6)]
    draws = [torch.randint(2, 250, (a + b,), generator=g).tolist() for a, b in sizes]
    return [(ids[:a], ids[a:]) for ids, (a, _) in zip(draws, sizes, strict=True)]


def plainly(model: Any, pair: Pair, limit: int = 128) -> tuple[float, bool]:
    context, continuation = pair
    ids = torch.tensor((context + continuation)[-(limit + 1) :])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids[None, :-1]).logits[0].float(), -1)[-len(continuation) :]
    target = ids[-len(continuation) :]
    return float(log_probs.gather(1, target[:, None]).sum()), bool((log_probs.argmax(-1) == target).all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("small_memory", [False, True])
def test_likelihoods_equal_a_plain_forward_pass(
    family: str, small_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_memory:  # several chunks, and batches of one or two
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", 64)
        monkeypatch.setattr(likelihood, "_SHARE", 1 << 50)
    model = build(family, tmp_path)
    pairs = some_pairs()
    with torch.no_grad():  # so that a continuation is the favourite
        favourite = int(model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs.append((pairs[0][0], [favourite]))
    found = scorer(tmp_path).log_likelihoods(pairs)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, favoured = plainly(model, pair)
        assert value == pytest.approx(expected, abs=2e-3)
        assert greedy is favoured
    assert found[-1][1]


def test_a_long_continuation_is_greedy_only_if_every_part_of_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits come a few rows at a time: a miss in any of the parts counts, and so does none."""
    monkeypatch.setattr(likelihood, "_ROWS", 8)
    model, context = build("llama", tmp_path), [5, 6, 7]
    ids = list(context)
    with torch.no_grad():
        for _ in range(24):  # three parts of eight
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    favourite = ids[3:]
    pairs: list[Pair] = [(context, favourite)]
    for wrong in (0, 7, 8, 23):  # the first and last token of the first part, the first of the second, the very last
        other = [*favourite[:wrong], (favourite[wrong] + 1) % 250, *favourite[wrong + 1 :]]
        pairs.append((context, other))
    found = scorer(tmp_path).log_likelihoods(pairs)
    assert [greedy for _, greedy in found] == [True, False, False, False, False]
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, favoured = plainly(model, pair)
        assert (value, greedy) == (pytest.approx(expected, abs=2e-3), favoured)


def test_a_continuation_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    build("llama", tmp_path)
    with pytest.raises(BadInput, match="a continuation of 129 tokens: the model takes 128 at most"):
        scorer(tmp_path).log_likelihoods([([1], [2] * 129)])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_text_is_what_the_forward_pass_prefers(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    assert FAMILIES[family][1]["eos_token_id"] == 1
    prompts = [[5, 6, 7], [9], list(range(20, 40))]
    for prompt, written in zip(prompts, scorer(tmp_path).write(prompts, 6), strict=True):
        ids = list(prompt)
        for token in written:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(written) == 6 or written[-1] == 1


def test_shorter_prompts_are_padded_on_the_left_and_masked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path)
    end = tokenizer().eos_token_id
    seen: list[list[list[int]]] = []

    class Writer:
        def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
            seen.extend([ids.tolist(), attention_mask.tolist()])
            return torch.cat([ids, torch.tensor([[30, end, 31], [32, 33, 34]])], 1)

    monkeypatch.setattr(Skeleton, "whole", lambda self: Writer())
    assert scorer(tmp_path).write([[5, 6, 7], [9]], 3) == [[32, 33, 34], [30, end]]
    pad = end or 0
    assert seen == [[[pad, pad, 9], [5, 6, 7]], [[0, 0, 1], [1, 1, 1]]]


def test_a_model_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path)
    monkeypatch.setattr(likelihood, "whole_bytes", lambda skeleton: 10**15)
    with pytest.raises(BadInput, match=r"the whole model, 1000000\.0 GB, and .* GB are free"):
        scorer(tmp_path).write([[1]], 2)


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0), ([1, 2], [1, 2, 3], 2), ([], [], None)],
)
def test_where_two_texts_part(first: list[int], second: list[int], where: int | None) -> None:
    assert first_difference(first, second) == where


def test_continuations_stand_side_by_side() -> None:
    words = tokenizer()
    seen: list[list[list[int]]] = []

    def writes(text: str) -> Any:
        def write(prompts: Any, new_tokens: int) -> list[list[int]]:
            seen.append(list(prompts))
            return [words(text, add_special_tokens=False)["input_ids"] for _ in prompts]

        return write

    (one,) = side_by_side(writes("a cat sat"), writes("a cap sat"), words, 0, ["so "], 9)
    assert seen[0] == [[0, *words("so ", add_special_tokens=False)["input_ids"]]]
    assert (one.original, one.artifact, one.first_difference, one.shared_characters) == ("a cat sat", "a cap sat", 4, 4)
    # Half a character is no character: the two texts part inside the second byte of a letter.
    (half,) = side_by_side(writes("zé"), writes("zè"), words, None, ["x"], 9)
    assert (half.first_difference, half.shared_characters) == (2, 1)


def test_a_prompt_gets_the_bos_that_was_asked_for_and_no_other() -> None:
    class AddsItsOwn:
        def __call__(self, prompt: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0] * add_special_tokens + [len(word) for word in prompt.split()]}

        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 0))

    def write(prompts: Any, new_tokens: int) -> list[list[int]]:
        seen.append(list(prompts))
        return [[7, 0] for _ in prompts]

    seen: list[list[list[int]]] = []
    for bos in (None, 3):
        (one,) = side_by_side(write, write, AddsItsOwn(), bos, ["two words"], 2)
        assert (one.original, one.artifact) == ("7", "7")
    assert seen == [[[3, 5]], [[3, 5]], [[3, 3, 5]], [[3, 3, 5]]]
