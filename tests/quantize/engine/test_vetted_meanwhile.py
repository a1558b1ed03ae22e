"""A large checkpoint whose weights are vetted while they are rounded: refused, resumed and recorded as any other."""

import os
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.engine import guard, pipeline
from quantpress.engine.job import prepare
from quantpress.engine.settings import BlockDone
from quantpress.engine.sources import resolve
from quantpress.models import vetting
from quantpress.models.checkpoint import Checkpoint
from quantpress.recipe import Recipe

from ...tiny import build
from .test_pipeline import Stop, files, make

RTN: dict[str, Any] = {"method": {"name": "rtn"}}


@pytest.fixture(autouse=True)
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_VETTED_FIRST", 0)
    monkeypatch.setattr(guard, "_WHOLE_BYTES", 0)  # the forward pass is compared on a twin
    build("llama", tmp_path / "model", torch.bfloat16)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "inf")])
@pytest.mark.parametrize("first", ["rounding", "vetting"])
def test_a_damaged_weight_is_named_whoever_meets_it_first(
    first: str, value: float, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, met, done = tmp_path / "model" / "model.safetensors", Event(), list[int]()
    name = "model.layers.1.mlp.up_proj.weight"
    with open(file, "r+b") as raw:
        raw.seek(Checkpoint(tmp_path / "model")._entry(name).start)
        raw.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    read, check, rounding = vetting._read, vetting.Vetting.check, pipeline.run_blocks

    def rounded(*args: Any) -> None:
        try:
            rounding(*args)
        finally:
            met.set()

    if first == "rounding":
        monkeypatch.setattr(vetting, "_read", lambda *args: met.wait(60) and read(*args))
        monkeypatch.setattr(pipeline, "run_blocks", rounded)
    else:
        monkeypatch.setattr(vetting.Vetting, "check", lambda self: wait(self._files.values()) and check(self))
    with pytest.raises(BadInput, match=f"^model.safetensors: {name} holds {kind}; the checkpoint is damaged$"):
        make(tmp_path / "run", tmp_path / "model", RTN, on_block=lambda block: done.append(block.block))
    assert done == ([1] if first == "rounding" else [])
    assert not (tmp_path / "run").exists()


def test_a_killed_run_ends_with_the_same_files_and_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: BlockDone) -> None:
        raise Stop

    seen: list[int] = []
    for name in ("run", "other"):
        with pytest.raises(Stop):
            make(tmp_path / name, tmp_path / "model", RTN, on_block=killed)
    manifest = make(tmp_path / "run", tmp_path / "model", RTN, on_block=lambda block: seen.append(block.block))
    assert seen == [2]
    assert manifest.model.files == Checkpoint(tmp_path / "model").file_hashes()
    os.utime(tmp_path / "model" / "model.safetensors")
    with pytest.raises(BadInput, match=r"unfinished run of something else \(model\.model\.safetensors: "):
        make(tmp_path / "other", tmp_path / "model", RTN)
    monkeypatch.setattr(pipeline, "_VETTED_FIRST", 1 << 40)
    make(tmp_path / "first", tmp_path / "model", RTN)
    assert files(tmp_path / "run" / "quantized") == files(tmp_path / "first" / "quantized")


def test_what_float16_cannot_hold_is_named_where_config_json_says_float16(tmp_path: Path) -> None:
    """A norm, which is not rounded, of a bfloat16 model whose config has been edited."""
    shard, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, shard, {"format": "pt"})
    recipe = Recipe.model_validate({"name": "x", "weights": {"bits": 4, "group_size": 32}, "method": {"name": "rtn"}})

    def vetted() -> dict[str, str]:
        job = prepare(recipe, resolve(str(tmp_path / "model"), cache=tmp_path), torch.device("cpu"))
        with vetting.vetting(job.checkpoint, job.backend.limits) as files:
            return files.hashes()

    assert vetted()
    config.write_text(config.read_text().replace('"bfloat16"', '"float16"'))
    held = r"model\.norm\.weight holds 70144, and more than 65504 cannot be held in float16; is its dtype in"
    with pytest.raises(vetting.Damaged, match=held):
        vetted()
