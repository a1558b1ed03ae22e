"""The public API drives the whole pipeline on a tiny model, with the same checks as the command line."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantpress
from quantpress import BadInput, Callbacks, Forecast, Options, Recipe, api
from quantpress.artifact.artifact import open_artifact
from quantpress.core import machine
from quantpress.core.files import alone_in
from quantpress.engine.plan import Plan

from ..tiny import build, model_and_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `text.txt` and an empty cache."""
    return model_and_text(tmp_path_factory.mktemp("api"))


def recipe(place: Path, **changes: Any) -> dict[str, Any]:
    evaluation = {"source": str(place / "text.txt"), "windows": 2, "window": 32, "prompts": []}
    return {
        "name": "tiny",
        "model": str(place / "model"),
        "method": {"name": "rtn"},
        "weights": {"group_size": 32},
        "targets": ["vllm"],
        "evaluation": evaluation,
        **changes,
    }


@pytest.fixture(scope="module")
def release(place: Path) -> quantpress.api.Release:
    return quantpress.run(recipe(place), out=place / "run", options=Options(cache=place / "cache"))


def test_run_makes_a_whole_release(place: Path, release: api.Release) -> None:
    assert release.artifact == place / "run" / "quantized"
    assert release.results is not None
    assert release.results.perplexity_increase is not None
    assert release.report is not None
    assert release.report.is_file()
    assert release.card == release.artifact / "README.md"
    assert [folder.name for folder in release.exports] == ["vllm"]
    assert release.stages["export vllm"]["format"] == "compressed-tensors"
    assert release.serving is None


def test_the_steps_alone_do_what_a_run_does(
    place: Path, release: api.Release, capfd: pytest.CaptureFixture[str]
) -> None:
    options, out = Options(cache=place / "cache"), place / "steps"
    chosen = quantpress.load_recipe(write_recipe(place))
    steps: list[str] = []
    callbacks = Callbacks(on_step=lambda what, done, total, remark: steps.append(f"{what} {done}/{total}"))
    forecast = quantpress.plan(chosen, options=options)
    assert forecast.targets == {"vllm": "compressed-tensors"}
    assert sum(count for _, count, _ in forecast.linears) == 14
    artifact = quantpress.quantize(chosen, out=out, options=options, callbacks=callbacks)
    assert steps == ["quantizing 0/2", "quantizing 1/2", "quantizing 2/2"]
    for file in ("model.safetensors", "config.json"):
        assert (artifact / file).read_bytes() == (release.artifact / file).read_bytes()
    assert quantpress.verify(out, ["vllm"], way="contract").sound
    assert quantpress.export(out, [{"name": "vllm", "port": 8123}])["vllm"].folder == out / "export" / "vllm"
    results = quantpress.evaluate(out, options=options, callbacks=callbacks)
    assert release.results is not None
    assert results.divergence == release.results.divergence
    assert steps[-1].startswith("evaluating ")
    alone = quantpress.evaluate(artifact, str(place / "model"), recipe(place), place / "alone", options)
    assert alone.divergence == results.divergence
    assert quantpress.report(out) == out / "report" / "index.html"
    assert quantpress.compare([out, release.out], place / "both").is_file()
    assert quantpress.card(out).is_file()
    assert quantpress.draft(out, options=options).greedy.rate <= 1
    assert quantpress.convert(out, place / "awq-or-gptq", "gptq").is_dir()
    assert quantpress.reproduce(out, out=place / "again", options=options).first is None
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")  # a library prints nothing


def write_recipe(place: Path) -> str:
    file = place / "tiny.yaml"
    file.write_text(json.dumps(recipe(place)))  # JSON is YAML
    return str(file)


def test_a_recipe_may_be_an_object_a_name_a_path_or_a_mapping(place: Path) -> None:
    options, file = Options(cache=place / "cache"), write_recipe(place)
    chosen = quantpress.load_recipe(file)
    schemes = {quantpress.plan(r, options=options).linears for r in (chosen, file, Path(file), recipe(place))}
    assert len(schemes) == 1
    named = quantpress.plan("fp8-dynamic", str(place / "model"), options)
    assert all(scheme.startswith("fp8") for _, _, scheme in named.linears)
    with pytest.raises(BadInput, match="no such file and no shipped recipe; did you mean"):
        quantpress.plan("w4a16-gtpq")
    with pytest.raises(BadInput, match="methud: unknown key, did you mean 'method'"):
        quantpress.plan({"methud": "rtn"})


