"""The one judge: page, summary, card and `recommend` say the same of a sweep in which everything happened."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.eval.measure.baselines import below, doubt, unigram_nll
from quantpress.eval.measure.results import Results
from quantpress.eval.release.recommend import Wish, recommend
from quantpress.eval.report.card import write_card
from quantpress.eval.report.measured_run import find_runs, open_run
from quantpress.eval.report.page import write_comparison, write_report, write_sweep
from quantpress.eval.report.standing import standing
from quantpress.eval.report.verdict import choose, verdict

from ..release.test_recommend import task
from .test_report import Page, fake_manifest, fake_results, write_run

VOCABULARY = 49152


def measured(perplexity: float, kl: float, sure: float = 0.03, **more: Any) -> dict[str, Any]:
    """Figures of an artifact whose KL is known to within the share `sure`; arc_easy cannot tell any of them apart."""
    results = fake_results(perplexity, "NONE")
    results["text"] |= {"vocabulary": VOCABULARY, "unigram_nll": math.log(700)}
    results["perplexity_increase_interval"] = [perplexity / 17.05 * 0.98 - 1, perplexity / 17.05 * 1.02 - 1]
    results["divergence"] |= {
        "kl_mean": kl,
        "kl_stderr": kl * sure / 1.96,
        "kl_interval": [kl * (1 - sure), kl * (1 + sure)],
    }
    cache = {"dtype": "bfloat16", "bytes_per_token": 23_040, "context": 1, "bytes_at_context": 23_040}
    results["efficiency"] = {"cache": cache, "bytes": 1, "parameters": 1, "bits_per_parameter": 8.0}
    results["tasks"] = [task("arc_easy", 0.50, 0.49, "acc_norm", error=0.05)]
    return results | more


@pytest.fixture(scope="module")
def measured_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep: a destroyed run, an unfinished and a failed one, two close ones, a beaten one, one near the original."""
    rows = [
        ("w2a16-rtn", 2, 90e6, 53_578.0, 7.2), ("w4-g64", 4, 113e6, 18.0, 0.060), ("w4-g32", 4, 118e6, 17.98, 0.059),
        ("w5-rtn", 5, 130e6, 18.2, 0.075), ("w8a16", 8, 163e6, 17.06, 0.008),
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("measured") / "sweep"
    for name, bits, size, perplexity, kl in rows:
        run = write_run(out / name, fake_manifest(name, bits, int(size), 2), measured(perplexity, kl))
        write_report(run)
    write_run(out / "w3-slow", fake_manifest("w3-slow", 3, int(100e6), 2), measured(19.0, 0.03, complete=False))
    write_json(out / "sweep.json", {"schema": 1, "runs": [
        {"name": "nvfp4", "status": "failed", "reason": "group_size 16 does not divide 100", "key": "k"},
    ]})  # fmt: skip
    (out / ".recipes").mkdir()
    (out / ".recipes" / "w3-never.yaml").write_text("{}")
    return out


@pytest.fixture
def sweep(measured_sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured_sweep, tmp_path / "sweep"))


def said(page: Path) -> str:
    return Page(page.read_text(encoding="utf-8")).text.replace("\u00a0", " ")


