"""lm-eval's tasks: local files, the paired comparison, and every answer equal to a plain computation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'quantpress[tasks]'")

from quantpress.core.errors import BadInput
from quantpress.eval.measure.likelihood import Scorer
from quantpress.eval.measure.lm_eval_model import LmEvalModel
from quantpress.eval.measure.task_scores import Tasks, TaskScores, _shipped, compare_tasks, kept
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton
from quantpress.recipe import Task

from ...tiny import build, tokenizer

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, train: shots.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: tiny_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their data beside them, found from wherever the command runs."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["cat", "dog", "owl", "fox", "elk"]
    rows = [
        {"question": f"the {a} met the", "choices": [b, c], "answer": i % 2}
        for i, (a, b, c) in enumerate((a, b, c) for a in words for b in words for c in words if len({a, b, c}) == 3)
    ]
    for name, part in (("questions", rows[:12]), ("shots", rows[12:16])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    for name, text in (("choices", CHOICES), ("last_word", LAST_WORD), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, build("llama", folder)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network and a data cache of the test's own."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert datasets is not None


def ask(folder: Path, wanted: list[Task], bos: int | None = 0) -> list[TaskScores]:
    scorer = Scorer(Skeleton(Checkpoint(folder), device=torch.device("cpu")), tokenizer())
    return Tasks(wanted).run(LmEvalModel(scorer, tokenizer(), bos))


@pytest.mark.parametrize("bos", [None, 0])
def test_choices_are_scored_as_a_plain_forward_pass_scores_them(
    files: Path, model: tuple[Path, Any], bos: int | None
) -> None:
    folder, plain = model
    (outcome,) = ask(folder, [Task(file=str(files / "choices.yaml"), few_shot=0)], bos)
    encode = tokenizer()
    right = []
    for line in (files / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        values = []
        for choice in row["choices"]:
            front = ([] if bos is None else [bos]) + encode(row["question"], add_special_tokens=False)["input_ids"]
            rest = encode(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_probs = torch.log_softmax(plain(torch.tensor([front + rest])).logits[0, :-1].float(), -1)
            values.append(float(log_probs[-len(rest) :].gather(1, torch.tensor(rest)[:, None]).sum()))
        right.append(float(int(np.argmax(values)) == row["answer"]))
    assert (outcome.task, outcome.metric, outcome.few_shot) == ("choices", "acc", 0)
    in_order = [value for _, value in sorted(outcome.scores.items(), key=lambda kv: int(kv[0].split(":")[1]))]
    assert in_order == right


def test_a_limit_and_few_shots_are_kept_to(files: Path, model: tuple[Path, Any]) -> None:
    wanted = Task(file=str(files / "choices.yaml"), few_shot=2, limit=5)
    first, again = (ask(model[0], [wanted])[0] for _ in range(2))
    plain = ask(model[0], [Task(file=str(files / "choices.yaml"), limit=5)])[0]
    assert len(first.scores) == 5
    assert first.few_shot == 2
    assert first == again  # the same examples each time
    assert first.scores.keys() != plain.scores.keys()  # the prompts are part of what is compared


def test_only_means_over_documents_are_kept(files: Path, model: tuple[Path, Any]) -> None:
    (outcome,) = ask(model[0], [Task(file=str(files / "last_word.yaml"), limit=4)])
    assert outcome.metric == "acc"
    with pytest.raises(
        BadInput, match="task last_word: no metric 'perplexity' that is a mean over documents; it has acc"
    ):
        ask(model[0], [Task(file=str(files / "last_word.yaml"), limit=4, metric="perplexity")])


def test_written_answers_are_greedy_and_end_at_the_stop(files: Path, model: tuple[Path, Any]) -> None:
    (outcome,) = ask(model[0], [Task(file=str(files / "writing.yaml"), limit=3)])
    assert outcome.metric == "exact_match"
    assert set(outcome.scores.values()) <= {0.0, 1.0}


def test_two_models_are_compared_document_by_document(files: Path, model: tuple[Path, Any], tmp_path: Path) -> None:
    build("llama", tmp_path, seed=5)
    wanted = [Task(file=str(files / "choices.yaml"))]
    before, after = ask(model[0], wanted), ask(tmp_path, wanted)
    (row,) = compare_tasks(after, before)
    assert row.original is not None
    assert (row.n, row.few_shot) == (12, 0)
    gained = [after[0].scores[d] - before[0].scores[d] for d in before[0].scores]
    assert row.difference == pytest.approx(np.mean(gained))
    assert row.difference == pytest.approx(row.artifact.value - row.original.value)
    assert row.difference_interval is not None
    assert row.difference_interval[0] < row.difference < row.difference_interval[1]
    (alone,) = compare_tasks(after, None)
    assert alone.original is None
    assert alone.recovery is None
    fewer = [TaskScores("choices", "acc", True, 0, dict(list(before[0].scores.items())[:3]))]
    with pytest.raises(BadInput, match="given different documents"):
        compare_tasks(after, fewer)


def test_the_originals_answers_are_kept_until_something_changes(files: Path, tmp_path: Path) -> None:
    outcomes = [TaskScores("choices", "acc", True, 0, {"a": 1.0})]
    asked: list[int] = []

    def run() -> list[TaskScores]:
        asked.append(1)
        return outcomes

    wanted = Task(file=str(files / "choices.yaml"))
    for limit, model in ((None, "m"), (None, "m"), (3, "m"), (None, "other")):
        tasks = Tasks([wanted.model_copy(update={"limit": limit})])
        assert kept(tmp_path, tasks, [model], run) == outcomes
    assert len(asked) == 3
    data = files / "questions.jsonl"
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert kept(tmp_path, Tasks([wanted]), ["m"], run) == outcomes
    assert len(asked) == 4


def test_a_function_of_a_task_counts_by_its_code(files: Path) -> None:
    document = CHOICES.replace("task: tiny_choices", "task: tiny_helped\nprocess_docs: !function helper.shown")
    (files / "helped.yaml").write_text(document, encoding="utf-8")
    helper, seen = files / "helper.py", []
    for code in (
        "def shown(docs): return docs\n",
        "def shown(docs): return docs\n",
        "def shown(docs): return 0 or docs\n",
    ):
        helper.write_text(code, encoding="utf-8")  # written anew: another function object each time
        seen.append(Tasks([Task(file=str(files / "helped.yaml"))]).identity())
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task(file="no/such.yaml"), "evaluation.tasks: no/such.yaml: no such file"),
        (Task(file="{files}/broken.yaml"), "broken.yaml: cannot be read"),
        (Task(file="{files}/nameless.yaml"), "nameless.yaml: no `task: name`"),
        (Task(file="{files}/dataless.yaml"), "task dataless: "),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_before_any_model_runs(files: Path, task: Task, said: str) -> None:
    (files / "broken.yaml").write_text("task: [", encoding="utf-8")
    (files / "nameless.yaml").write_text("dataset_path: json\n", encoding="utf-8")
    (files / "dataless.yaml").write_text(CHOICES.replace("questions.jsonl", "gone.jsonl"), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        Tasks([task.model_copy(update={"file": str(task.file).replace("{files}", str(files))})])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_command_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.eval.measure.task_scores.importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'quantpress\[tasks\]'"):
        Tasks([Task(name="arc_easy")])


@pytest.mark.slow  # reads the library's index of some thousand tasks
def test_a_name_the_library_does_not_know_is_refused() -> None:
    with pytest.raises(BadInput, match="lm-eval knows no task 'arc_eazy'"):
        Tasks([Task(name="arc_eazy")])


def test_rolling_likelihoods_are_those_of_windows_one_after_another(model: tuple[Path, Any]) -> None:
    from lm_eval.api.instance import Instance

    folder, plain = model
    text = "one two three " * 20  # 280 bytes: three windows of 128
    scorer = Scorer(Skeleton(Checkpoint(folder), device=torch.device("cpu")), tokenizer())
    (value,) = LmEvalModel(scorer, tokenizer(), 0).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))]
    )
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), 128):
        stop = min(start + 128, len(ids))
        given = [0, *ids][max(0, stop - 128) : stop] if start else [0, *ids[: stop - 1]]
        with torch.no_grad():
            log_probs = torch.log_softmax(plain(torch.tensor([given])).logits[0].float(), -1)[-(stop - start) :]
        total += float(log_probs.gather(1, torch.tensor(ids[start:stop])[:, None]).sum())
    assert value == pytest.approx(total, rel=1e-4)


def test_a_task_of_the_library_is_found_without_the_index_of_all() -> None:
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    assert _shipped("arc_easy") == str(tasks / "arc" / "arc_easy.yaml")
    assert _shipped("lambada_openai") == str(tasks / "lambada" / "lambada_openai.yaml")
    for name in ("ai2_arc", "mmlu", "no_such_task"):  # a tag, a group, and nothing
        assert _shipped(name) is None


@pytest.mark.slow
def test_what_is_found_is_what_the_index_of_all_has() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    names = sorted(index)[:: len(index) // 60] + [
        name for name in ("hellaswag", "gsm8k", "winogrande") if name in index
    ]
    found = {name: place for name in names if (place := _shipped(name)) is not None}
    assert len(found) > len(names) / 2
    for name, place in found.items():
        assert place == str(index[name].yaml_path), name
