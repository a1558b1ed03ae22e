"""Our own forward against transformers', and what counts as agreement with a server."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.artifact.artifact import open_artifact
from quantpress.core import machine
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.exports.servers import launchers
from quantpress.exports.serving import agreement
from quantpress.exports.serving.agreement import Continuation, compare, judged, tolerance_for
from quantpress.exports.serving.client import Answer, Client, Step
from quantpress.exports.serving.forward import last_states, log_probabilities
from quantpress.exports.serving.record import Tolerance
from quantpress.numbers.types import Activations, Grid
from quantpress.recipe.loading import parse

from ...quantize.formats.artifacts import make, uniform
from ...tiny import build
from .fakes import Bytes

CPU = torch.device("cpu")
TIGHT = Tolerance(kernel="none", mean=0.001, largest=0.01)
PROMPTS = ([5, 9, 40, 77], [100, 3, 8])


def answered(model: object, prompts: tuple[list[int], ...] = PROMPTS, count: int = 6) -> list[Continuation]:
    """What a server with this very model would say: greedy tokens, and the five likeliest of each place."""
    found = []
    for prompt in prompts:
        tokens: list[int] = []
        steps: list[Step] = []
        for _ in range(count):
            with torch.no_grad():
                scores = model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)  # type: ignore[operator]
            top = scores.topk(5)
            tokens.append(int(top.indices[0]))
            likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            steps.append(Step(tokens[-1], float(top.values[0]), likeliest))
        found.append(Continuation(prompt, tokens, steps))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_probabilities_of_sequences_of_any_length_are_those_of_a_plain_pass(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    sequences = [torch.arange(n) * 7 % 256 for n in (3, 17, 9)]
    skeleton = open_artifact(tmp_path, CPU)[1]
    for ids, states in zip(sequences, last_states(skeleton, sequences), strict=True):
        scores = log_probabilities(skeleton, states)
        with torch.no_grad():
            torch.testing.assert_close(scores, model(ids[None]).logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_server_that_computes_the_same_agrees_in_every_token(tmp_path: Path) -> None:
    found = compare(tmp_path, answered(build("llama", tmp_path)), TIGHT)
    assert (found.answers, found.tokens, found.equal_tokens, found.logprobs) == (2, 12, 12, 60)
    assert found.behind < 1e-4
    assert found.logprob_largest is not None
    assert found.logprob_largest < 1e-4
    assert judged(found)[0]


def test_a_server_with_other_weights_does_not(tmp_path: Path) -> None:
    """One weight of one block changed, as a shuffled group or a lost scale would."""
    model = build("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    within, line = judged(compare(tmp_path, answered(model), TIGHT))
    assert not within
    assert "(allowed 0.001 and 0.01, none)" in line


def test_equal_tokens_are_counted_up_to_the_first_difference(tmp_path: Path) -> None:
    right = answered(build("llama", tmp_path))
    first, second = right
    wrong = [*second.tokens[:2], (second.tokens[2] + 1) % 256, *second.tokens[3:]]
    found = compare(tmp_path, [first, Continuation(second.prompt, wrong, [])], TIGHT)
    assert found.equal_tokens == 6 + 2
    assert found.behind > 0
    only = compare(tmp_path, [Continuation(first.prompt, first.tokens, [])], TIGHT)
    assert (only.logprobs, only.logprob_mean, only.logprob_largest) == (0, None, None)
    assert judged(only)[0]


def test_the_tolerance_is_that_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "model")
    base = {"method": {"name": "rtn"}, "model": str(tmp_path / "model")}
    four = base | {"weights": {"bits": 4, "group_size": 32}}
    eight = base | {"weights": {"bits": 8, "group_size": -1}, "activations": {"type": "int8"}}
    for name, document in (("four", four), ("eight", eight)):
        recipe = parse(document)
        job = prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache"))
        quantize(job, Settings(tmp_path / name, tmp_path / "cache"))
    static = Activations(type="int8", dynamic=False)
    make(tmp_path / "static" / "quantized", "compressed-tensors", uniform(Grid(bits=8, group_size=-1)), spec=static)

    def kernel(server: str, name: str, amx: bool, device: str = "cpu") -> str:
        monkeypatch.setattr(machine, "has_amx", lambda: amx)
        monkeypatch.setattr(machine, "device", lambda: torch.device(device))
        folder = tmp_path / name / "quantized"
        rounds = server == "url" or launchers()[server].may_round_inputs
        return tolerance_for(folder, folder, may_round_inputs=rounds).kernel

    exact, rounded = agreement._SIXTEEN_BIT.kernel, agreement._ROUNDED.kernel
    assert [kernel("vllm", "four", amx) for amx in (False, True)] == [exact, rounded]
    assert kernel("vllm", "four", True, "cuda") == exact
    assert kernel("transformers", "four", True) == exact
    assert kernel("url", "four", True) == rounded
    assert kernel("vllm", "eight", False) == rounded
    assert kernel("vllm", "static", False) == agreement._ROUNDED_STATIC.kernel
    assert "llama.cpp" in tolerance_for(tmp_path / "a.gguf", tmp_path / "four/quantized", may_round_inputs=True).kernel
    make(tmp_path / "mixture", "compressed-tensors", uniform(Grid(group_size=32)), family="qwen3_moe")
    mixture = tolerance_for(tmp_path / "mixture", tmp_path / "mixture", may_round_inputs=False)
    assert (mixture.mean, mixture.largest) == (2 * agreement._SIXTEEN_BIT.mean, agreement._EXPERTS)


class Templated(Bytes):
    """A template that shows in the ids."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "<" + "".join(message["content"] for message in messages)


class Chatty(Client):
    """A server of a model that ends plain prompts at once, and answers in its chat template with tokens of its own: the
    tokenizer would spell `yes` with others."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9", "fake")

    def complete(self, prompt: object, max_tokens: int, **more: object) -> Answer:
        assert isinstance(prompt, list)
        if prompt[:1] != [ord("<")]:
            return Answer("", "stop", 5, 1, {})
        rows = [{"id": 7, "logprob": -0.5, "top_logprobs": []}]
        return Answer("yes", "length", 5, 1, {"logprobs": {"content": rows}})


def test_what_is_ended_at_once_is_asked_in_the_template_and_never_tokenized_again() -> None:
    tokenizer = Templated()
    found = agreement.ask(Chatty(), tokenizer, {})
    assert [(one.prompt, one.tokens) for one in found] == [
        (list(f"<{text}".encode()), [7]) for text in agreement.PROMPTS
    ]
    tokenizer.chat_template = ""  # type: ignore[misc]
    assert agreement.ask(Chatty(), tokenizer, {}) == []
    assert agreement.ask(Chatty(), tokenizer, {"logprobs": "none"}) == []
