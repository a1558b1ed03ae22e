"""A sweep of a real model in which everything happens: page, summary, card and `recommend` say the same."""

import json
from pathlib import Path

import pytest

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.eval.release.publish import prepare_upload
from quantpress.eval.release.recommend import Wish
from quantpress.recipe import Recipe

from ..eval.report.test_report import Page

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
ROWS = {"destroyed": {"bits": 2}, "close": {"bits": 8}, "closer": {"bits": 8, "group_size": 32}, "slow": {"bits": 6}}


def recipe(name: str, weights: dict[str, int], text: str = "default") -> Recipe:
    return Recipe.model_validate(
        {
            "name": name, "model": MODEL, "method": "rtn", "weights": {"group_size": 64} | weights,
            "evaluation": {"source": text, "windows": 4, "window": 256, "prompts": [], "domains": [], "bos": "never"},
        }
    )  # fmt: skip


def test_a_real_sweep_is_judged_alike_everywhere(tmp_path: Path) -> None:
    recipes = [recipe(name, weights) for name, weights in ROWS.items()]
    recipes.append(recipe("failed", {"bits": 8}, str(tmp_path / "nowhere.txt")))
    out = tmp_path / "sweep"
    ended = {one.name: one.status for one in api.sweep(recipes, None, out).outcomes}
    assert ended == {**dict.fromkeys(ROWS, "done"), "failed": "failed"}
    results = out / "slow" / "eval" / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"complete": False}))  # as a kill leaves it

    page = api.compare([out], tmp_path / "page")
    summary = json.loads((page.parent / "summary.json").read_text(encoding="utf-8"))
    levels = {run["label"]: run["standing"]["level"] for run in summary["runs"]}
    assert levels == {"destroyed": "broken", "close": "fine", "closer": "fine"}
    assert {one["name"] for one in summary["failed"]} == {"failed", "slow"}
    text = Page(page.read_text(encoding="utf-8")).text
    assert f"Take {summary['take']}: " in text
    for prefer in ("smallest", "quality"):
        wish = Wish.parse(memory="24GiB", context=256, prefer=prefer)
        found = api.recommend([out], wish)
        assert found.choice is not None
        assert found.choice.run.label == summary["take" if prefer == "smallest" else "best"]
        others = dict(found.others)
        assert others["destroyed"].startswith("broken: it predicts the text worse than")
        assert others["slow"].startswith("not finished")
        assert others["failed"].startswith("failed")
        assert others["destroyed"].removeprefix("broken: ") in text.replace("\u00a0", " ")
    assert "**Broken:**" in (out / "destroyed" / "quantized" / "README.md").read_text(encoding="utf-8")
    assert "**Fine:**" in (out / "close" / "quantized" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(BadInput, match="is broken"):
        prepare_upload(out / "destroyed", "org/name", private=True)