def test_page_summary_recommend_and_card_say_the_same(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.eval.report.card.servers", lambda run, repo: [])  # there are no weights to look at
    page = write_comparison([sweep], sweep / "report")
    text, summary = said(page), json.loads((page.parent / "summary.json").read_text())
    wish = {"memory": "24GiB", "context": 8192}
    smallest, best = (recommend([sweep], Wish.parse(**wish, prefer=p)) for p in ("smallest", "quality"))
    assert smallest.choice is not None
    assert best.choice is not None
    assert smallest.choice.run.label == summary["take"] == "w4-g64"
    assert best.choice.run.label == summary["best"] == "w8a16"
    assert "The smallest that is fine: w4-g64" in text
    assert "Closest to the original: w8a16" in text
    assert "What to do Take w4-g64: KL 0.0600" in text
    assert "w8a16 (163 MB against 113 MB) is clearly closer to the original" in text
    assert "3 of 5 are worth choosing between" in text
    worth = {one["label"] for one in summary["runs"] if one["pareto"]}
    qualify = {one.run.label for one in best.candidates if not one.misses}
    assert worth == qualify == {"w4-g64", "w4-g32", "w8a16"}
    levels = {one["label"]: one["standing"]["level"] for one in summary["runs"]}
    for label, level in levels.items():
        assert verdict(open_run(sweep / label)).level == level
        assert said(sweep / label / "report" / "index.html").count(verdict(open_run(sweep / label)).reason) >= 1
        (sweep / label / "quantized").mkdir()
        (sweep / label / "quantized" / "config.json").write_text('{"model_type": "llama"}')
        card = write_card(sweep / label).path.read_text(encoding="utf-8")
        assert f"**{ {'fine': 'Fine', 'broken': 'Broken'}[level] }:**" in card
    markdown = (page.parent / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    assert "**The smallest that is fine: w4-g64" in markdown
    assert '<a href="../w4-g64/report/index.html">w4-g64</a>' in page.read_text(encoding="utf-8")


def test_a_destroyed_model_is_never_taken_whatever_a_tasks_noise_says(sweep: Path) -> None:
    for prefer, floor in (("smallest", "90%"), ("smallest", None), ("quality", None)):
        wish = Wish.parse(memory="24GiB", context=64, prefer=prefer, min_recovery=floor)
        found = recommend([sweep], wish)
        assert found.choice is None or found.choice.run.label != "w2a16-rtn"
        reason = dict(found.others)["w2a16-rtn"]
        assert reason.startswith("broken: it predicts the text worse than a uniform guess over its vocabulary would")
        assert "recovery" not in reason  # what is broken needs no second reason
    text = said(write_comparison([sweep], sweep / "report"))
    assert "Red triangles at the edge are broken" in text
    found = recommend([sweep], Wish.parse(memory="24GiB", context=64, min_recovery="98%", prefer="smallest"))
    assert found.choice is None  # 98.0 % (78 to 118 %) of 100 questions says nothing about 98 %
    assert "recovery 98.0 % (78.4 to 118 %) is too close to 98.0 % to call" in dict(found.others)["w8a16"]


def test_what_failed_or_is_not_finished_is_left_out_with_a_note(sweep: Path) -> None:
    notes = {
        "nvfp4": "failed: group_size 16 does not divide 100",
        "w3-slow": "not finished: `quantpress eval` of its folder measures what is missing",
        "w3-never": "not finished: it has no artifact yet",
    }
    others = dict(recommend([sweep], Wish.parse(memory="24GiB", context=64)).others)
    page = write_comparison([sweep], sweep / "report")
    for name, reason in notes.items():
        assert others[name] == reason
        assert f"{name}{reason}" in said(page)
        assert {"name": name, "reason": reason} in json.loads((page.parent / "summary.json").read_text())["failed"]


def test_noise_is_never_less_quality_and_beaten_is_never_worth_choosing(sweep: Path) -> None:
    others = dict(recommend([sweep / "w4-g64", sweep / "w4-g32"], Wish.parse(memory="24GiB", context=64)).others)
    assert others == {"w4-g64": "qualifies, and is as close to the original within the noise: "
                                "KL 0.0600 (0.0582 to 0.0618) against KL 0.0590 (0.0572 to 0.0608)"}  # fmt: skip
    everything = dict(recommend([sweep], Wish.parse(memory="24GiB", context=64)).others)
    assert everything["w5-rtn"].startswith("w4-g32 is smaller and closer to the original: KL 0.0590")
    runs, _ = find_runs([sweep])
    assert "w5-rtn" not in choose(runs).worth


def test_clearly_better_task_scores_keep_a_run_from_being_beaten(tmp_path: Path) -> None:
    def run(name: str, size: float, kl: float, score: float) -> Path:
        results = measured(18.0, kl) | {"tasks": [task("arc_easy", 0.5, score, "acc_norm", error=0.004)]}
        return write_run(tmp_path / name, fake_manifest(name, size=int(size), blocks=2), results)

    folders = [run("small", 110e6, 0.05, 0.45), run("large", 120e6, 0.06, 0.50)]
    found = recommend(folders, Wish.parse(memory="24GiB", context=64))
    assert found.choice is not None
    assert found.choice.run.label == "large"
    assert choose([open_run(folder) for folder in folders]).worth == ["small", "large"]


def test_a_sweep_of_which_nothing_is_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / ".recipes").mkdir()
    (tmp_path / ".recipes" / "a.yaml").write_text("{}")
    with pytest.raises(BadInput, match=r"no finished run in .* \(a not finished: it has no artifact yet\)"):
        find_runs([tmp_path])
    assert write_sweep(tmp_path, []) is None


@pytest.mark.parametrize(
    ("perplexity", "kl", "level"),
    [(17.1, 0.01, "fine"), (19.0, 0.2, "look closer"), (17.5, 0.099, "look closer"), (40.0, 0.8, "broken"),
     (30.0, 1.2, "broken"), (800.0, 0.5, "broken")],
)  # fmt: skip
def test_without_gates_soft_limits_judge(tmp_path: Path, perplexity: float, kl: float, level: str) -> None:
    run = write_run(tmp_path / "run", fake_manifest(blocks=2), measured(perplexity, kl))
    assert standing(open_run(run)).level == level
    assert verdict(open_run(run)).todo


def test_a_value_below_its_limit_is_not_said_to_be_above(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fake_manifest(blocks=2), measured(17.5, 0.099))
    told = "KL 0.0990 (0.0960 to 0.102) nats per token, too close to the soft limit of 0.1 to call"
    assert standing(open_run(run)).reason == told


def test_an_original_that_predicts_nothing_gets_no_verdict(tmp_path: Path) -> None:
    results = measured(219_800.0, 0.05)
    results["original"]["perplexity"] = 229_128.0
    results["text"]["bos"] = False
    run = write_run(tmp_path / "run", fake_manifest(blocks=2), results)
    told = verdict(open_run(run))
    assert told.level == "void"
    assert "worse than a uniform guess over its vocabulary would (perplexity 49,152)" in told.reason
    assert "evaluation.bos: always" in told.reason
    page = said(write_report(run))
    assert "No verdict: the original itself predicts the text worse" in page
    assert recommend([run], Wish.parse(memory="24GiB", context=64)).choice is None


def test_the_unigram_model_leaves_each_token_out_of_its_own_count() -> None:
    tokens = torch.tensor([0, 0, 0, 1])
    by_hand = []
    for a in (1.0, 0.1, 0.01):
        left = [(2 + a) / (3 + 5 * a)] * 3 + [a / (3 + 5 * a)]
        by_hand.append(-sum(map(math.log, left)) / 4)
    assert unigram_nll(tokens, 5) == pytest.approx(min(by_hand))
    text = Results.model_validate(measured(18.0, 0.1)).text
    assert below(699.0, text) is None
    assert "counting how often each token occurs would (perplexity 700" in str(below(701.0, text))
    assert doubt(Results.model_validate(fake_results())) is None  # results that do not say cannot be doubted
