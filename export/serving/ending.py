"""Where a served model's answers end, held against its reference."""

import math
from collections import Counter
from collections.abc import Sequence

from .client import Refused
from .held import LOGPROBS, ServedCheck
from .outcome import Failed, Skipped, quoted
from .reference import Asked
from .tokenization import decoded

_OTHER_END = "likeliest cause: another end token in generation_config.json, tokenizer or GGUF file"
_REPEATED = 4  # tokens that an answer has where it does not end
_SURE = 2.0  # nats by which another token is likelier than the end
_COMMON = 3  # ordinary tokens that may not end an answer


def ending(on: ServedCheck) -> str:
    """An answer ends at the original's end token, and at no common one. The server is made to choose each."""
    if not on.reference.ends:
        raise Skipped("the reference names no end token")
    _check_stated(on)
    try:
        return _ending(on, on.reference.ends[0])
    except Refused as refusal:
        raise Skipped(f"the server cannot be made to choose a token: {refusal}") from None


def _check_stated(on: ServedCheck) -> None:
    """Raise Failed for a server that names an end token which is none of the original's, whatever it does besides:
    llama.cpp stops at tokens like <|im_end|>, too."""
    word = on.client.end_text()
    wanted = [decoded(on.client, [end]) for end in on.reference.ends] if word else []
    if word and all(wanted) and word not in wanted:
        others = " or ".join(quoted(text or "") for text in wanted)
        raise Failed(
            f"the server says that {quoted(word)} ends an answer, and the original's end at {others}; {_OTHER_END}"
        )


def _ending(on: ServedCheck, end: int) -> str:
    # Of a prompt that is answered at length without it, or a server that ignores logit_bias would show the same.
    ids = None
    for one in sorted((one for one in on.reference.asked if on.fits(one)), key=lambda one: len(one.ids))[:_COMMON]:
        answer = on.client.complete(one.ids, _REPEATED, **LOGPROBS)
        if answer.finish_reason != "stop":
            ids = ids or one.ids
        elif _ends_early(one, [step.token for step in answer.steps()], on.reference.ends):
            raise Failed(f"the answer to {quoted(one.text)} ends after {quoted(answer.text)}, where the artifact as "
                         f"evaluated goes on; {_OTHER_END}")  # fmt: skip
    if ids is None:
        raise Skipped("every answer ends at once")
    told = Counter(token for one in on.reference.asked for token in one.answer if token not in on.reference.ends)
    for token in (end, *(token for token, _ in told.most_common(_COMMON))):
        answer = on.client.complete(ids, _REPEATED, logit_bias={str(token): 100}, **LOGPROBS)
        stopped, steps = answer.finish_reason == "stop", {step.token for step in answer.steps()}
        if token == end and not stopped:
            if steps == {end} or not answer.text.strip():
                raise Failed(f"an answer goes on after token {end}, which ends the original's; {_OTHER_END}")
            raise Skipped("the server takes no notice of logit_bias")
        if token != end and stopped:
            raise Failed(f"an answer ends at token {token}, an ordinary one of the original's; {_OTHER_END}")
    return f"an answer ends at token {end}, and at none of the {_COMMON} commonest others"


def _ends_early(one: Asked, tokens: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether an answer is the beginning of the original's, and the artifact as evaluated thinks of no end there."""
    n = len(tokens)
    if not 0 < n < len(one.answer) or tuple(tokens) != one.answer[:n]:
        return False
    row = dict(zip(one.top[n], one.artifact[n], strict=True))
    return all(row.get(end, -math.inf) < max(row.values()) - _SURE for end in ends)