def test_load_gives_a_model_that_computes_what_is_evaluated(place: Path, release: api.Release) -> None:
    model = quantpress.load(release.out)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(ids).logits
        _, own = open_artifact(release.artifact, machine.device())
        torch.testing.assert_close(logits, own.whole()(ids.to(machine.device())).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 7
    with pytest.raises(BadInput, match="no such folder"):
        quantpress.load(place / "nothing")


# ---- the same checks as the command line


def test_a_target_that_could_not_load_it_is_refused_before_the_work(place: Path) -> None:
    wrong = recipe(place, targets=[{"name": "vllm", "tensor_parallel": 3}])
    for operation in (quantpress.plan, quantpress.quantize, quantpress.run):
        more = {} if operation is quantpress.plan else {"out": place / "refused"}
        with pytest.raises(BadInput, match="targets: "):
            operation(wrong, options=Options(cache=place / "cache"), **more)
    assert not (place / "refused").exists()


def test_a_folder_in_use_is_refused(place: Path, release: api.Release) -> None:
    options = Options(cache=place / "cache")
    operations: list[Any] = [
        lambda: quantpress.quantize(recipe(place), out=release.out, options=options),
        lambda: quantpress.run(recipe(place), out=release.out, options=options),
        lambda: quantpress.evaluate(release.out, options=options),
        lambda: quantpress.draft(release.out, options=options),
        lambda: quantpress.export(release.out, ["vllm"], overwrite=True),
        lambda: quantpress.smoke(release.out, {"server": "url", "url": "http://127.0.0.1:9"}, options=options),
        lambda: quantpress.report(release.out),
        lambda: quantpress.card(release.out),
        lambda: quantpress.reproduce(release.out, out=release.out, options=options),
        lambda: quantpress.sweep([recipe(place)], out=release.out, options=options),
    ]
    with alone_in(release.out):
        for operation in operations:
            with pytest.raises(BadInput, match="another quantpress is at work there"):
                operation()


@pytest.mark.parametrize("operation", ["plan", "quantize", "run", "evaluate", "draft", "load", "reproduce"])
def test_the_process_is_set_up_before_the_work(
    operation: str, place: Path, release: api.Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(machine, "set_up_memory", lambda: called.append("memory"))
    monkeypatch.setattr(machine, "flush_denormals", lambda: called.append("denormals"))
    options = Options(cache=place / "cache")
    run: dict[str, Any] = {
        "plan": lambda: quantpress.plan(recipe(place), options=options),
        "quantize": lambda: quantpress.quantize(recipe(place), out=place / "run", options=options),
        "run": lambda: quantpress.run(recipe(place), out=place / "run", options=options),
        "evaluate": lambda: quantpress.evaluate(release.out, options=options),
        "draft": lambda: quantpress.draft(release.out, options=options),
        "load": lambda: quantpress.load(release.out),
        "reproduce": lambda: quantpress.reproduce(release.out, out=place / f"{operation}-again", options=options),
    }
    run[operation]()
    assert {"memory", "denormals"} <= set(called)


def test_pickles_need_the_option(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(BadInput, match="the weights are pickles"):
        quantpress.plan("w4a16-rtn", str(tmp_path / "model"), Options(cache=tmp_path))


# ---- one screen, typed and documented


def test_every_public_name_exists_and_is_documented() -> None:
    assert len(Path(quantpress.__file__).read_text(encoding="utf-8").splitlines()) <= 90
    for name in quantpress.__all__:
        thing = getattr(quantpress, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing):
            assert inspect.signature(thing).return_annotation is not inspect.Signature.empty, name
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        quantpress.quantise  # type: ignore[attr-defined]  # noqa: B018
    assert set(quantpress.__all__) <= set(dir(quantpress))
    assert issubclass(BadInput, ValueError)
    assert quantpress.Recipe is Recipe


@pytest.mark.parametrize(
    ("device", "passes", "seconds", "said"),
    [
        ("cpu", 2, 5.7 * 86400, "about 5.7 days to quantize on this CPU: use a GPU or an rtn recipe"),
        ("cpu", 2, 1320.0, "about 22 minutes to quantize on this CPU"),
        ("cpu", 0, 5.7 * 86400, "about 5.7 days to quantize on this CPU"),
        ("cuda:0", 2, 5.7 * 86400, "about 5.7 days to quantize on this GPU"),
    ],
)
def test_a_forecast_says_how_long_in_words(device: str, passes: int, seconds: float, said: str) -> None:
    plan = Plan({}, 1, 1, 1, 1, 1.0, seconds, passes, device)
    assert Forecast(plan, (), {}, ()).time == said
