"""Compares a server's greedy answers with our own forward of the same artifact, read back through its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.core import machine

from .asking import prompt_ids, template_ids, turn
from .client import Client, Prompt, Refused, Step
from .forward import last_states, log_probabilities
from .record import Agreement, Tolerance

PROMPTS = (
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses",
    "To make a cup of tea, first boil the water, then",
    "The first computers were large machines that filled whole rooms, and",
)
TOKENS = 24
_LOGPROBS: dict[str, Any] = {"logprobs": 5, "return_tokens_as_token_ids": True}

# Absolute differences in log-probability, mean and maximum. We compute in float32, the servers in bfloat16.
_SIXTEEN_BIT = Tolerance(kernel="16-bit sums", mean=0.06, largest=0.5)
_ROUNDED = Tolerance(kernel="rounded inputs", mean=0.5, largest=5.0)  # 16-bit noise moves rounded inputs by whole steps
# A static scale makes the steps larger: SmolLM2 in bfloat16 differs by 0.63 from itself in float32.
_ROUNDED_STATIC = Tolerance(kernel="inputs rounded by static scales", mean=1.0, largest=5.0)
_LLAMA_CPP = Tolerance(kernel="llama.cpp: inputs rounded to 8 bits", mean=0.15, largest=1.0)

# Of a mixture: where two experts are near a tie, noise decides, and the token is another's.
_EXPERTS, _EXPERTS_MEAN = 5.0, 2.0  # the largest; the mean, in times of others'


@dataclass(frozen=True)
class Continuation:
    """A greedy answer as token ids; steps: with log-probabilities, where the server gives them."""

    prompt: list[int]
    tokens: list[int]
    steps: list[Step]


def refused(client: Client, tokenizer: Any) -> dict[str, str]:
    """For an unknown server: whether it refuses token ids as prompts or log-probabilities, with the reasons."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    asked: dict[str, tuple[Prompt, dict[str, Any]]] = {"token_ids": (ids, {}), "logprobs": (PROMPTS[0], _LOGPROBS)}
    found = {}
    for ability, (prompt, more) in asked.items():
        try:
            client.complete(prompt, 1, **more)
        except Refused as refusal:
            found[ability] = f"the server refuses them: {refusal}"
    return found


def ask(client: Client, tokenizer: Any, lacks: Mapping[str, str]) -> list[Continuation]:
    """The server's continuations of the prompts, as its own token ids; none where it gives no ids.

    A prompt that the model ends at once is asked again in the chat template. Text is never tokenized again: other ids
    may spell it, and the model would be asked about what it did not say.
    """
    if "logprobs" in lacks:
        return []
    takes_ids = not {"token_ids", "plain_prompts"} & lacks.keys()
    found = []
    for text in PROMPTS:
        prompt = prompt_ids(tokenizer, text, lacks)
        answer = client.complete(prompt if takes_ids else text, TOKENS, **_LOGPROBS)
        if not answer.text and getattr(tokenizer, "chat_template", None) and takes_ids:
            prompt = template_ids(tokenizer, turn(text))
            answer = client.complete(prompt, TOKENS, **_LOGPROBS)
        steps = answer.steps()
        found.append(Continuation(prompt, [step.token for step in steps], steps))
    return [one for one in found if one.tokens]


def compare(folder: Path, answers: Sequence[Continuation], tolerance: Tolerance) -> Agreement:
    """Compare `answers` with our float32 forward over each prompt and answer, block by block.

    folder: the artifact, or the checkpoint that a .gguf file was dequantized to.
    """
    _, skeleton = open_artifact(folder, machine.device(), torch.float32)
    states = last_states(skeleton, [torch.tensor(one.prompt + one.tokens) for one in answers])
    equal, behind, off = 0, 0.0, []
    for one, hidden in zip(answers, states, strict=True):
        scores = log_probabilities(skeleton, hidden[len(one.prompt) - 1 : -1])  # row i scores token i
        tokens = torch.tensor(one.tokens)
        gaps = scores.amax(-1) - scores.gather(1, tokens[:, None])[:, 0]
        behind = max(behind, float(gaps.max()))
        equal += int((scores.argmax(-1) == tokens).long().cumprod(0).sum())
        for row, step in zip(scores, one.steps, strict=bool(one.steps)):
            off += [abs(float(row[token]) - logprob) for token, logprob in step.top.items()]
    return Agreement(
        answers=len(answers), tokens=sum(len(one.tokens) for one in answers), equal_tokens=equal, behind=behind,
        logprobs=len(off), logprob_mean=sum(off) / len(off) if off else None, logprob_largest=max(off, default=None),
        tolerance=tolerance,
    )  # fmt: skip


def tolerance_for(artifact: Path, folder: Path, *, may_round_inputs: bool) -> Tolerance:
    """How far the kernel that the server uses for this artifact may differ; `folder` as for `compare`.

    may_round_inputs: as `Launcher.may_round_inputs`.
    """
    reader = Artifact(folder)
    found = _LLAMA_CPP if artifact.suffix == ".gguf" else _of_kernel(reader, may_round_inputs=may_round_inputs)
    if any(".experts." in name for name in reader.names()):
        wider = {"mean": found.mean * _EXPERTS_MEAN, "largest": max(found.largest, _EXPERTS)}
        found = found.model_copy(update={**wider, "kernel": f"{found.kernel}; experts"})
    return found


def _of_kernel(reader: Artifact, *, may_round_inputs: bool) -> Tolerance:
    four_bit = any(grid.type == "int" and grid.bits == 4 for grid in reader.linears.values())
    amx = rounds_inputs(may=may_round_inputs)
    if reader.activations is not None and reader.activations.type == "int8" and not reader.activations.dynamic:
        return _ROUNDED_STATIC
    if reader.activations is not None or (four_bit and amx):
        return _ROUNDED
    return _SIXTEEN_BIT


def rounds_inputs(*, may: bool) -> bool:
    """Whether a kernel for 4-bit weights rounds inputs to int8 here, as vLLM's does on a CPU with AMX.

    may: as `Launcher.may_round_inputs`.
    """
    return may and machine.device().type == "cpu" and machine.has_amx()


def judged(found: Agreement) -> tuple[bool, str]:
    """Whether the agreement is within its tolerance, and the line that says so."""
    allowed = found.tolerance
    line = (
        f"{found.equal_tokens} of {found.tokens} greedy tokens equal up to the first difference, at most "
        f"{found.behind:.3f} behind ours in log-probability"
    )
    within = found.behind <= allowed.largest
    if found.logprob_mean is not None and found.logprob_largest is not None:
        line += (
            f"; {found.logprobs} log-probabilities off by {found.logprob_mean:.4f} on average and "
            f"{found.logprob_largest:.3f} at most"
        )
        within = within and found.logprob_mean <= allowed.mean and found.logprob_largest <= allowed.largest
    return within, f"{line} (allowed {allowed.mean} and {allowed.largest}, {allowed.kernel})"
