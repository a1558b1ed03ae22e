"""The run that is recommended, against sums done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.eval.measure.sections import KvCache, TaskResult
from quantpress.eval.release.recommend import Wish, cache_bytes, recommend
from quantpress.eval.report.measured_run import open_run
from quantpress.eval.report.standing import one_metric, perplexity_recovery, task_recovery

from ..report.test_report import fake_manifest, fake_results, write_run

GIB = 1 << 30
SERVING = {
    "schema": 1, "server": "vllm", "version": "0.32", "requests": 8, "ttft_ms": 112.4, "tokens_per_second": {"1": 21.5},
    "itl_ms": {"p50": 40.1, "p95": 55.0, "p99": 61.0}, "peak_rss_bytes": 1_900_000_000,
    "artifact": "quantized", "device": "cpu", "command": ["vllm"], "verdict": "PASSED", "agreement": None,
    "max_model_len": 1024, "load_seconds": 9.0, "prompt_tokens": 20, "log": None,
    "checks": [{"name": "answers", "status": "pass", "reason": "", "seconds": 1.0},
               {"name": "tools", "status": "skip", "reason": "no template", "seconds": 0.0}],
}  # fmt: skip


def task(name: str, before: float, after: float, metric: str = "acc", error: float = 0.01) -> dict[str, Any]:
    return {
        "task": name, "metric": metric, "higher_is_better": True, "few_shot": 0, "n": 100, "sha256": "ab",
        "artifact": {"value": after, "stderr": 0.05}, "original": {"value": before, "stderr": 0.05},
        "difference": after - before, "difference_stderr": error, "recovery": after / before,
    }  # fmt: skip


def runs(folder: Path, tasks: bool = False) -> Path:
    """Three runs of 8, 4 and 2 GB; 1 MiB of cache a token; perplexity 1, 5 and 60 % up."""
    for name, size, rise, score in (("int8", 8e9, 0.01, 0.60), ("int4", 4e9, 0.05, 0.59), ("int2", 2e9, 0.6, 0.3)):
        results = fake_results(17.05 * (1 + rise), "NONE")
        results["perplexity_increase_interval"] = (rise - 0.01, rise + 0.01)
        results["efficiency"] = {
            "bytes": int(size), "parameters": 8_000_000_000, "bits_per_parameter": 8.0,
            "cache": {"dtype": "bfloat16", "bytes_per_token": 1 << 20, "context": 1, "bytes_at_context": 1 << 20},
        }  # fmt: skip
        if tasks:
            results["tasks"] = [task("arc", 0.6, score), task("piqa", 0.6, 0.6)]
        write_run(folder / name, fake_manifest(name, size=int(size), blocks=1), results)
        write_json(
            folder / name / "eval" / "serving.json", SERVING | {"tokens_per_second": {"1": 1.0, "8": 1e10 / size}}
        )
    return folder


def wish(**more: Any) -> Wish:
    return Wish.parse(**({"memory": "16GiB", "context": 1024, "concurrency": 2, "margin": "1GiB"} | more))


def test_the_best_quality_that_fits(tmp_path: Path) -> None:
    found = recommend([runs(tmp_path)], wish())
    assert found.choice is not None
    assert found.choice.run.label == "int8"
    assert found.choice.needs == 8_000_000_000 + 2 * 1024 * (1 << 20)  # 10.15 GB and 1 GiB, below 17.18 GB
    said = "qualifies, and is further from the original: KL 0.0634 (0.0603 to 0.0665) against 0.0129 (0.0123 to 0.0136)"
    assert dict(found.others)["int4"] == said.replace("against", "against KL")


def test_memory_that_is_one_byte_short_does_not_fit(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    needed = 8_000_000_000 + 2 * 1024 * (1 << 20) + GIB
    for memory, label in ((needed, "int8"), (needed - 1, "int4")):
        found = recommend([folder], wish(memory=memory))
        assert found.choice is not None
        assert found.choice.run.label == label
    assert "too much" in dict(found.others)["int8"]


def test_a_floor_a_preference_and_nothing(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    smallest = recommend([folder], wish(min_recovery="90%", prefer="smallest")).choice
    assert smallest is not None
    assert smallest.run.label == "int4"
    fastest = recommend([folder], wish(prefer="fastest")).choice
    assert fastest is not None
    assert fastest.run.label == "int4"  # int2 is faster, and not fine
    found = recommend([folder], wish(prefer="fastest", min_recovery="50%")).choice
    assert found is not None
    assert found.run.label == "int2"
    none = recommend([folder], wish(min_recovery="99.9%"))
    assert none.choice is None
    reasons = dict(none.others)
    assert "is below 99.9 %" in reasons["int4"]
    assert "too close to 99.9 % to call" in reasons["int8"]  # 99.0 % (98.0 to 100 %)


def test_a_floor_is_held_against_the_safe_end_of_the_interval(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    found = recommend([folder], wish(min_recovery="98.9%"))  # int8: 99.0 % (98.0 to 100 %)
    assert found.choice is None
    assert dict(found.others)["int8"] == "recovery 99.0 % (98.0 to 100 %) is too close to 98.9 % to call: measure more"
    sure = recommend([folder], wish(min_recovery="98%"))
    assert sure.choice is not None
    assert sure.choice.run.label == "int8"


def test_tasks_in_common_measure_the_recovery_and_say_how_many_questions_are_needed(tmp_path: Path) -> None:
    folder = runs(tmp_path, tasks=True)
    found = recommend([folder], wish(min_recovery="95%"))
    assert found.choice is not None
    assert found.choice.recovery.value == pytest.approx(1.0)
    assert any("mean score of arc, piqa" in line for line in found.why)
    short = dict(recommend([folder], wish(min_recovery="98%")).others)
    assert short["int8"].endswith("to call: about 300 questions would settle it, 200 were asked")


def test_noise_is_never_less_quality(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    path = folder / "int4" / "eval" / "results.json"
    document = json.loads(path.read_text())
    document["divergence"] |= {"kl_mean": 0.0135, "kl_stderr": 0.001}  # int8 has 0.0129 ± 0.0003
    path.write_text(json.dumps(document))
    found = recommend([folder], wish())
    assert found.choice is not None
    assert found.choice.run.label == "int8"  # the lower KL decides
    assert "is as close to the original within the noise" in dict(found.others)["int4"]


def test_the_smallest_that_is_fine_comes_before_a_smaller_one_that_is_not(tmp_path: Path) -> None:
    found = recommend([runs(tmp_path)], wish(prefer="smallest"))
    assert found.choice is not None
    assert found.choice.run.label == "int4"
    assert dict(found.others)["int2"].startswith("qualifies, but look closer: KL 0.611")


def test_recovery_of_tasks_by_hand() -> None:
    rows = [task("arc", 0.5, 0.4), task("arc", 0.6, 0.57, "acc_norm"), task("piqa", 0.8, 0.76)]
    found = task_recovery(one_metric(TaskResult.model_validate(row) for row in rows))
    assert found.value == pytest.approx((0.57 + 0.76) / (0.6 + 0.8))
    assert found.interval == pytest.approx(
        (found.value - 1.96 * (2e-4) ** 0.5 / 1.4, found.value + 1.96 * (2e-4) ** 0.5 / 1.4)
    )


def test_a_broken_model_recovers_nothing(tmp_path: Path) -> None:
    broken = fake_results() | {"perplexity_increase": None}
    assert perplexity_recovery(open_run(write_run(tmp_path / "run", fake_manifest(), broken))).value == 0


def test_a_windowed_cache_stops_growing() -> None:
    cache = KvCache(dtype="bfloat16", bytes_per_token=10, bytes_per_token_past_window=4, sliding_window=100, context=1,
                  bytes_at_context=10)  # fmt: skip
    assert cache_bytes(cache, 80) == 800
    assert cache_bytes(cache, 150) == 100 * 10 + 50 * 4


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--fits 'plenty': 'plenty' is no size; write 6000000000, 4GB or 24GiB$"):
        wish(memory="plenty")
    with pytest.raises(BadInput, match=r"^--fits '24,5GiB': '24,5GiB' is no size"):  # was read as 24 bytes
        Wish.parse(memory="24,5GiB", context=64)
    with pytest.raises(BadInput, match=r"--min-recovery"):
        wish(min_recovery="980%")
    with pytest.raises(BadInput, match="neither a run folder"):
        recommend([tmp_path], wish())
    folder = runs(tmp_path)
    path = folder / "int4" / "eval" / "results.json"
    document = json.loads(path.read_text())
    document["efficiency"] = None
    path.write_text(json.dumps(document))
    assert "is not known" in dict(recommend([folder], wish()).others)["int4"]
    (folder / "int4" / "eval" / "serving.json").unlink()
    with pytest.raises(BadInput, match="the speed of int4 was not measured"):
        recommend([folder], wish(prefer="fastest"))
