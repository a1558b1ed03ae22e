"""Compares a server's greedy answers with our own forward of the same artifact, read back through its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.calibrate.tokens import encode
from quantpress.core import machine
from quantpress.models.skeleton import Skeleton, run_block

from .client import Client, Messages, Prompt, Refused, Step
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
_LLAMA_CPP = Tolerance(kernel="llama.cpp: inputs rounded to 8 bits in blocks of 32", mean=0.15, largest=1.0)


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


def prompt_ids(tokenizer: Any, text: str, lacks: Mapping[str, str]) -> list[int]:
    """The tokens the server makes of a prompt; one that lacks plain prompts wraps them in the chat template."""
    if "plain_prompts" in lacks:
        return template_ids(tokenizer, _turn(text))
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _turn(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def template_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The tokens of a chat by the artifact's own template."""
    made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    ids: list[int] = made["input_ids"]
    return ids


def ask(client: Client, tokenizer: Any, lacks: Mapping[str, str]) -> list[Continuation]:
    """The server's continuations of the prompts; a prompt that the model ends at once is asked again as a chat. Text is
    tokenized again where the server gives no token ids."""
    more = {} if "logprobs" in lacks else _LOGPROBS
    found = []
    for text in PROMPTS:
        prompt = prompt_ids(tokenizer, text, lacks)
        takes_ids = not {"token_ids", "plain_prompts"} & lacks.keys()
        answer = client.complete(prompt if takes_ids else text, TOKENS, **more)
        if not answer.text and getattr(tokenizer, "chat_template", None):
            prompt, answer = template_ids(tokenizer, _turn(text)), client.chat(_turn(text), TOKENS)
        steps = answer.steps()
        tokens = [step.token for step in steps] or encode(tokenizer, answer.text)
        found.append(Continuation(prompt, tokens, steps))
    return [one for one in found if one.tokens]


def compare(folder: Path, answers: Sequence[Continuation], tolerance: Tolerance) -> Agreement:
    """Compare `answers` with our float32 forward over each prompt and answer, block by block.

    folder: the artifact, or the checkpoint that a .gguf file was dequantized to.
    """
    _, skeleton = open_artifact(folder, machine.device(), torch.float32)
    ours = log_probabilities(skeleton, [torch.tensor(one.prompt + one.tokens) for one in answers])
    equal, behind, off = 0, 0.0, []
    for one, scores in zip(answers, ours, strict=True):
        scores = scores[len(one.prompt) - 1 : -1]  # row i scores token i
        tokens = torch.tensor(one.tokens)
        gaps = scores.amax(-1) - scores.gather(1, tokens[:, None])[:, 0]
        behind = max(behind, float(gaps.max()))
        equal += int((scores.argmax(-1) == tokens).long().cumprod(0).sum())
        for row, step in zip(scores, one.steps, strict=bool(one.steps)):
            off += [abs(float(row[token]) - logprob) for token, logprob in step.top.items()]
    return Agreement(
        answers=len(answers), tokens=sum(len(one.tokens) for one in answers), equal_tokens=equal, behind=behind,
        logprobs=len(off), logprob_mean=sum(off) / len(off) if off else None, logprob_largest=max(off, default=None),
        tokens_from="ids" if all(one.steps for one in answers) else "text", tolerance=tolerance,
    )  # fmt: skip


def log_probabilities(skeleton: Skeleton, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Next-token log-probabilities [len, vocab], float32, of each sequence [len]; each block is read once."""
    skeleton.open_shell()
    hidden = [skeleton.embed(ids[None]).cpu() for ids in sequences]
    arguments = [skeleton.block_arguments(ids[None]) for ids in sequences]
    for k, block in skeleton.blocks():
        for states, args in zip(hidden, arguments, strict=True):
            run_block(block, states, args[k], device=skeleton.device, batch=1)
    return [skeleton.logits(states[0]).float().log_softmax(-1).cpu() for states in hidden]


def tolerance_for(artifact: Path, folder: Path, *, may_round_inputs: bool) -> Tolerance:
    """How far the kernel that the server uses for this artifact may differ; `folder` as for `compare`.

    may_round_inputs: as `Launcher.may_round_inputs`.
    """
    if artifact.suffix == ".gguf":
        return _LLAMA_CPP
    reader = Artifact(folder)
    four_bit = any(grid.type == "int" and grid.bits == 4 for grid in reader.linears.values())
    # As vLLM's 4-bit kernel does on a CPU with AMX.
    amx = may_round_inputs and machine.device().type == "cpu" and machine.has_amx()
    if reader.activations is not None and reader.activations.type == "int8" and not reader.activations.dynamic:
        return _ROUNDED_STATIC
    if reader.activations is not None or (four_bit and amx):
        return _ROUNDED
    return _SIXTEEN_BIT


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
