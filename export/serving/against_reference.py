"""Holds a served model against the reference that travels with its export: tokens, distributions, a paragraph.

The prompts go as token ids, so that a wrong tokenizer is not taken for wrong weights. The log-probabilities are asked
for at each token of the original's answer; a server gives them for the tokens that it generates itself, and is asked
again from where its answer leaves the original's. What is judged is how far the server is from the artifact as the
evaluation saw it, at the same positions: there is no sampling error in it, only the kernel's.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantpress.core.text import common_prefix

from .client import Client, Refused, ServerError, at_once
from .ending import ending
from .held import LOGPROBS, Held, ServedCheck
from .outcome import Failed, Skipped, made, quoted
from .record import Against, Check
from .reference import Asked, Reference, divergence
from .tokenization import chat_ids, decoded, text_ids, unlike

_AT_ONCE = 4
_ERRORS = 3.0  # standard errors
_MEAN = 0.01  # nats a token of the paragraph, beside that
_TEXT = 0.2  # share of the answers' text
_NONSENSE, _KEPT = 1.5, 0.5  # KL in nats, and share of first tokens, of an artifact that answers chats with nonsense
_POSITIONS = 24  # of the paragraph, where they have to be asked for one by one
_LIKELY = -3.0  # log-probability of those: they are among the likeliest tokens that a server lists
_OTHER_TEMPLATE = "a chat template that is missing or not the original's"
_ROUNDING = "unless its kernel rounds inputs to int8, as vLLM's for 4 bits does on a CPU with AMX: --rounds-inputs"
_DATE = 12  # tokens
_FAR = 3.0  # times: when one kind of prompt fares worse than another
_FARTHER = 1.2  # times: as far apart wrong weights may be, too
_AWKWARD = 1 / 3  # of the awkward strings may be tokenized otherwise: llama.cpp's tokenizers are its own


def tokenizer(on: ServedCheck) -> str:
    """The server makes the original's tokens of plain prompts, and its text of their ids."""
    told = 0
    for one in on.reference.asked:
        if one.chat or not on.fits(one):
            continue
        found = text_ids(on.client, one.text)
        if found is None:
            _counted(on.client.complete(one.text, 1).prompt_tokens, one)
        elif found != one.ids:
            why = unlike(one.ids, found, on.reference.bos)
            raise Failed(f"{quoted(one.text)}: {why}; likeliest cause: {_of_tokens(why, 'another tokenizer')}")
        told += found is not None
    wrong = [
        trip.text for trip in on.reference.round_trips if (ids := text_ids(on.client, trip.text)) != trip.ids and ids
    ]
    if len(wrong) > _AWKWARD * len(on.reference.round_trips):
        raise Failed(f"{len(wrong)} awkward strings are tokenized otherwise, such as {quoted(wrong[0])}; likeliest "
                     "cause: another tokenizer")  # fmt: skip
    for trip in on.reference.round_trips:
        back = decoded(on.client, trip.ids)
        if back is not None and trip.text.strip() not in back and trip.decoded.strip() != back.strip():
            raise Failed(f"the ids of {quoted(trip.text)} are read as {quoted(back)}; likeliest cause: another "
                         "tokenizer")  # fmt: skip
    how = (
        f"the original's ids for {told} prompts"
        if told
        else "as many tokens as the original's; the server tells no ids"
    )
    return how + (f"; {len(wrong)} awkward string(s) otherwise, such as {quoted(wrong[0])}" if wrong else "")


