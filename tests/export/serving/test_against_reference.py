"""A served model held against its reference: what is good passes, what is spoilt fails, each for the right reason."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import quantpress
from quantpress import Callbacks
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.cli import main
from quantpress.core import machine
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.eval.measure.reference_texts import PARAGRAPHS
from quantpress.eval.measure.results import Results
from quantpress.eval.measure.sections import Divergence
from quantpress.eval.measure.served_reference import Models, by_prompt, make_reference
from quantpress.exports.serving.against_reference import served_tops
from quantpress.exports.serving.client import Answer, Client, Prompt
from quantpress.exports.serving.record import Check
from quantpress.exports.serving.reference import Noise, Reference, divergence, read_reference
from quantpress.exports.serving.served_check import check_served
from quantpress.recipe.loading import parse

from ... import rubbish, trained
from .model_server import Style, served

RECIPE = {"method": {"name": "rtn"}, "weights": {"bits": 4, "group_size": 32, "symmetric": False}}
STATIC = {
    "method": {"name": "rtn"}, "weights": {"bits": 8, "group_size": -1},
    "activations": {"type": "int8", "dynamic": False},
}  # fmt: skip
WEIGHTS = ("distributions", "a layer's weights")
CAUSES = {  # of each kind of rubbish: the check that fails, and what it says
    "scales doubled": WEIGHTS, "scales scrambled": WEIGHTS, "zeros off by one": WEIGHTS, "columns permuted": WEIGHTS,
    "a block zeroed": WEIGHTS, "rope_theta": ("distributions", ""), "BOS twice": ("tokenizer", "BOS"),
    "tokenizer permuted": ("tokenizer", "another tokenizer"), "another tokenizer": ("tokenizer", "another tokenizer"),
    "template removed": ("template", "template is missing"), "template edited": ("template", "not the original's"),
    "scales of another block": WEIGHTS, "a norm scaled": WEIGHTS, "keys and values exchanged": WEIGHTS,
    "tokens exchanged": WEIGHTS, "a token zeroed": WEIGHTS, "norm epsilon": WEIGHTS,
    "another end token": ("ending", "end token"),
}  # fmt: skip


def evaluated(folder: Path, model: Path, recipe: dict[str, object]) -> Path:
    """A run folder with an artifact and its reference."""
    chosen = parse({**recipe, "name": "tiny", "model": str(model)})
    quantize(prepare(chosen, resolve(str(model), cache=folder / "cache")), Settings(folder / "run", folder / "cache"))
    models = Models(model, folder / "run/quantized", torch.float32, open_tokenizer(model), folder / "cache")
    (folder / "run/eval").mkdir()
    made = make_reference(models, Results(dtype="float32", device="cpu", seconds=0))
    made.write(folder / "run/eval/reference.json")
    return folder / "run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.build(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(tmp_path_factory.mktemp("run"), model, RECIPE)


@pytest.fixture(scope="module")
def reference(run: Path) -> Reference:
    return read_reference(run)


def failed(folder: Path, reference: Reference, style: Style = "vllm", *, bos_twice: bool = False) -> dict[str, str]:
    with served(folder, style, bos_twice=bos_twice) as server:
        found = check_served(server.url, reference)
    assert found.passed == all(check.status != "fail" for check in found.checks)
    return {check.name: check.reason for check in found.checks if check.status == "fail"}


def test_the_reference_is_small_and_says_something(run: Path, reference: Reference) -> None:
    assert 10_000 < (run / "eval/reference.json").stat().st_size < 100_000
    assert {one.kind for one in reference.asked} >= {"raw", "chat"}
    assert reference.paragraph is not None
    positions = sum(len(one.answer) for one in reference.asked)
    assert positions > 60
    sure = [max(rows) for one in reference.asked for rows in one.original]
    assert sum(sure) / len(sure) > -1.5  # it has learnt something, or no fault would show
    assert 0 < reference.noise.bfloat16 < 0.05
    assert 0 < reference.noise.rounded_inputs < 0.2


@pytest.mark.parametrize("style", ["vllm", "llama.cpp"])
def test_a_good_artifact_passes(run: Path, style: Style) -> None:
    told: list[Check] = []
    with served(run / "quantized", style) as server:
        found = quantpress.check(server.url, run, callbacks=Callbacks(on_check=told.append))
    assert tuple(told) == found.checks
    assert {check.name: check.status for check in found.checks} == dict.fromkeys(
        ["models", "tokenizer", "template", "distributions", "paragraph", "ending"], "pass"
    )
    assert found.against.away is not None
    assert found.against.away < 1e-4
    assert found.against.lost == pytest.approx(found.against.expected, abs=1e-3)
    assert found.against.agreement == found.against.expected_agreement


@pytest.mark.parametrize("kind", rubbish.FOLDERS)
def test_rubbish_fails_with_its_cause(kind: str, run: Path, reference: Reference, tmp_path: Path) -> None:
    found = failed(rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.FOLDERS[kind]), reference)
    name, cause = CAUSES[kind]
    assert name in found, found
    assert cause in found[name]
    if "tokenizer" in kind:  # what else differs, differs by it
        assert "likeliest cause: another tokenizer" in found["template"]
        assert all("another tokenizer" in found[other] for other in found.keys() & {"distributions"})


def test_what_kernels_that_round_inputs_are_allowed_is_not_allowed_to_others(
    run: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_amx", lambda: False)
    noisy = reference.model_copy(update={"noise": Noise(bfloat16=0.0, rounded_inputs=5.0)})
    spoilt = rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.scales_doubled)
    said = failed(spoilt, noisy)["distributions"]
    assert said.endswith("unless its kernel rounds inputs to int8, as vLLM's for 4 bits does on a CPU with AMX: "
                         "--rounds-inputs")  # fmt: skip
    with served(spoilt) as server:
        assert check_served(server.url, noisy, rounds_inputs=True).passed
        monkeypatch.setattr(machine, "has_amx", lambda: machine.device().type == "cpu")  # the server runs here
        assert check_served(server.url, noisy).passed
        assert not check_served(server.url, noisy, rounds_inputs=False).passed
        assert check_served(server.url, noisy.model_copy(update={"gguf": True})).passed


def test_noise_hides_no_artifact_that_is_farther_from_the_original(
    run: Path, reference: Reference, tmp_path: Path
) -> None:
    """Static int8 inputs make bfloat16 as far from float32 as wrong scales are, and no farther from the original."""
    quiet = {"farther_bfloat16": 0.0, "farther_rounded_inputs": 0.0}
    noisy = reference.model_copy(update={"noise": Noise(bfloat16=5.0, rounded_inputs=0.0, **quiet)})
    assert failed(run / "quantized", noisy) == {}
    spoilt = rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.scales_doubled)
    assert "farther (chance and kernels explain" in failed(spoilt, noisy)["distributions"]
    assert reference.noise.farther_bfloat16 is not None
    assert abs(reference.noise.farther_bfloat16) <= reference.noise.bfloat16 + 1e-3


def test_an_artifact_that_answers_chats_with_nonsense_fails_though_it_is_served_as_it_is(
    run: Path, reference: Reference
) -> None:
    asked = tuple(
        one.model_copy(update={"artifact": tuple((-9.0,) * 9 + (-0.01,) for _ in one.answer)}) if one.chat else one
        for one in reference.asked
    )
    said = failed(run / "quantized", reference.model_copy(update={"asked": asked}))["distributions"]
    assert "in chats the artifact itself was evaluated at KL" in said
    chats, plain = by_prompt(reference.model_copy(update={"asked": asked}))[::-1]
    assert (chats.kind, plain.kind) == ("chat", "raw")
    assert chats.kl_mean > 3 > 0.1 > plain.kl_mean
    assert chats.kl_interval is not None
    assert chats.kl_interval[0] < chats.kl_mean < chats.kl_interval[1]
    assert chats.top1_interval == (0.0, 0.0) == (chats.top1_agreement,) * 2  # no prompt differs
    text = Divergence(
        kl_mean=0.02, kl_stderr=0, kl_median=0, kl_p90=0, kl_p99=0, kl_max=0, top1_agreement=1
    )  # fmt: skip
    results = Results(dtype="float32", device="cpu", seconds=0, divergence=text, prompts=(plain, chats))
    assert len(results.warnings) == 1
    assert not results.model_copy(update={"prompts": (plain,)}).warnings


def test_a_server_that_shows_texts_alone_is_held_to_them(run: Path, reference: Reference, tmp_path: Path) -> None:
    with served(run / "quantized", text_only=True) as server:
        found = check_served(server.url, reference)
    said = {check.name: check for check in found.checks}
    assert found.passed
    assert "follow the original's" in said["distributions"].reason
    assert said["tokenizer"].reason.startswith("as many tokens as the original's")
    assert said["paragraph"].status == said["ending"].status == "skip"
    spoilt = rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.block_zeroed)
    with served(spoilt, text_only=True) as server:
        assert not check_served(server.url, reference).passed


def test_tokens_that_the_server_tells_nothing_of_do_not_shift_the_others(reference: Reference) -> None:
    """llama.cpp lists no token that ends inside a character: here each 7."""
    one = reference.asked[0].model_copy(update={"answer": (5, 7, 9, 7, 3), "ids": (1, 2)})

    class Partial:
        def complete(self, ids: list[int], limit: int, **_: object) -> Answer:
            made = one.answer[len(ids) - 2 :][:limit]
            told = [{"id": token, "logprob": -0.5, "top_logprobs": []} for token in made if token != 7]
            return Answer("", "length", len(ids), len(made), {"logprobs": {"content": told}})

    tops = served_tops(cast(Client, Partial()), one)
    assert [list(top) for top in tops] == [[5], [], [9], [], [3]]


def test_another_end_token_is_told_of_where_answers_end_at_the_originals_too(
    run: Path, reference: Reference, tmp_path: Path
) -> None:
    """As llama.cpp does, whose server names its end token."""
    spoilt = rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.end_token_wrong)
    for folder, status in ((run / "quantized", "pass"), (spoilt, "fail")):
        with served(folder, "llama.cpp") as server:
            server.ends |= set(reference.ends)
            (found,) = [check for check in check_served(server.url, reference).checks if check.name == "ending"]
        assert found.status == status
    assert "the server says that" in found.reason
    assert "another end token" in found.reason


@pytest.mark.parametrize("nth", [0, -1])
def test_an_ordinary_token_that_ends_answers_is_told_of(
    nth: int, run: Path, reference: Reference, tmp_path: Path
) -> None:
    """The commonest, at which these answers end at once, or one that the shortest prompts' answers do not have."""
    told = Counter(token for one in reference.asked for token in one.answer if token not in reference.ends)

    def ends_too(folder: Path) -> None:
        document = {"eos_token_id": [*reference.ends, told.most_common(3)[nth][0]]}
        (folder / "generation_config.json").write_text(json.dumps(document))

    said = failed(rubbish.spoiled(run / "quantized", tmp_path / "spoilt", ends_too), reference)
    assert "another end token" in said["ending"]


