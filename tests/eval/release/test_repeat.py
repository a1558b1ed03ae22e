"""`--repeat`: what is made again with other seeds, and that every page shows the means."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.eval.measure.evaluate import Prepared
from quantpress.eval.release.callbacks import Callbacks, Options
from quantpress.eval.release.recommend import Wish, recommend
from quantpress.eval.release.repeat import by_chance, check_repeat, reseeded
from quantpress.eval.report.measured_run import open_run
from quantpress.eval.report.page import write_comparison
from quantpress.eval.report.standing import judge_runs
from quantpress.recipe.loading import load, parse

from ...tiny import build, text
from ..report.test_report import fake_manifest, fake_results, write_run


def test_every_seed_is_raised_and_only_the_first_run_is_exported() -> None:
    recipe = parse({
        "calibration": {"seed": 5}, "transforms": ["hadamard"], "method": {"name": "autoround", "seed": 1},
        "targets": ["vllm"], "smoke": {"server": "vllm"}, "gates": {"max_kl": 0.1},
    })  # fmt: skip
    again = reseeded(recipe, 2)
    assert again.calibration.seed == 7
    assert again.transforms[0].model_dump()["seed"] == 2
    assert again.method.model_dump()["seed"] == 3
    assert (again.targets, again.smoke, again.gates.limits()) == ((), None, {})
    assert by_chance(recipe)
    assert not by_chance(load("w4a16-rtn"))
    assert by_chance(parse({"method": "rtn", "transforms": ["hadamard"]}))


@pytest.mark.slow
def test_a_run_over_three_seeds(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(text())
    source = str(tmp_path / "text.txt")
    recipe: dict[str, Any] = {
        "name": "g4", "model": str(tmp_path / "model"), "method": "gptq", "weights": {"bits": 4, "group_size": 16},
        "calibration": {"source": source, "samples": 4, "seq_len": 32},
        "evaluation": {"source": source, "windows": 2, "window": 64, "prompts": [], "domains": []},
    }  # fmt: skip
    options, notes, out = Options(cache=tmp_path / "cache", repeat=3), list[str](), tmp_path / "run"
    done = api.run(recipe, out=out, options=options)
    assert done.results is not None
    assert [one.seed for one in done.results.repeats] == [0, 1, 2]
    own = json.loads((out / "eval" / "results.json").read_text())
    assert own["divergence"]["kl_mean"] == done.results.repeats[0].kl_mean
    assert len({one.kl_mean for one in done.results.repeats}) == 3  # other samples, other weights
    shown = open_run(out)
    assert shown.divergence.kl_mean == pytest.approx(sum(one.kl_mean for one in done.results.repeats) / 3)
    assert shown.own.divergence is not None
    assert shown.own.divergence.kl_mean == done.results.repeats[0].kl_mean
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "Means over 3 runs of the recipe" in page
    assert "<h2>By seed</h2>" in page
    card = (out / "quantized" / "README.md").read_text(encoding="utf-8")
    assert "Means over 3 runs of the recipe" in card
    assert f"value: {round(done.results.repeats[0].perplexity, 4)}" in card  # of the files that it lies beside
    files = {file: file.stat().st_mtime_ns for file in out.glob("repeats/*/manifest.json")}
    assert [file.parent.name for file in sorted(files)] == ["2", "3"]

    api.run(recipe, out=out, options=options, callbacks=Callbacks(on_note=notes.append))
    assert files == {file: file.stat().st_mtime_ns for file in files}  # what is done is not done again
    longer = recipe | {"evaluation": recipe["evaluation"] | {"windows": 3}}
    once = api.run(longer, out=out, options=replace(options, repeat=1))
    assert once.results is not None
    assert once.results.repeats == ()
    assert once.results.notes[-1] == "repeats/3 is of another recipe, model or text, and does not count"


def test_what_cannot_be_repeated_says_so() -> None:
    options, inputs = Options(repeat=3), Prepared(*[None] * 7)  # type: ignore[arg-type]
    recipe = parse({"method": "gptq"})
    assert check_repeat(recipe, options, inputs) == 3
    assert check_repeat(recipe, Options(), inputs) == 1
    assert check_repeat(load("w4a16-rtn"), options, inputs) == 1  # nothing in it is drawn
    with pytest.raises(BadInput, match="no figures to repeat"):
        check_repeat(recipe, options, None)
    with pytest.raises(BadInput, match="until_clear=null"):
        check_repeat(parse({"method": "gptq", "evaluation": {"until_clear": {}}}), options, inputs)
    with pytest.raises(BadInput, match="leave out --gpus"):
        check_repeat(recipe, replace(options, ranks=replace(options.ranks, size=2)), inputs)


def test_what_another_seed_would_change_is_within_the_noise(tmp_path: Path) -> None:
    """Two recipes whose artifacts differ clearly on the text, and whose other seeds overlap."""
    kls = {"a": (0.050, 0.060, 0.070), "b": (0.062, 0.052, 0.075)}
    for name, each in kls.items():
        for k, kl in enumerate(each):
            folder = tmp_path / "s" / name if k == 0 else tmp_path / "s" / name / "repeats" / str(k + 1)
            results = fake_results(18.0, "NONE")
            results["divergence"] |= {"kl_mean": kl, "kl_stderr": 0.0005, "kl_interval": [kl - 0.001, kl + 0.001]}
            cache = {"dtype": "bfloat16", "bytes_per_token": 1, "context": 1, "bytes_at_context": 1}
            results["efficiency"] = {"cache": cache, "bytes": 1, "parameters": 1, "bits_per_parameter": 8.0}
            write_run(folder, fake_manifest(name, size=114_000_000 + ord(name), blocks=1) | {"seed": k}, results)
    runs = [open_run(tmp_path / "s" / name) for name in kls]
    one, two = judge_runs(runs)
    assert not one.clearly_closer(two)
    assert one.kl_interval is not None
    assert one.kl_interval[0] < 0.045
    page = write_comparison([tmp_path / "s"], tmp_path / "report").read_text(encoding="utf-8")
    assert page.count("mean of 3 runs") == 2
    assert "a is smaller and no further from the original: KL 0.0600 (" in page
    found = recommend([tmp_path / "s"], Wish.parse(memory="24GiB", context=64))
    assert dict(found.others)["b"].startswith("a is smaller and no further from the original")
    rows = (tmp_path / "report" / "runs.csv").read_text().splitlines()
    assert rows[1].split(",")[rows[0].split(",").index("runs")] == "3"