def template(on: ServedCheck) -> str:
    """The server makes of chats what the original's template does."""
    chats = [one for one in on.reference.asked if one.chat and on.fits(one)]
    if on.reference.chat_template is None:
        raise Skipped("the original has no chat template")
    if not chats:
        raise Skipped("no chat of the reference fits the server's context")
    told = 0
    for one in chats:
        messages = ({"role": "user", "content": one.text},)
        try:
            found = chat_ids(on.client, messages)
            if found is None:
                _counted(on.client.chat(messages, 1).prompt_tokens, one)
        except Refused as refusal:
            raise Failed(f"a chat is refused ({refusal}), and the original has a chat template; likeliest cause: the "
                         "template is missing") from None  # fmt: skip
        if found is not None and not _same_but_date(one.ids, found, on.reference.dated):
            why = unlike(one.ids, found, on.reference.bos)
            cause = _of_tokens(why, "another tokenizer" if on.held.other_tokens else _OTHER_TEMPLATE)
            raise Failed(f"the chat {quoted(one.text)}: {why}; likeliest cause: {cause}")
        told += found is not None
    return (
        f"the original's ids for {told} chats" if told else "as many tokens as the original's; the server tells no ids"
    )


def distributions(on: ServedCheck) -> str:
    """The server's likeliest tokens where the original's answers stand: close to what the evaluation saw."""
    asked = [one for one in on.reference.asked if on.fits(one)]
    if not asked:
        raise Skipped(f"no prompt of the reference fits the server's context of {on.context} tokens")
    try:
        on.client.complete(asked[0].ids, 1, **LOGPROBS)
    except Refused as refusal:
        return _texts(on, asked, f"the server takes no token ids with log-probabilities: {refusal}")
    tops = _in_parallel(lambda one: served_tops(on.client, one), asked)
    rows = [(one, i, top) for one, found in zip(asked, tops, strict=True) for i, top in enumerate(found) if top]
    if not rows:
        return _texts(on, asked, "the server tells no log-probabilities by token id")
    away: dict[str, list[float]] = {}
    lost, expected, agreed, first = [], [], 0, 0
    for one, i, top in rows:
        listed = [k for k, token in enumerate(one.top[i]) if token in top]  # the others are among the rest
        served = [top[one.top[i][k]] for k in listed]
        artifact, original = ([row[i][k] for k in listed] for row in (one.artifact, one.original))
        away.setdefault(one.kind, []).append(divergence(artifact, served))
        lost.append(divergence(original, served))
        expected.append(divergence(original, artifact))
        agreed += max(top, key=top.__getitem__) == one.top[i][0]
        first += max(one.artifact[i]) == one.artifact[i][0]
    n = len(rows)
    on.held.add(
        positions=n, away=sum(map(sum, away.values())) / n, limit=on.limit, lost=sum(lost) / n,
        expected=sum(expected) / n, agreement=agreed / n, expected_agreement=first / n,
        by_kind={kind: sum(values) / len(values) for kind, values in away.items()},
    )  # fmt: skip
    found = on.held.against
    line = (
        f"KL {found.away:.4f} from the artifact as evaluated (allowed {on.limit:.4f}) and {found.lost:.3f} from the "
        f"original (evaluated {found.expected:.3f}), whose first token it shares at {found.agreement:.0%} of {n} "
        f"positions (evaluated {found.expected_agreement:.0%})"
    )
    if expected_chats(on.reference):
        raise Failed(f"{line}; {expected_chats(on.reference)}")
    farther = _farther(on, [a - b for a, b in zip(lost, expected, strict=True)])
    if found.away is not None and (found.away > on.limit or farther):
        cause = _of_weights(found.by_kind, on.limit, static=on.reference.static_inputs)
        cause = f"another tokenizer, as its own check says; or {cause}" if on.held.other_tokens else cause
        if on.limit < found.away <= on.widest:
            cause += f"; {_ROUNDING}"
        raise Failed(f"{line}{farther}; likeliest cause: {cause}")
    return line


def _farther(on: ServedCheck, more: Sequence[float]) -> str:
    """Whether the server is farther from the original than the artifact was when it was evaluated, and neither chance
    nor its kernel explains it. Where noise is large it hides how far the server is from the artifact, and not this.
    more: nats by position."""
    if on.farther is None or len(more) < 2:
        return ""
    mean, allowed = sum(more) / len(more), on.farther + _ERRORS * statistics.stdev(more) / math.sqrt(len(more))
    return f", {mean:.3f} farther (chance and kernels explain {allowed:.3f})" if mean > allowed else ""


