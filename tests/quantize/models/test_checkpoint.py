"""Checkpoint folders: what is read is what was written, and nothing broken gets past the opening."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.formats import FORMATS
from quantpress.models.checkpoint import FORMAT_FILES, Checkpoint
from quantpress.models.companions import copy_companions
from quantpress.models.shards import merge_parts, write_part

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
          torch.float8_e4m3fn)  # fmt: skip


def tensors(seed: int = 0, prefix: str = "t") -> dict[str, Tensor]:
    """One tensor a dtype, odd sizes first, so that a careless writer misaligns the rest."""
    make = torch.Generator().manual_seed(seed)
    out = {f"{prefix}.{i}": torch.randint(0, 2, (3, 5), generator=make).to(dtype) for i, dtype in enumerate(DTYPES)}
    return out | {f"{prefix}.scalar": torch.tensor(7), f"{prefix}.none": torch.empty(0, 4)}


def folder_with(path: Path, content: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", {"model_type": "llama"})
    write_part(path / "model.safetensors", content)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n].float(), b[n].float()) for n in a
    )


def aligned(path: Path) -> bool:
    """Every tensor starts at a multiple of its item size, counted from the start of the file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
    return all((8 + length + t["data_offsets"][0]) % sizes[t["dtype"]] == 0
               for n, t in header.items() if n != "__metadata__")  # fmt: skip


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    written = tensors()
    digest = write_part(tmp_path / "a.safetensors", written)
    assert same(load_file(tmp_path / "a.safetensors"), written)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert aligned(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    written = tensors()
    folder_with(tmp_path, {})
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert same({name: checkpoint.read(name) for name in checkpoint.names()}, written)
    assert checkpoint.shape("t.1") == (3, 5)
    assert checkpoint.dtype("t.5") == torch.bfloat16
    assert checkpoint.nbytes("t.2") == 60
    assert checkpoint.total_bytes == sum(t.nbytes for t in written.values())
    assert "t.0" in checkpoint
    assert "u.0" not in checkpoint
    with pytest.raises(BadInput, match=r"no tensor u\.0"):
        checkpoint.read("u.0")


def test_one_element_of_a_wider_tensor_is_written(tmp_path: Path) -> None:
    one = torch.arange(130, dtype=torch.float16)[65::65]
    assert one.stride() == (65,)
    write_part(tmp_path / "a.safetensors", {"one": one})
    assert load_file(tmp_path / "a.safetensors")["one"].tolist() == [65.0]


def test_bytes_do_not_depend_on_order_or_layout(tmp_path: Path) -> None:
    written = tensors()
    turned = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in reversed(written.items())}
    assert write_part(tmp_path / "a", written) == write_part(tmp_path / "b", turned)


def test_a_tensor_read_is_the_callers_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder_with(tmp_path, {"w": torch.ones(4)}))
    checkpoint.read("w").zero_()
    assert torch.equal(checkpoint.read("w"), torch.ones(4))


@pytest.mark.parametrize("shard_bytes", [1, 100, 200, 10_000])
def test_merged_parts_hold_every_tensor(shard_bytes: int, tmp_path: Path) -> None:
    parts = [tensors(k, f"block{k}") for k in range(3)]
    paths = [tmp_path / f"part{k}" for k in range(3)]
    before = [write_part(path, part) for path, part in zip(paths, parts, strict=True)]
    out = folder_with(tmp_path / "out", {})
    (out / "model.safetensors").unlink()
    names = merge_parts(paths, out, shard_bytes)
    everything = {n: t for part in parts for n, t in part.items()}
    checkpoint = Checkpoint(out)
    assert same({n: checkpoint.read(n) for n in checkpoint.names()}, everything)
    assert {checkpoint.file_of(n) for n in everything} == set(names)
    assert all(aligned(out / name) for name in names)
    assert names == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] == before
    if len(names) == 1:
        assert list(names) == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.total_bytes
        assert all(sum(t.nbytes for t in load_file(out / n).values()) <= max(shard_bytes, 120) for n in names)
    again = folder_with(tmp_path / "again", {})
    (again / "model.safetensors").unlink()
    merge_parts(paths, again, shard_bytes)
    assert Checkpoint(again).file_hashes() == checkpoint.file_hashes()


def test_a_shard_is_filled_to_the_byte(tmp_path: Path) -> None:
    write_part(tmp_path / "part", {name: torch.ones(25) for name in "abc"})  # 100 bytes each
    assert len(merge_parts([tmp_path / "part"], tmp_path, 200)) == 2
    assert len(merge_parts([tmp_path / "part"], tmp_path, 199)) == 3


def test_a_tensor_in_two_parts_is_our_mistake(tmp_path: Path) -> None:
    for name in "ab":
        write_part(tmp_path / name, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="tensor w is also in an earlier part"):
        merge_parts([tmp_path / "a", tmp_path / "b"], tmp_path)


def sharded(path: Path) -> Path:
    path.mkdir()
    write_json(path / "config.json", {})
    write_part(path / "p", tensors())
    merge_parts([path / "p"], path, 100)
    (path / "p").unlink()
    return path


