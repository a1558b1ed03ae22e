"""Makes reference.json: what the original answers to some thirty prompts, and what the artifact does, block by block.

The original's part is computed once and cached for every artifact. All log-probabilities are those of float32; the
greedy answers need the whole model, or a pass over all blocks for each token where it does not fit in memory.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from quantpress.artifact.artifact import Artifact, open_artifact, open_original
from quantpress.artifact.manifest import own_manifest
from quantpress.calibrate.chat_template import rendered
from quantpress.calibrate.tokens import encode, end_tokens
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.core.files import fingerprint, remembered
from quantpress.core.untrusted import read_json
from quantpress.exports.serving.forward import last_states, log_probabilities
from quantpress.exports.serving.reference import Asked, Kind, Noise, Paragraph, Reference, RoundTrip, divergence
from quantpress.gguf.reader import GgufCheckpoint
from quantpress.models.skeleton import Skeleton
from quantpress.numbers.activations import round_inputs
from quantpress.numbers.grid import Inputs
from quantpress.numbers.types import Activations

from .likelihood import Scorer, fits_or_fails
from .reference_texts import ABOUT, AWKWARD, CHAT, MORE_RAW, PARAGRAPHS, RAW, SUBJECTS
from .results import Results
from .sections import ByPrompt, Interval
from .statistics import around, standard_error

PASSES = 3  # over the artifact's blocks
_LAYOUT = "1"  # raise when what is computed of the original changes
_ERRORS = 2.0  # standard errors: noise that takes an artifact farther from the original by less is taken for chance
_ANSWER = 8  # tokens
_ANSWER_BY_BLOCKS = 2  # where every token costs a pass over the whole checkpoint
_TOP = 10  # tokens of a distribution
_DIGITS = 4
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class _Prompt:
    kind: Kind
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Models:
    """The folders of the original and of the artifact, and the dtype in which the evaluation computes."""

    original: Path
    artifact: Path
    dtype: torch.dtype
    tokenizer: Any
    cache: Path

    def open_original(self, dtype: torch.dtype) -> Skeleton:
        return open_original(self.original, machine.device(), dtype)[1]


def make_reference(models: Models, results: Results, on_block: Callable[[], None] = lambda: None) -> Reference:
    """The reference of the artifact; results: what has been measured of it on the evaluation's own text."""
    tokenizer = models.tokenizer
    positions = int(getattr(models.open_original(models.dtype).config, "max_position_embeddings", None) or 2048)
    paragraphs = _paragraphs(tokenizer, positions)
    what = [_LAYOUT, machine.libraries(), fingerprint(models.original), str(models.dtype), machine.device().type,
            positions, paragraphs, *_templates(tokenizer)]  # fmt: skip
    kept = remembered(models.cache / "served", what, lambda: _of_original(models, paragraphs, positions))
    prompts = [_Prompt(*one) for one in kept["prompts"]]
    answers, best, tops, original = kept["answers"], kept["paragraph"], kept["tops"], kept["original"]
    sequences = [torch.tensor(p.ids + answer) for p, answer in zip(prompts, answers, strict=True)]
    own = _rows(models, torch.float32, [*sequences, torch.tensor(paragraphs[best][0])], prompts, on_block)
    artifact = [_at(rows, top) for rows, top in zip(own, tops, strict=False)]
    asked = tuple(
        Asked(
            kind=p.kind, text=p.text, ids=tuple(p.ids), answer=tuple(answer), answer_text=_said(tokenizer, answer),
            top=top, original=before, artifact=after,
        )
        for p, answer, top, before, after in zip(prompts, answers, tops, original, artifact, strict=True)
    )  # fmt: skip
    manifest, reader = own_manifest(models.artifact), Artifact(models.artifact)
    return Reference(
        model=(results.subject and results.subject.original) or models.original.name,
        artifact=None if manifest is None else manifest.artifact.digest,
        libraries=machine.libraries(),
        bos=_bos(tokenizer),
        ends=_ends(models.original, tokenizer),
        chat_template=next(iter(_templates(tokenizer)), None),
        dated="strftime" in str(getattr(tokenizer, "chat_template", None) or ""),
        static_inputs=(inputs := reader.activations) is not None and inputs.calibrated,
        gguf=reader.is_gguf,
        asked=asked,
        paragraph=Paragraph(
            text=_said(tokenizer, paragraphs[best][0]), ids=paragraphs[best][0], start=paragraphs[best][1],
            original=kept["likelihood"], artifact=_next_tokens(own[-1], *paragraphs[best]),
        ),
        round_trips=tuple(_round_trip(tokenizer, text) for text in AWKWARD),
        noise=_noise(models, asked, on_block),
        sampling=_sampling(models.original),
        evaluated=_evaluated(results),
    )  # fmt: skip