def test_a_server_that_ignores_logit_bias_is_not_judged_by_it(
    run: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = Client.complete

    def deaf(self: Client, prompt: Prompt, max_tokens: int, **more: Any) -> Answer:
        return complete(self, prompt, max_tokens, **{key: more[key] for key in more if key != "logit_bias"})

    monkeypatch.setattr(Client, "complete", deaf)
    with served(run / "quantized") as server:
        found = check_served(server.url, reference).checks
    assert [check.reason for check in found if check.name == "ending"] == ["the server takes no notice of logit_bias"]
    assert [check for check in found if check.status == "fail"] == []


def test_bos_twice_is_named(run: Path, reference: Reference) -> None:
    assert reference.bos is None  # the tiny tokenizer puts none
    found = failed(run / "quantized", reference, bos_twice=True)
    assert "is put before it" in found["tokenizer"]


def test_static_scales_that_are_wrong_fail(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(PARAGRAPHS) * 8)
    calibration = {"samples": 8, "seq_len": 64, "source": str(tmp_path / "text.txt")}
    run = evaluated(tmp_path, model, STATIC | {"calibration": calibration})
    assert failed(run / "quantized", read_reference(run)) == {}
    spoilt = rubbish.spoiled(run / "quantized", tmp_path / "spoilt", rubbish.static_scales_wrong)
    assert "distributions" in failed(spoilt, read_reference(run))


def command(arguments: list[str]) -> int:
    """The exit code of `quantpress …`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quantpress", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    with served(run / "quantized") as server:
        yield server.url


def test_the_command_needs_the_reference_alone(
    url: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reference.json").write_bytes((run / "eval/reference.json").read_bytes())
    assert command(["check", url, "--reference", str(tmp_path)]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert command(["check", f"{url}/v1", "--reference", str(tmp_path / "reference.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "PASSED"
    assert said["against"]["positions"] > 60
    (tmp_path / "reference.json").write_text("{}")
    assert command(["check", url, "--reference", str(tmp_path)]) == 2
    assert "not a reference" in capsys.readouterr().err


def test_a_folder_without_a_reference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "http://127.0.0.1:9", "--reference", str(tmp_path)]) == 2
    assert "no reference.json" in capsys.readouterr().err


def test_divergence_is_at_most_that_of_all_tokens() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 50).log_softmax(-1)
    whole = float((p.exp() * (p - q)).sum())
    assert divergence(p.tolist(), q.tolist()) == pytest.approx(whole, abs=1e-5)
    some = p.topk(10).indices
    assert 0 < divergence(p[some].tolist(), q[some].tolist()) < whole
    assert divergence(p[some].tolist(), p[some].tolist()) == 0
