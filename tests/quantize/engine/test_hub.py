"""Checkpoints from the hub, whose answers are played here: commits, failures, pickles."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from quantpress.engine.sources import Source, resolve

from ..originals import refused, tiny


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub of one model, `org/name`, whose branch `main` is at commit aaaa…; the downloads asked of it."""
    folder = tmp_path / "snapshot"
    tiny("Qwen2").save_pretrained(folder)
    asked: list[dict[str, Any]] = []

    class Info:
        sha = "a" * 40

    def model_info(_: Any, name: str, revision: str | None) -> Info:
        import importlib

        from huggingface_hub import errors

        httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
        if name == "org/none":
            raise errors.RepositoryNotFoundError("404\nlong", response=response)
        if name == "org/gated":
            raise errors.GatedRepoError("403\nlong", response=response)
        if name == "org/away":
            raise httpx.ConnectError("Name or service\nnot known")
        if revision == "v9":
            raise errors.RevisionNotFoundError("404\nlong", response=response)
        return Info()

    def download(name: str, **arguments: Any) -> str:
        if name == "org/away":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        asked.append({"name": name} | arguments)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_hub_model_at_its_commit(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    source = resolve("org/name@main", cache=tmp_path / "cache")
    assert source == Source(tmp_path / "snapshot", "hub", "org/name", "a" * 40)
    assert [ask["revision"] for ask in hub] == ["main", "a" * 40]
    assert hub[0]["allow_patterns"] == ["config.json"]
    assert not {"*.bin", "*.pt", "*.py"} & set(hub[1]["allow_patterns"])
    assert resolve(f"org/name@{'b' * 40}", cache=tmp_path / "cache").revision == "b" * 40


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/none", "not on the hub"),
        ("org/gated", "gated"),
        ("org/away", "cannot be reached .Name or service not known"),
        ("org/name@v9", "no such revision"),
    ],
)
def test_hub_failures(tmp_path: Path, hub: list[dict[str, Any]], model: str, words: str) -> None:
    refused(model, words, tmp_path / "cache")
    assert not hub


def test_hub_pickles_only_when_allowed(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    snapshot = tmp_path / "snapshot"
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    refused("org/name", "--allow-pickle", tmp_path / "cache")
    assert not any("*.bin" in ask["allow_patterns"] for ask in hub)
    source = resolve("org/name", cache=tmp_path / "cache", allow_pickle=True)
    assert (source.path / "model.safetensors").is_file()
    assert "*.bin" in hub[-1]["allow_patterns"]