def by_prompt(reference: Reference) -> tuple[ByPrompt, ...]:
    """How far the artifact is from the original on plain prompts, and on chats."""
    found = []
    kinds: tuple[Literal["raw", "chat"], ...] = ("raw", "chat")
    for kind in kinds:
        asked = [one for one in reference.asked if one.chat == (kind == "chat")]
        pairs = [(i, *pair) for i, one in enumerate(asked) for pair in zip(one.original, one.artifact, strict=True)]
        if not pairs:
            continue
        kl, kl_ends = _over_prompts([divergence(p, q) for _, p, q in pairs], [i for i, _, _ in pairs])
        same, same_ends = _over_prompts([max(q) == q[0] for _, _, q in pairs], [i for i, _, _ in pairs])
        found.append(
            ByPrompt(
                kind=kind, positions=len(pairs), kl_mean=kl, kl_interval=kl_ends and (max(0.0, kl_ends[0]), kl_ends[1]),
                top1_agreement=same, top1_interval=same_ends and (max(0.0, same_ends[0]), min(1.0, same_ends[1])),
            )
        )  # fmt: skip
    return tuple(found)


def _over_prompts(values: Sequence[float], prompt: Sequence[int]) -> tuple[float, Interval | None]:
    """The mean of values at tokens, and its interval; the tokens of a prompt are not independent."""
    each, run = np.array(values, float), np.array(prompt)
    return float(each.mean()), around(float(each.mean()), standard_error(each, run), int(run.max()) + 1)


def _of_original(models: Models, paragraphs: Sequence[tuple[list[int], int]], positions: int) -> dict[str, Any]:
    """Everything of the original: the likeliest paragraph, the prompts, the answers and the log-probabilities."""
    plain = models.open_original(torch.float32)
    tokenizer = models.tokenizer
    states = last_states(plain, [torch.tensor(ids) for ids, _ in paragraphs])
    scored = [_next_tokens(log_probabilities(plain, s[:-1]), *one) for s, one in zip(states, paragraphs, strict=True)]
    best = max(range(len(scored)), key=lambda i: sum(scored[i]) / len(scored[i]))
    found = _prompts(tokenizer, PARAGRAPHS[best % len(PARAGRAPHS)])
    prompts = [p for p in found if len(p.ids) + _ANSWER <= positions]
    answers = _answers(models, [p.ids for p in prompts])
    sequences = [torch.tensor(p.ids + answer) for p, answer in zip(prompts, answers, strict=True)]
    tops, values = [], []
    for prompt, hidden in zip(prompts, last_states(plain, sequences), strict=True):
        likeliest = log_probabilities(plain, hidden[len(prompt.ids) - 1 : -1]).topk(_TOP)
        tops.append(likeliest.indices.tolist())
        values.append(_rounded(likeliest.values))
    return {
        "prompts": [[p.kind, p.text, p.ids] for p in prompts], "answers": answers, "paragraph": best,
        "likelihood": scored[best], "tops": tops, "original": values,
    }  # fmt: skip


