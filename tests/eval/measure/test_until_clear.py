"""What gates can resolve, before the run; and measuring more while a gate is too close to call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.eval.measure.evaluate import Watch, evaluate, prepare
from quantpress.eval.measure.foresight import foreseen, half_of_text
from quantpress.eval.measure.gates import judge
from quantpress.eval.measure.results import Results
from quantpress.eval.measure.until_clear import more_questions, more_windows
from quantpress.eval.release.sweep import plan_runs
from quantpress.recipe import Evaluation, Gates
from quantpress.recipe.evaluation import UntilClear
from quantpress.recipe.loading import parse

from ... import tiny
from .test_gates import results, score


def test_a_plan_says_what_its_gates_can_resolve() -> None:
    wanted = Evaluation.model_validate({"windows": 16, "tasks": [{"name": "arc_easy", "limit": 200}, "piqa"]})
    limits = {"max_perplexity_increase": "10%", "max_kl": 0.1, "min_recovery": {"arc_easy": "98%", "piqa": "98%"}}
    lines = foreseen(Gates.model_validate(limits | {"max_bytes": "4GB"}), wanted)
    assert len(lines) == 3  # nothing of bytes, which are exact, nor of all of piqa, whose number is not known yet
    assert (
        lines[0]
        == "gate perplexity +10.0 %: 16 windows of 1,024 tokens call what is more than about 1.5 points from it"
    )
    assert lines[2].endswith("cannot be seen to keep it; about 2,000 would")
    few = foreseen(Gates(max_perplexity_increase=0.01), wanted.model_copy(update={"windows": 2}))
    assert few[0].endswith("windows would call a fifth of the limit")
    assert foreseen(Gates(max_kl=0.1), None) == []


def test_what_is_foreseen_is_what_was_measured() -> None:
    """+101.7 % (+92.5 to +111.3 %) and 46.8 % (44.4 to 49.2 %) of MiniMind2 at 4 bits over 8 windows of 1024 tokens."""
    assert half_of_text("max_perplexity_increase", 1.017, 8 * 1024) == pytest.approx(0.094, rel=0.3)
    assert half_of_text("min_top1_agreement", 0.468, 8 * 1024) == pytest.approx(0.024, rel=0.3)


def judged(gates: Gates, **changes: Any) -> Results:
    found = results(**changes)
    return found.model_copy(update={"gates": judge(gates, found)})


def test_more_is_measured_only_while_it_may_decide() -> None:
    until = UntilClear(windows=100)
    close = Gates(max_perplexity_increase=0.042)  # 110 windows would settle it
    assert more_windows(judged(close), until) == 100
    assert more_windows(judged(close), UntilClear(windows=500)) == 110
    assert more_windows(judged(Gates(max_perplexity_increase=0.0401)), until) == 32  # nobody knows: twice as many
    assert more_windows(judged(close), UntilClear(windows=16)) is None
    assert more_windows(judged(Gates(max_perplexity_increase=0.05)), until) is None
    settled = Gates(max_perplexity_increase=0.042, max_bytes=999)  # missed already
    assert more_windows(judged(settled), until) is None


def test_questions_are_added_to_the_tasks_that_are_unclear() -> None:
    wanted = Evaluation.model_validate({"tasks": [{"name": "arc", "limit": 200}, {"name": "piqa", "limit": 200}]})
    gates = Gates.model_validate({"min_recovery": {"arc": "98%"}})
    tasks = [score("acc", 0.985, 0.965, 1.005) | {"n": 200}]
    found = judged(gates, tasks=tasks)
    (again,) = more_questions(found, UntilClear(questions=5000), wanted.tasks)
    assert (again.label, again.limit) == ("arc", 3600)
    assert more_questions(found, UntilClear(questions=200), wanted.tasks) == []
    short = [score("acc", 0.985, 0.965, 1.005) | {"n": 150}]  # it has no more documents
    assert more_questions(judged(gates, tasks=short), UntilClear(), wanted.tasks) == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with noise in its weights, and a text."""
    place = tmp_path_factory.mktemp("pair")
    tiny.build("llama", place / "model")
    tiny.build("llama", place / "noisy")
    file = place / "noisy" / "model.safetensors"
    torch.manual_seed(0)
    weights = {n: w + 0.3 * w.std() * torch.randn_like(w) if "proj" in n else w for n, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    (place / "text.txt").write_text(tiny.text(6000))
    return place


def test_an_evaluation_goes_on_until_its_gate_is_clear(pair: Path, tmp_path: Path) -> None:
    document = {"source": str(pair / "text.txt"), "windows": 2, "window": 32, "prompts": []}

    def measure(gates: Gates, **more: Any) -> Results:
        wanted = Evaluation.model_validate(document | more)
        return evaluate(pair / "model", pair / "noisy", prepare(pair / "model", wanted, tmp_path), gates, Watch())

    long = measure(Gates(), windows=32)
    assert long.divergence is not None
    limit = long.divergence.kl_mean * 1.15
    assert measure(Gates(max_kl=limit)).gates.verdict == "INCONCLUSIVE"
    found = measure(Gates(max_kl=limit), until_clear={"windows": 64})
    assert found.text is not None
    assert found.text.windows > 2
    assert found.gates.verdict == "ACCEPT" or found.text.windows == 64
    short = measure(Gates(max_kl=limit), until_clear={"windows": 5000})
    assert short.gates.verdict == "ACCEPT" or "until_clear: evaluation text" in short.notes[-1]


def test_codes_read_as_weights_are_not_measured(pair: Path, tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "codes")
    file = tmp_path / "codes" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = torch.randint(-8, 8, weights[name].shape).to(weights[name].dtype)
    weights[f"{name}_scale"] = torch.ones(len(weights[name]), 1)
    save_file(weights, file, metadata={"format": "pt"})
    wanted = Evaluation.model_validate({"source": str(pair / "text.txt"), "windows": 2, "window": 32, "prompts": []})
    with pytest.raises(BadInput, match=r"q_proj.weight_scale lies beside .*q_proj.weight, and nothing says"):
        evaluate(pair / "model", tmp_path / "codes", prepare(pair / "model", wanted, tmp_path), Gates(), Watch())
    del weights[f"{name}_scale"]
    weights["model.notes"] = torch.zeros(3)
    save_file(weights, file, metadata={"format": "pt"})
    found = evaluate(pair / "model", tmp_path / "codes", prepare(pair / "model", wanted, tmp_path), Gates(), Watch())
    assert found.notes == ("model.notes: the model has no place for this, so it was passed over",)


def test_a_sweep_needs_the_same_windows_for_all(tmp_path: Path) -> None:
    recipe = parse({"name": "a", "evaluation": {"until_clear": {}}})
    with pytest.raises(BadInput, match="runs that are compared need the same windows"):
        plan_runs([recipe], "m", "w", tmp_path / "s")
