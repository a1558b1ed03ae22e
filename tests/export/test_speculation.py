"""What an export says of the artifact as a draft: the measured figures, and what they are worth."""

import json
from pathlib import Path

import pytest

from quantpress.artifact.artifact import Artifact
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.eval.measure.draft_acceptance import Accepted, Draft
from quantpress.eval.measure.sections import EvaluationText
from quantpress.exports.package import export
from quantpress.exports.servers.deployment import ModelFolder
from quantpress.exports.servers.resources import Resources
from quantpress.exports.servers.sglang import Sglang
from quantpress.exports.servers.vllm import Vllm, deploy
from quantpress.exports.speculation import RECORD, Acceptance, measured
from quantpress.numbers.types import Grid

from ..quantize.formats.artifacts import make, uniform

TOKENS = {1: 1.9, 2: 2.7, 4: 3.9, 8: 5.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    make(folder / "quantized", "compressed-tensors", uniform(Grid(group_size=32)))
    write_json(folder / "manifest.json", {"quantpress": "1", "model": {"id": "org/model"}, "recipe": {}})
    return folder


def draft(run: Path, tokens: dict[int, float], ratio: float = 4.0) -> None:
    """The record that eval/draft.py writes, of an original `ratio` times the size."""
    text = EvaluationText(source="t", sha256="0", tokens=9, windows=1, window=9, stride=9, bos=False)
    rate = Accepted(rate=0.9, stderr=0.01, interval=(0.88, 0.92), tokens_a_pass=tokens)
    size = Artifact(run / "quantized").total_bytes
    greedy = rate.model_copy(update={"rate": 0.95})
    found = Draft(
        schema=1, text=text, sampled=rate, greedy=greedy, original_bytes=int(ratio * size), artifact_bytes=size
    )
    (run / "eval").mkdir(exist_ok=True)
    write_json(run / RECORD, found.model_dump(mode="json", by_alias=True))


def test_the_speed_up_is_the_papers() -> None:
    """With one rate everywhere, Theorem 3.8: (1 - rate^(n+1)) / ((1 - rate) (n c + 1))."""
    rate, cost = 0.8, 0.25
    found = Acceptance(
        rate, 0, rate, {n: (1 - rate ** (n + 1)) / (1 - rate) for n in (1, 2, 3, 4, 6, 8)}, cost, "org/m"
    )
    for n in found.tokens:
        assert found.speedup(n) == pytest.approx((1 - rate ** (n + 1)) / ((1 - rate) * (n * cost + 1)))
    assert found.best == max(found.tokens, key=lambda n: (1 - rate ** (n + 1)) / (n * cost + 1))


@pytest.mark.parametrize(
    ("target", "flags"),
    [
        (Vllm(draft_for="org/model"), '{"method": "draft_model", "model": "/model", "num_speculative_tokens": 4}'),
        (Sglang(draft_for="org/model"), "--speculative-num-steps 4 --speculative-eagle-topk 1 "
                                        "--speculative-num-draft-tokens 5"),
    ],
)  # fmt: skip
def test_what_was_measured_is_stated(run: Path, target: Vllm | Sglang, flags: str) -> None:
    draft(run, TOKENS)
    folder = export(run, target).folder
    text = (folder / "README.md").read_text()
    assert (
        "org/model accepts 90.0% (± 1.0%) of the tokens the artifact drafts at temperature 1, and 95.0% at 0." in text
    )
    assert "may accept fewer" not in text
    assert "| 4 | 3.90 | 1.95 |" in text  # 3.9 tokens for a pass of the original and four of a quarter
    assert "best" not in text  # four are drafted, and bring the most
    facts = json.loads((folder / "export.json").read_text())
    assert flags in " ".join(facts["command"])
    assert facts["draft"] == {
        "acceptance": 0.9, "acceptance_stderr": 0.01, "acceptance_greedy": 0.95, "tokens_a_pass": 3.9,
        "speedup_at_most": 1.95, "best_draft_tokens": 4,
    }  # fmt: skip


def test_another_number_of_tokens_and_another_model(run: Path) -> None:
    draft(run, TOKENS)
    text = (export(run, Vllm(draft_for="/srv/larger", draft_tokens=5)).folder / "README.md").read_text()
    assert "at 0; /srv/larger, served here, may accept fewer" in text
    assert "5 are drafted here; 4 would bring the most: `draft_tokens: 4`." in text


def test_a_draft_that_costs_too_much_is_called_so(run: Path) -> None:
    draft(run, {1: 1.2, 4: 1.3}, ratio=1.5)
    text = (export(run, Vllm(draft_for="org/model")).folder / "README.md").read_text()
    assert "serve the original alone" in text
    assert "would bring the most" not in text


def test_without_a_measurement_the_way_to_one_is_told(run: Path) -> None:
    folder = export(run, Vllm(draft_for="org/model")).folder
    assert f"has not been measured: `quantpress eval {run} --draft` measures it" in (folder / "README.md").read_text()
    assert json.loads((folder / "export.json").read_text())["draft"] is None
    assert "draft" not in json.loads((export(run, Vllm(), run / "plain").folder / "export.json").read_text())


def test_figures_of_other_weights_do_not_count(run: Path) -> None:
    draft(run, TOKENS)
    document = json.loads((run / RECORD).read_text())
    write_json(run / RECORD, document | {"artifact_bytes": 1})
    assert measured(run, run / "quantized") is None
    write_json(run / RECORD, {"sampled": {}})
    with pytest.raises(BadInput, match=r"draft.json: cannot be read .* measure again"):
        measured(run, run / "quantized")


def test_a_drafts_cache_scales_are_not_the_originals() -> None:
    model = ModelFolder("m", Resources(1, 1, 1, 1, 1), kv_cache="fp8")
    for target, cache in ((Vllm(), "fp8"), (Vllm(draft_for="org/m"), "auto")):
        arguments = deploy(target, model).arguments
        assert arguments[arguments.index("--kv-cache-dtype") + 1] == cache