def _paragraphs(tokenizer: Any, positions: int) -> list[tuple[list[int], int]]:
    """Each paragraph as it is and, where there is a chat template, as the answer in a chat: ids, and the first token
    that counts."""
    plain = [_whole(tokenizer, text) for text in PARAGRAPHS]
    found = [(ids, 1) for ids in plain]
    for subject, ids in zip(SUBJECTS, plain, strict=True):
        front = _chat(tokenizer, subject) if _templates(tokenizer) else None
        found += [] if front is None else [(front + ids[_bos(tokenizer) is not None :], len(front))]
    return [(ids[:positions], start) for ids, start in found if start + 1 < min(len(ids), positions)]


def _prompts(tokenizer: Any, paragraph: str) -> list[_Prompt]:
    templated = bool(_templates(tokenizer)) and _chat(tokenizer, CHAT[0]) is not None
    found = [_Prompt("raw", text, _whole(tokenizer, text)) for text in (RAW if templated else RAW + MORE_RAW)]
    half = paragraph[: len(paragraph) // 2]
    found += [_Prompt("long", text, _whole(tokenizer, text)) for text in (half, paragraph)]
    if templated:
        kinds: list[tuple[Kind, str]] = [("chat", text) for text in CHAT]
        kinds += [("long chat", text.format(paragraph)) for text in ABOUT]
        found += [_Prompt(kind, text, _chat(tokenizer, text) or []) for kind, text in kinds]
    return [prompt for prompt in found if prompt.ids]


def _answers(models: Models, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The original's greedy answers; shorter ones where the model does not fit: each token takes a pass over it."""
    skeleton = models.open_original(models.dtype)
    try:
        fits_or_fails(skeleton)
    except BadInput:
        answers: list[list[int]] = [[] for _ in prompts]
        for _ in range(_ANSWER_BY_BLOCKS):
            sequences = [torch.tensor(ids + answer) for ids, answer in zip(prompts, answers, strict=True)]
            for answer, states in zip(answers, last_states(skeleton, sequences), strict=True):
                answer.append(int(skeleton.logits(states[-1:]).argmax()))
        return answers
    return Scorer(skeleton, models.tokenizer).write(prompts, _ANSWER)


def _rows(
    models: Models, dtype: torch.dtype, sequences: Sequence[Tensor], prompts: Sequence[Any],
    on_block: Callable[[], None], *, rounded: bool = False,
) -> list[Tensor]:  # fmt: skip
    """The artifact's log-probabilities [tokens, vocab] of each answer, and after them of whole sequences without a
    prompt. rounded: whether kernels that round to int8 what comes into quantized linears are imitated."""
    reader, skeleton = open_artifact(models.artifact, machine.device(), dtype)
    if rounded:
        for linear in skeleton.linears():
            columns = _sharing_a_scale(reader, linear.name)
            if columns is not None:
                skeleton.round_inputs(linear, partial(round_inputs, inputs=Inputs(Activations(type="int8"), columns)))
    states = last_states(skeleton, sequences, on_block)
    starts = [*(len(p.ids) - 1 for p in prompts), *([0] * (len(sequences) - len(prompts)))]
    return [log_probabilities(skeleton, s[start:-1]) for s, start in zip(states, starts, strict=True)]


def _sharing_a_scale(reader: Artifact, linear: str) -> int | None:
    """How many inputs of a token share a scale where a kernel rounds them to int8, 0 for all; None where it does not.

    ggml rounds to Q8_0 beside types in blocks of 32 and to Q8_K beside those in blocks of 256, and not beside floats
    (`vec_dot_type` in ggml-cpu.c).
    """
    if isinstance(reader.checkpoint, GgufCheckpoint):
        block = reader.checkpoint.block(f"{linear}.weight")
        return block if block > 1 else None
    return 0 if linear in reader.linears and reader.inputs(linear) is None else None


def _noise(models: Models, asked: Sequence[Asked], on_block: Callable[[], None]) -> Noise:
    """Of the short prompts: the long ones would take most of the time."""
    short = [one for one in asked if not one.long]
    sequences = [torch.tensor(one.ids + one.answer) for one in short]

    def away(dtype: torch.dtype, *, rounded: bool = False) -> tuple[float, float]:
        rows = _rows(models, dtype, sequences, short, on_block, rounded=rounded)
        found = [(divergence(p, q), divergence(original, q) - divergence(original, p))
                 for one, r in zip(short, rows, strict=True)
                 for original, p, q in zip(one.original, one.artifact, _at(r, one.top), strict=True)]  # fmt: skip
        if len(found) < 2:
            return 0.0, 0.0
        own, farther = (np.array(values) for values in zip(*found, strict=True))
        error = float(farther.std(ddof=1)) / len(found) ** 0.5
        return round(float(own.mean()), 6), round(max(0.0, float(farther.mean()) - _ERRORS * error), 6)

    (exact, exact_farther), (rounded, rounded_farther) = away(torch.bfloat16), away(torch.float32, rounded=True)
    return Noise(bfloat16=exact, rounded_inputs=rounded, farther_bfloat16=exact_farther,
                 farther_rounded_inputs=rounded_farther)  # fmt: skip


def _at(rows: Tensor, top: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probabilities [tokens, vocab] of the tokens `top` [tokens, likeliest]."""
    return _rounded(rows.gather(1, torch.tensor(top)))


def _next_tokens(rows: Tensor, ids: Sequence[int], start: int) -> list[float]:
    """Log-probabilities of ids[start:], from rows [len(ids) - 1, vocab]."""
    values = rows.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :, 0]
    return [round(value, _DIGITS) for value in values.tolist()]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in row] for row in values.tolist()]


def _whole(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text with what the tokenizer itself puts around it, as servers make them."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _chat(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a chat of one turn; None where the template does not take it."""
    try:
        return encode(tokenizer, rendered(tokenizer, [{"role": "user", "content": text}], prompt=True))
    except BadInput:
        return None


def _round_trip(tokenizer: Any, text: str) -> RoundTrip:
    ids = _whole(tokenizer, text)
    return RoundTrip(text=text, ids=tuple(ids), decoded=tokenizer.decode(ids))


def _said(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _bos(tokenizer: Any) -> int | None:
    token: int | None = tokenizer.bos_token_id
    return token if token is not None and _whole(tokenizer, "a")[:1] == [token] else None


def _ends(original: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer; that which ends a turn of a chat first."""
    ends = end_tokens(original, tokenizer)
    talk = [{"role": "user", "content": CHAT[0]}, {"role": "assistant", "content": "\u2461"}]
    try:
        closing = encode(tokenizer, rendered(tokenizer, talk, prompt=False).rpartition("\u2461")[2])
    except BadInput:
        closing = []
    turn = next((token for token in closing if token in ends), None)
    return tuple(ends) if turn is None else (turn, *(end for end in ends if end != turn))


def _templates(tokenizer: Any) -> list[str]:
    """The sha256 of the chat template, if there is one."""
    template = getattr(tokenizer, "chat_template", None)
    return [hashlib.sha256(str(template).encode()).hexdigest()] if template else []


def _sampling(original: Path) -> dict[str, Any]:
    """What the original's generation_config advises."""
    path = original / "generation_config.json"
    advice = read_json(path) if path.is_file() else {}
    return {key: advice[key] for key in _SAMPLING if advice.get(key) is not None}


def _evaluated(results: Results) -> Mapping[str, float | None]:
    found = results.divergence
    if found is None:
        return {}
    return {
        "kl_mean": found.kl_mean, "kl_p99": found.kl_p99, "top1_agreement": found.top1_agreement,
        "perplexity_increase": results.perplexity_increase,
        "noise_kl_mean": None if found.noise is None else found.noise.kl_mean,
    }  # fmt: skip
