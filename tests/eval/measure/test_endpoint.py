"""A served model: a small completions server over a tiny model stands in for vLLM, and for servers that fall short."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.eval.measure.divergence import compare, last_hidden, windows
from quantpress.eval.measure.endpoint import Endpoint, ServedModel, served_nll
from quantpress.eval.measure.evaluate import evaluate_served, prepare
from quantpress.eval.measure.likelihood import Scorer
from quantpress.eval.measure.task_scores import TaskScores
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.recipe import Evaluation, Gates

from ...tiny import build, text, tokenizer


class Completions(BaseHTTPRequestHandler):
    """OpenAI's completions as vLLM answers them: echo with log-probabilities, the first of them null."""

    model: Any = None
    faults: set[str] = set()  # noqa: RUF012  set by a test
    keys: list[str | None] = []  # noqa: RUF012
    stops: list[list[str] | None] = []  # noqa: RUF012
    length = 128  # tokens of prompt and answer

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "tiny", "max_model_len": self.length}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers.get("Authorization"))
        if "error" in self.faults:
            return self._answer({"error": "the model is tired"}, 503)
        assert (body["model"], body["temperature"]) == ("tiny", 0)
        self.stops.append(body.get("stop"))
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > self.length:  # as vLLM does
            return self._answer({"error": f"maximum context length is {self.length}"}, 400)
        with torch.no_grad():
            log_probs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        if not body.get("echo"):
            token = int(log_probs[-1].argmax())
            return self._answer({"choices": [{"text": f"token {token} of {body['max_tokens']}"}]})
        assert (body["max_tokens"], body["logprobs"]) == (1, 1)
        values: list[Any] = [None] + [float(log_probs[i, t]) for i, t in enumerate(ids[1:])]
        tops = [None] + [{"t": float(row.max()), "given": v} for row, v in zip(log_probs, values[1:], strict=False)]
        tail = 1 if "no echo" in self.faults else len(ids) + 1  # the token it made
        given = {"token_logprobs": [*values, -0.5][-tail:], "top_logprobs": [*tops, {"t": -0.5}][-tail:]}
        self._answer({"choices": [{"text": "x", "logprobs": given}]})

    def _answer(self, document: Any, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    Completions.model = build("llama", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", folder
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _sound() -> None:
    Completions.faults.clear()
    Completions.keys.clear()
    Completions.stops.clear()
    Completions.length = 128


def skeleton(folder: Path) -> Skeleton:
    return Skeleton(Checkpoint(folder), device=torch.device("cpu"))


def test_served_perplexity_is_that_of_the_model_behind_it(served: tuple[str, Path]) -> None:
    url, folder = served
    cut = windows(tokenizer(), text(), "text", Evaluation(windows=3, window=40, stride=16, bos="always"))
    plain = skeleton(folder)
    hidden = last_hidden(plain, cut.tokens.ids, lambda: None)
    steps: list[tuple[int, int]] = []
    found = served_nll(ServedModel(Endpoint(url, "tiny", "secret"), 128), cut, lambda *step: steps.append(step))
    np.testing.assert_allclose(found, compare((plain, plain), (hidden, hidden), cut).original_nll, atol=1e-4)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert set(Completions.keys) == {"Bearer secret"}


def test_served_likelihoods_equal_those_in_process(served: tuple[str, Path]) -> None:
    url, folder = served
    pairs = [([5, 6, 7], [8, 9]), ([0], [44]), (list(range(2, 140)), [3, 4])]
    model = ServedModel(Endpoint(url, "tiny"), 128)
    own = Scorer(skeleton(folder), tokenizer(), room=model.room)
    theirs = model.log_likelihoods(pairs)
    for (value, greedy), (other, favoured) in zip(own.log_likelihoods(pairs), theirs, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert greedy is favoured
    favourite = own.write([[5, 6, 7]], 1)[0]
    assert ServedModel(Endpoint(url, "tiny"), 128).log_likelihoods([([5, 6, 7], favourite)])[0][1] is True
    assert ServedModel(Endpoint(url, "tiny"), 128).continue_text([[5, 6, 7]], 4) == [f"token {favourite[0]} of 4"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error", r"/v1: status 503: the model is tired; is it the address"),
        ("no echo", r"does not give the log-probabilities of a prompt's tokens .*1 of 3 came back"),
    ],
)
def test_a_server_that_falls_short_is_refused_in_one_line(served: tuple[str, Path], fault: str, said: str) -> None:
    server = ServedModel(Endpoint(served[0], "tiny"), 128)
    Completions.faults.add(fault)
    with pytest.raises(BadInput, match=said):
        server.log_likelihoods([([5, 6], [7])])


def test_what_is_not_served_is_refused(served: tuple[str, Path]) -> None:
    with pytest.raises(BadInput, match="no model 'small' is served there; there are tiny"):
        ServedModel(Endpoint(served[0], "small"), 128)
    for url, said in (
        ("http://127.0.0.1:9/v1", "no answer"),
        ("127.0.0.1:9", "no answer"),
        ("http://a:b/v1", "port"),
    ):
        with pytest.raises(BadInput, match=f"^{url}: .*{said}"):
            ServedModel(Endpoint(url, "tiny"), 128)


@pytest.mark.parametrize(("length", "cut"), [(128, 127), (64, 63), (4096, 127)])
def test_long_requests_are_cut_alike_and_fit_the_server(served: tuple[str, Path], length: int, cut: int) -> None:
    """The fake server refuses what vLLM refuses: a prompt without room for one new token."""
    url, folder = served
    Completions.length = length
    model = ServedModel(Endpoint(url, "tiny"), 128)
    assert (model.room.scored, model.room.written) == (cut, cut + 1)
    long = [i % 250 + 2 for i in range(300)]
    pairs = [(long, [3, 4, 5]), (long[: cut - 3], [3, 4, 5]), (long[: cut - 2], [3, 4, 5])]
    own = Scorer(skeleton(folder), tokenizer(), room=model.room)
    for (value, _), (other, _) in zip(own.log_likelihoods(pairs), model.log_likelihoods(pairs), strict=True):
        assert value == pytest.approx(other, abs=1e-4)
    assert model.continue_text([long], 8)[0].endswith(" of 8")
    with pytest.raises(BadInput, match="new tokens leave no room for a prompt"):
        model.continue_text([long], cut + 1)


def test_a_server_is_sent_the_first_four_stop_strings_as_many_as_the_api_takes(served: tuple[str, Path]) -> None:
    model = ServedModel(Endpoint(served[0], "tiny"), 128)
    for stop in ((), ("a",), ("a", "b", "c", "d", "e", "f")):
        model.continue_text([[5, 6]], 4, stop)
    assert Completions.stops == [None, ["a"], ["a", "b", "c", "d"]]


def test_windows_that_the_server_would_refuse_are_refused_before_the_work(served: tuple[str, Path]) -> None:
    Completions.length = 64
    model = ServedModel(Endpoint(served[0], "tiny"), 128)
    model.check_window(63)
    with pytest.raises(BadInput, match=r"evaluation.window 64: .* at most 63 tokens, .*--set evaluation.window=63 "):
        model.check_window(64)


class LongTask:
    """A task whose one document is longer than the server takes."""

    def identity(self) -> str:
        return "long"

    def run(self, model: Any) -> list[TaskScores]:
        ((value, _),) = model._answers.log_likelihoods([([i % 250 + 2 for i in range(200)], [3, 4])])
        return [TaskScores("long", "log-likelihood", True, 0, {"document": value})]


def test_the_original_is_cut_as_the_server_cuts(served: tuple[str, Path], tmp_path: Path) -> None:
    """A model that is served by a server with a shorter context differs from itself in nothing."""
    pytest.importorskip("lm_eval")
    url, folder = served
    Completions.length = 64
    wanted = Evaluation(source=str(tmp_path / "text.txt"), windows=2, window=63, prompts=())
    (tmp_path / "text.txt").write_text(text())
    prepared = replace(prepare(folder, wanted, tmp_path), tasks=LongTask())  # type: ignore[arg-type]
    results = evaluate_served(folder, ServedModel(Endpoint(url, "tiny"), 128), prepared, Gates())
    assert results.perplexity_increase == pytest.approx(0, abs=1e-4)
    (row,) = results.tasks
    assert row.difference == pytest.approx(0, abs=1e-3)
    longer = replace(prepared, wanted=wanted.model_copy(update={"window": 64}))
    with pytest.raises(BadInput, match=r"evaluation.window 64: .* at most 63 tokens"):
        evaluate_served(folder, ServedModel(Endpoint(url, "tiny"), 128), longer, Gates())
