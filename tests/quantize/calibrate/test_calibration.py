"""Calibration sequences: how long, with which BOS, drawn how from the documents."""

import pytest
import torch

from quantpress.calibrate.tokens import Tokens, calibration_tokens, encode, with_served_starts
from quantpress.core.errors import BadInput
from quantpress.recipe import Calibration

from ...tiny import text, tokenizer

LONG = [text(900)]
SOME = [f"document {k} " * 40 for k in range(6)]


def ids(documents: list[str], **settings: object) -> torch.Tensor:
    wanted = Calibration.model_validate({"samples": 4, "seq_len": 32, "bos": "never"} | settings)
    return calibration_tokens(tokenizer(), documents, "text", wanted).ids


def test_the_first_windows_of_the_text_are_taken_in_order() -> None:
    stream = torch.tensor(encode(tokenizer(), LONG[0]))
    assert torch.equal(ids(LONG), stream[:128].reshape(4, 32))


def test_bos_counts_as_one_of_the_tokens_and_costs_none_of_the_text() -> None:
    stream = torch.tensor(encode(tokenizer(), LONG[0]))
    got = ids(LONG, bos="always")
    assert got.shape == (4, 32)
    assert got[:, 0].tolist() == [tokenizer().bos_token_id] * 4
    assert torch.equal(got[:, 1:], stream[:124].reshape(4, 31))


def test_another_seed_draws_other_windows_each_once() -> None:
    stream = torch.tensor(encode(tokenizer(), LONG[0]))
    windows = {tuple(row) for row in stream.unfold(0, 32, 32).tolist()}
    drawn = [ids(LONG, seed=seed) for seed in (0, 1, 2, 1)]
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    rows = [tuple(row) for row in drawn[1].tolist()]
    assert set(rows) <= windows
    assert len(set(rows)) == 4


def test_documents_come_in_an_order_drawn_from_the_seed() -> None:
    orders = {tuple(ids(SOME, seed=seed, samples=1, seq_len=12).flatten().tolist()) for seed in range(5)}
    assert len(orders) > 1


def test_all_of_a_text_can_be_asked_for_and_no_more() -> None:
    most = len(encode(tokenizer(), LONG[0])) // 32
    assert ids(LONG, samples=most).shape == (most, 32)
    with pytest.raises(BadInput, match=f"gives {most} sequences of 32 tokens, {most + 1} are asked for"):
        ids(LONG, samples=most + 1)


def test_static_ranges_see_chats_and_whole_prompts() -> None:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    before = Tokens(ids(LONG, samples=16), "text", False)
    after = with_served_starts(words, before, [f"One thing. Another {k}. " * 9 for k in range(8)])
    assert after.ids.shape == before.ids.shape
    assert torch.equal(after.ids[:12], before.ids[:12])
    starts = [words.decode(row[:8]) for row in after.ids[12:].tolist()]
    assert sum(start.startswith("<s>user") for start in starts) == 2
    assert "4 sequences as servers see them" in after.source
    words.chat_template = None
    plain = with_served_starts(words, before, [f"One thing. Another {k}. " * 9 for k in range(8)])
    assert not any(words.decode(row[:8]).startswith("<s>user") for row in plain.ids.tolist())


def test_a_text_of_less_than_a_sequence_changes_nothing() -> None:
    before = Tokens(ids(LONG, samples=16), "text", False)
    assert with_served_starts(tokenizer(), before, ["short"]) is before