def expected_chats(reference: Reference) -> str:
    """Why the artifact itself, as it was evaluated, is of no use in chats; "" where it is."""
    pairs = [pair for one in reference.asked if one.chat for pair in zip(one.original, one.artifact, strict=True)]
    if not pairs:
        return ""
    kl = sum(divergence(p, q) for p, q in pairs) / len(pairs)
    same = sum(max(q) == q[0] for _, q in pairs) / len(pairs)
    if kl <= _NONSENSE or same >= _KEPT:
        return ""
    return (
        f"in chats the artifact itself was evaluated at KL {kl:.2f} from the original, whose first token it shares at "
        f"{same:.0%}: likeliest cause: static input scales, or too few bits"
    )


def _texts(on: ServedCheck, asked: Sequence[Asked], why: str) -> str:
    """How far the server's answers follow the original's, as texts: coarse, and all that such a server shows."""
    shares, expected = [], []
    for one in asked:
        if not one.answer_text.strip():
            continue
        tokens = len(one.answer)
        messages = ({"role": "user", "content": one.text},)
        answer = on.client.chat(messages, tokens) if one.chat else on.client.complete(one.text, tokens)
        shares.append(common_prefix(answer.text, one.answer_text) / len(one.answer_text))
        same = [row.index(max(row)) == top.index(token) if token in top else False
                for row, top, token in zip(one.artifact, one.top, one.answer, strict=True)]  # fmt: skip
        expected.append(same.index(False) / tokens if False in same else 1.0)
    if not shares:
        raise Skipped(why)
    follows, wanted = sum(shares) / len(shares), sum(expected) / len(expected)
    line = f"{len(shares)} answers follow the original's for {follows:.0%} of their text, evaluated {wanted:.0%}; {why}"
    if follows < wanted - _TEXT:
        raise Failed(line)
    return line


