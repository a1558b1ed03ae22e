"""Local folders, pickles, and the cache that conversions are kept in."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantpress.core import files
from quantpress.engine.sources import Source, resolve

from ..originals import refused, tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    tiny("Qwen2").save_pretrained(folder)
    assert resolve(str(folder), cache=tmp_path / "cache") == Source(folder, "folder", "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", cache=tmp_path / "cache").kind == "folder"  # wins over the hub
    assert not (tmp_path / "cache").exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "model"
    folder.mkdir()
    refused(folder, "no config.json", cache)
    (folder / "config.json").write_text("{")
    refused(folder, "not readable as JSON", cache)
    (folder / "config.json").write_text("[]")
    refused(folder, "expected a JSON object", cache)
    (folder / "config.json").write_text("{}")
    refused(folder, r"no weights \(\*\.safetensors\)", cache)
    torch.save({}, folder / "optimizer.pt")
    refused(folder, "no weights", cache)
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pass --allow-pickle", cache)
    (folder / "pytorch_model.bin").write_text(POINTER)
    refused(folder, "pytorch_model.bin: a Git LFS pointer, .* run `git lfs pull`", cache, allow_pickle=True)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    assert resolve(str(folder), cache=cache).path == folder  # transformers' own class, if it has one, is used
    refused(tmp_path / "modle", "no such folder; did you mean .*model", cache)
    refused("./a/b", "no such folder; the folder a does not exist", cache)
    refused(tmp_path / "x.gguf", "no such file", cache)
    refused(folder / "config.json", r"not a \.json file", cache)
    refused("smollm2-153m", "did you mean smollm2-135m", cache)
    refused("org/name@", "org/name@revision", cache)


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_to_be_merged_first(weights: str, config: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if config:
        (folder / "config.json").write_text("{}")
    if weights.endswith(".bin"):
        torch.save({}, folder / weights)
    else:
        save_file({"a": torch.ones(1)}, folder / weights)
    refused(folder, "a LoRA adapter of org/base, not a model; merge it", tmp_path / "cache")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")  # a merged model beside it
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder), cache=tmp_path / "cache").path == folder


def test_pickles_become_safetensors(tmp_path: Path) -> None:
    model = tiny("Qwen2", tie_word_embeddings=True)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    torch.save({n: state[n] for n in [*names[:5], "lm_head.weight"]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({n: state[n] for n in names[5:-1]}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"step": 3}, folder / "training_args.bin")
    source = resolve(str(folder), cache=tmp_path / "cache", allow_pickle=True)
    assert (source.kind, source.id) == ("folder", "model")
    assert tmp_path / "cache" in source.path.parents
    back = AutoModelForCausalLM.from_pretrained(source.path).state_dict()
    assert all(torch.equal(back[n], state[n]) for n in names)
    files = [load_file(f) for f in sorted(source.path.glob("*.safetensors"))]
    assert not any("lm_head.weight" in f for f in files)  # the embedding itself: one copy on disk
    assert not (folder / "model.safetensors").exists()


def test_a_head_of_its_own_is_kept_although_it_equals_the_embedding(tmp_path: Path) -> None:
    model = tiny("Qwen2", tie_word_embeddings=True)
    folder = tmp_path / "model"
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # both names, one storage
    source = resolve(str(folder), cache=tmp_path / "cache", allow_pickle=True)
    assert "lm_head.weight" in load_file(source.path / "model.safetensors")


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": _Evil()}, folder / "pytorch_model.bin")
    refused(folder, "cannot be read as weights", tmp_path / "cache", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out


def test_the_first_of_two_conversions_wins(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with files.whole_folder(target) as slow:
        with files.whole_folder(target) as quick:
            (quick / "a").write_text("quick")
        (slow / "a").write_text("slow")
    assert (target / "a").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with files.whole_folder(tmp_path / "made") as new:
            (new / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_a_day_later(tmp_path: Path) -> None:
    cache, model = tmp_path / "cache", tmp_path / "model"
    tiny("Qwen2").save_pretrained(model)
    with files.whole_folder(cache / "gguf" / "made") as new:
        name = new.name
    for kind, hours in (("dead", 25), ("young", 23), ("busy", 25)):
        then = time.time() - hours * 3600
        folder = cache / "gguf" / (name + kind)
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "half").write_text("")
        for path in (folder / "shards" / "half", folder / "shards", folder):
            os.utime(path, (then, then))
    (cache / "gguf" / f"{name}busy" / "shards" / "half").write_text("more")
    os.utime(cache / "gguf" / "made", (0, 0))
    resolve(str(model), cache=cache)
    assert {path.name for path in (cache / "gguf").iterdir()} == {"made", f"{name}young", f"{name}busy"}
