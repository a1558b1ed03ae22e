"""Files that no list names: in an artifact, in an exported folder, in one without any list, each told of by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256
from quantpress.exports.package import export
from quantpress.exports.servers.vllm import Vllm
from quantpress.exports.verify import verify
from quantpress.models.checkpoint import INDEX

from . import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of w4a16-rtn with its export for vLLM."""
    folder = tmp_path_factory.mktemp("listed")
    run = runs.make("w4a16-rtn", runs.original(folder / "model"), folder / "run")
    export(run, Vllm())
    return run


@pytest.fixture(params=["run", "run without a list", "export"])
def folder(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """What to verify, and the folder of weights in it."""
    run = tmp_path / "run"
    shutil.copytree(made, run, symlinks=True)
    if request.param == "export":
        return run / "export" / "vllm", run / "export" / "vllm" / "model"
    if request.param == "run without a list":
        for place in (run, run / "quantized"):
            (place / "manifest.json").unlink()
    return run, run / "quantized"


def other_norm(weights: Path) -> None:
    """Other values for a norm in a file of their own, and an index that sends readers there."""
    tensors = load_file(weights / "model.safetensors")
    save_file({"model.norm.weight": torch.full_like(tensors["model.norm.weight"], 3.0)}, weights / "other.safetensors")
    shard_of = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "other.safetensors"}
    (weights / INDEX).write_text(json.dumps({"weight_map": shard_of}))


def plain(name: str, content: bytes = b"{}") -> Callable[[Path], None]:
    def add(weights: Path) -> None:
        (weights / name).parent.mkdir(exist_ok=True)
        (weights / name).write_bytes(content)

    return add


def linked(weights: Path) -> None:
    (weights / "deeper").symlink_to("/etc")


STRANGERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an index to other values": (other_norm, "other.safetensors"),
    "a pickle": (plain("pytorch_model.bin"), "a pickle, which can run code"),
    "a pickle of another ending": (plain("consolidated.00.pth"), "a pickle, which can run code"),
    "a second safetensors file": (plain("model-extra.safetensors"), "model-extra.safetensors"),
    "a GGUF file": (plain("other.gguf"), "other.gguf"),
    "code": (plain("modeling_llama.py"), "code"),
    "code in a folder": (plain("sub/evil.py"), "sub/evil.py"),
    "an override of compose": (plain("compose.override.yaml"), "compose.override.yaml"),
    "a hidden file": (plain(".env"), ".env"),
    "an adapter": (plain("adapter_config.json"), "adapter_config.json"),
    "a link to a folder": (linked, "deeper"),
    "a pipe": (lambda weights: os.mkfifo(weights / "notes"), "notes"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_told_of(name: str, folder: tuple[Path, Path]) -> None:
    where, weights = folder
    add, word = STRANGERS[name]
    assert verify(where).problems == ()
    add(weights)
    if name == "an index to other values" and not (weights / "manifest.json").exists():
        assert any("with other values" in line for line in verify(where).problems)
        return
    told = [line for line in verify(where).problems if word in line]
    assert len(told) == 1
    assert "--allow" in told[0]


def test_it_may_be_allowed_by_name_and_the_card_needs_no_leave(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    for name in ("README.md", "quality.png", "notes.txt"):
        (tmp_path / "run" / "quantized" / name).write_text("x")
    (line,) = verify(tmp_path / "run").problems
    assert "notes.txt: a file that manifest.json does not list; move it away, or --allow notes.txt" in line
    assert verify(tmp_path / "run", allow=["notes.txt"]).problems == ()


def test_an_export_carries_nothing_that_is_not_listed(made: Path, tmp_path: Path) -> None:
    """Its own checksums would vouch for it from then on."""
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run" / "quantized" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"a pickle, which can run code when it is loaded, that manifest"):
        export(tmp_path / "run", Vllm(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "lists no file"),
        (None, "lists no file"),
        (b"\xff\xfe\x00", "not a list of checksums"),
        (b"rubbish\n", "line 1 is no checksum and name"),
        (b"0" * 64 + b"  ../../etc/passwd\n", "is no file of this folder"),
        (b"0" * 64 + b"  /etc/passwd\n", "is no file of this folder"),
    ],
)
def test_a_list_that_says_nothing(content: bytes | None, said: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "export" / "vllm", tmp_path / "out")
    sums = tmp_path / "out" / "SHA256SUMS"
    sums.unlink() if content is None else sums.write_bytes(content)
    try:
        problems = verify(tmp_path / "out").problems
    except BadInput as error:
        problems = (str(error),)
    assert any(said in line for line in problems), problems


def test_an_empty_list_in_a_manifest_is_none(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    for place in (tmp_path / "run", tmp_path / "run" / "quantized"):
        document = json.loads((place / "manifest.json").read_text())
        document["artifact"]["files"] = {}
        (place / "manifest.json").write_text(json.dumps(document))
    found = verify(tmp_path / "run")
    assert found.files == 0
    assert found.not_reached[0].startswith("checksums: neither SHA256SUMS nor a manifest lists any")


def test_a_tensor_that_hides_in_a_file_the_index_sends_elsewhere_for(made: Path, tmp_path: Path) -> None:
    """Some loaders take every tensor of every file: which of two they end with is theirs to choose."""
    weights = tmp_path / "artifact"
    shutil.copytree(made / "quantized", weights, ignore=shutil.ignore_patterns("manifest.json"))
    other_norm(weights)
    lines = verify(weights).problems
    assert any("model.norm.weight is in other.safetensors and, with other values, in model" in line for line in lines)


def test_the_lists_hashes_are_those_of_the_files(made: Path) -> None:
    for line in (made / "export" / "vllm" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert file_sha256(made / "export" / "vllm" / name) == digest