def paragraph(on: ServedCheck) -> str:
    """The perplexity of the paragraph: as the evaluation saw it."""
    text = on.reference.paragraph
    if text is None:
        raise Skipped("the reference has no paragraph")
    ids, longest = list(text.ids), len(text.ids) if on.context is None else on.context - 1
    try:
        scores = _echoed(on.client, ids[:longest])
    except ServerError:
        scores = {}
    scores = {i: value for i, value in scores.items() if i >= text.start}
    if not scores:
        able = [i for i in range(text.start, min(len(ids), longest)) if text.artifact[i - text.start] > _LIKELY]
        chosen = able[:: max(1, len(able) // _POSITIONS)]
        try:
            found = _in_parallel(lambda i: _one_token(on.client, ids, i), chosen)
        except Refused as refusal:
            raise Skipped(f"the server takes no token ids with log-probabilities: {refusal}") from None
        scores = {i: value for i, value in zip(chosen, found, strict=True) if value is not None}
    if not scores:
        raise Skipped("the server tells no log-probabilities by token id")
    mine, theirs = (
        sum(values) / len(scores) for values in (scores.values(), (text.artifact[i - text.start] for i in scores))
    )
    on.held.add(perplexity=math.exp(-mine), expected_perplexity=math.exp(-theirs))
    line = f"{math.exp(-mine):.3f} over {len(scores)} tokens of {quoted(text.text)}, evaluated {math.exp(-theirs):.3f}"
    # A token's log-probability differs by about the root of twice the KL; of the mean that is left by chance.
    if abs(mine - theirs) > on.limit + _MEAN + 2 * math.sqrt(2 * on.limit / len(scores)):
        raise Failed(f"perplexity {line}; more than kernels differ")
    return f"perplexity {line}"


CHECKS: dict[str, Callable[[ServedCheck], str]] = {
    "tokenizer": tokenizer, "template": template, "distributions": distributions, "paragraph": paragraph,
    "ending": ending,
}  # fmt: skip


def hold(
    client: Client, reference: Reference, context: int | None, lacks: Mapping[str, str], tell: Callable[[Check], None],
    *, rounds_inputs: bool = False,
) -> Against:  # fmt: skip
    """Make every check of the served model against its reference; returns what was measured."""
    on = ServedCheck(client, reference, context, Held(), rounds_inputs)
    for name, check in CHECKS.items():
        told = made(name, lambda check=check: check(on), lacks)  # type: ignore[misc]
        on.held.other_tokens |= name == "tokenizer" and told.status == "fail"
        tell(told)
    return on.held.against


def served_tops(client: Client, one: Asked) -> list[dict[int, float]]:
    """The server's likeliest tokens {id: log-probability} where each token of the original's answer stands; empty where
    it tells none."""
    found: list[dict[int, float]] = []
    while (done := len(found)) < len(one.answer):
        asked, left = [*one.ids, *one.answer[:done]], len(one.answer) - done
        steps = client.complete(asked, left, **LOGPROBS).steps()
        if not steps and left > 1:
            steps = client.complete(asked, 1, **LOGPROBS).steps()
        for step, token in zip(steps, one.answer[done:], strict=False):
            found.append(step.top | {step.token: step.logprob})
            if step.token != token:
                break
        if not steps:
            found.append({})
    return found


def _echoed(client: Client, ids: Sequence[int]) -> dict[int, float]:
    """Log-probabilities of a prompt's own tokens, by their place; empty where the server does not echo them."""
    given = client.complete(ids, 1, echo=True, logprobs=1).choice.get("logprobs") or {}
    values = given.get("token_logprobs") or []
    if len(values) < len(ids) or any(value is None for value in values[1 : len(ids)]):
        return {}
    return {i: float(values[i]) for i in range(1, len(ids))}


def _one_token(client: Client, ids: Sequence[int], at: int) -> float | None:
    """The log-probability of ids[at], at most that of the last of the likeliest tokens where it is none of them."""
    steps = client.complete(ids[:at], 1, **LOGPROBS).steps()
    if not steps:
        return None
    top = steps[0].top | {steps[0].token: steps[0].logprob}
    return top.get(ids[at], min(top.values()))


def _in_parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`work` on all items, a few at a time, in order."""
    shares = [items[i::_AT_ONCE] for i in range(_AT_ONCE)]
    done = at_once(lambda share: [work(item) for item in share], shares)
    return [done[i % _AT_ONCE][i // _AT_ONCE] for i in range(len(items))]


def _counted(counted: int | None, one: Asked) -> None:
    if counted is not None and counted != len(one.ids):
        raise Failed(f"the server counts {counted} tokens in {quoted(one.text)}, the original's tokenizer makes "
                     f"{len(one.ids)}; likeliest cause: another tokenizer, template or BOS")  # fmt: skip


def _same_but_date(wanted: Sequence[int], found: Sequence[int], dated: bool) -> bool:
    """Whether the ids agree; a template that writes today's date may differ there, in a few tokens near the start."""
    if list(wanted) == list(found) or not dated:
        return list(wanted) == list(found)
    alike = next(
        (i for i, pair in enumerate(zip(reversed(wanted), reversed(found), strict=False)) if pair[0] != pair[1]), 0
    )
    start = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), 0)
    return max(len(wanted), len(found)) - alike - start <= _DATE


def _of_tokens(why: str, otherwise: str) -> str:
    return "BOS" if why.startswith("BOS") else otherwise


def _of_weights(kinds: Mapping[str, float], limit: float, *, static: bool) -> str:
    """Short prompts stand near the start, where wrong positions do little. static: whether inputs have static ranges,
    which chats alone may leave."""
    plain, long = kinds.get("raw", 0.0), kinds.get("long", 0.0)
    short = max(plain, kinds.get("chat", 0.0))
    rope = "rope (rope_theta or its scaling): long prompts are farther from the evaluated than short ones"
    weights = "a layer's weights, scales or zero points" + (", or static input scales" if static else "")
    if max(long, kinds.get("long chat", 0.0)) > _FAR * max(short, limit):
        return rope if short <= limit else f"{rope}; or {weights}"
    if static and kinds.get("raw", math.inf) <= limit < kinds.get("chat", 0.0) / _FAR:
        return "static input scales: plain prompts are as evaluated, chats are not"
    return f"{weights}; or {rope}" if limit < plain < long / _FARTHER else weights