def edit_index(folder: Path, name: str, shard: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = shard
    write_json(folder / "model.safetensors.index.json", index)


def test_sound_shards_open(tmp_path: Path) -> None:
    assert len(Checkpoint(sharded(tmp_path / "m")).names()) == len(tensors())


def test_a_tensor_in_two_shards_is_one_only_where_both_agree(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    names = Checkpoint(folder).names()
    first = next(n for n in names if Checkpoint(folder).read(n).numel() > 1)
    other = next(path for path in sorted(folder.glob("*.safetensors")) if first not in load_file(path))
    held = load_file(other)
    write_part(other, held | {first: Checkpoint(folder).read(first), "unlisted": torch.ones(3)})
    assert sorted(Checkpoint(folder).names()) == sorted([*names, "unlisted"])  # as readers of whole shards find it
    write_part(other, held | {first: Checkpoint(folder).read(first) + 1})
    with pytest.raises(BadInput, match=f"{first} is in .* and, with other values, in {other.name}: readers"):
        Checkpoint(folder)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not readable as JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="expected a JSON object, found list"):
        Checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(BadInput, match="no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BadInput, match=r"only pickle weights \(pytorch_model\.bin\).*--allow-pickle"):
        Checkpoint(tmp_path)
    for k in (1, 2):
        write_part(tmp_path / f"model-0000{k}-of-00002.safetensors", {"w": torch.ones(1)})
    with pytest.raises(BadInput, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_broken_indexes_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    edit_index(folder, "ghost", next(folder.glob("model-00001-*")).name)
    with pytest.raises(BadInput, match="tensor ghost is not in model-00001"):
        Checkpoint(folder)
    edit_index(folder, "ghost", "../elsewhere.safetensors")
    with pytest.raises(BadInput, match="not a file name"):
        Checkpoint(folder)
    edit_index(folder, "ghost", "model-00009-of-00009.safetensors")
    with pytest.raises(BadInput, match=r"shard model-00009-of-00009\.safetensors is listed in .* but missing"):
        Checkpoint(folder)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}})
    with pytest.raises(BadInput, match="no weight_map"):
        Checkpoint(folder)


def header(content: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated or not a safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer, not the file"),
        (b"\xff" * 64, "truncated or not a safetensors"),
        ((20).to_bytes(8, "little") + b"not json............", "corrupt safetensors header"),
        (
            header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7),
            r"truncated: \d+ bytes where the header says",
        ),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9), "too long"),
        (header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "disagree"),
        (header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "does not start where"),
        (header({"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}), "dtype 'F4'"),
        (header({"w": {"shape": [2]}}), "tensor w"),
        (header({"w": []}), "tensor w"),
        (header([]), "corrupt"),
        (header({"__metadata__": {"format": "pt", "n": 3}}, b""), "__metadata__ has to be texts by name"),
    ],
)
def test_corrupt_files_are_named(raw: bytes, message: str, tmp_path: Path) -> None:
    folder_with(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(BadInput, match=rf"model\.safetensors: .*{message}"):
        Checkpoint(tmp_path)


def test_a_file_truncated_after_opening_is_noticed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder_with(tmp_path, {"w": torch.ones(100)}))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(BadInput, match="ended early; it was truncated after it was opened"):
        checkpoint.read("w")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "z": 1,\n  "a": "é"\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"z": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"z": 1, "a": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = folder_with(tmp_path / "s", {"w": torch.ones(1)}), tmp_path / "t"
    target.mkdir()
    kept = ["1_Pooling/config.json", "LICENSE.txt", "additional_chat_templates/tool.jinja", "chat_template.jinja",
            "generation_config.json", "merges.txt", "modules.json", "preprocessor_config.json", "tokenizer.json",
            "tokenizer_config.json"]  # fmt: skip
    for name in [*kept, "README.md", "pytorch_model.bin", "optimizer.pt", "quantize_config.json"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    assert copy_companions(source, target) == sorted(kept)
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == sorted(kept)
    hashes = Checkpoint(source).file_hashes()
    assert set(hashes) == {*kept, "config.json", "model.safetensors"}
    assert hashes["tokenizer.json"] == hashlib.sha256(b"tokenizer.json").hexdigest()


def test_what_a_format_writes_beside_the_config_of_a_quantized_checkpoint_is_hashed(tmp_path: Path) -> None:
    stated = {"gptq": {"quant_method": "gptq"}, "modelopt": {"quant_algo": "FP8", "ignore": [], "producer": {}}}
    extra = {name for format, config in stated.items() for name in FORMATS[format].extra_files(config)}
    assert extra == set(FORMAT_FILES)
    source = folder_with(tmp_path, {"w": torch.ones(1)})
    for name in FORMAT_FILES:
        (source / name).write_text("{}")
    assert set(Checkpoint(source).file_hashes()) == {"config.json", "model.safetensors"}  # beside a plain model: strays
    write_json(source / "config.json", Checkpoint(source).config | {"quantization_config": {"quant_method": "gptq"}})
    assert set(Checkpoint(source).file_hashes()) == {"config.json", "model.safetensors", *FORMAT_FILES}


_READ_ALL = """
import resource, sys
from pathlib import Path
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import merge_parts
folder = Path(sys.argv[1])
checkpoint = Checkpoint(folder)
checkpoint.read("w0")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in checkpoint.names():
    checkpoint.read(name)
merge_parts([folder / "model.safetensors"], folder / "out", 40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Reading and merging 96 MB of tensors of 4 MB takes less than 24 MB more than reading one."""
    folder_with(tmp_path, {f"w{k}": torch.zeros(1 << 20) for k in range(24)})
    (tmp_path / "out").mkdir()
    run = subprocess.run([sys.executable, "-c", _READ_ALL, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = int(run.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 24 << 20
