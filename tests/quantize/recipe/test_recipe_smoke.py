"""The smoke section of a recipe: what it may say, and that it does not make another run of the same weights."""

from pathlib import Path
from typing import Any

import pytest

from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.recipe import Smoke
from quantpress.recipe.loading import parse

from ...tiny import build


def test_it_is_off_unless_asked_for_and_then_has_defaults() -> None:
    assert parse({}).smoke is None
    assert parse({"smoke": {}}).smoke == Smoke()
    found = parse({"smoke": {"server": "url", "url": "http://127.0.0.1:8000", "deadline_s": 60}}).smoke
    assert found is not None
    assert (found.url, found.deadline_s, found.concurrency) == ("http://127.0.0.1:8000", 60.0, 4)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"server": "vlm"}, "smoke.server"),
        ({"servr": "vllm"}, "did you mean 'server'"),
        ({"server": "url"}, "go together"),
        ({"url": "http://127.0.0.1:1"}, "go together"),
        ({"server": "url", "url": "127.0.0.1:1"}, "does not start with http"),
        ({"server": "url", "url": "http://me:secret@host"}, "QUANTPRESS_API_KEY"),
        ({"server": "url", "url": "http://host", "python": "/bin/python"}, "drop it"),
        ({"max_model_len": 8}, "smoke.max_model_len"),
        ({"concurrency": 0}, "smoke.concurrency"),
        ({"deadline_s": 0}, "smoke.deadline_s"),
    ],
)
def test_what_cannot_be_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as error:
        parse({"smoke": section})
    assert words in str(error.value)
    assert "secret" not in str(error.value)


def test_another_server_is_the_same_run(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    told: list[str] = []
    for smoke in (None, {"server": "llama.cpp"}):
        document = {"method": {"name": "rtn"}, "weights": {"group_size": 32}, "model": str(tmp_path / "model")}
        recipe = parse(document | {"smoke": smoke})
        settings = Settings(tmp_path / "run", tmp_path / "cache", on_note=told.append)
        quantize(prepare(recipe, resolve(recipe.model, cache=tmp_path / "cache")), settings)
    assert len(told) == 1
    assert "finished before" in told[0]
