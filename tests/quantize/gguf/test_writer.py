"""GGUF files written whole or not at all, of a size known beforehand."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from quantpress.core.errors import BadInput
from quantpress.gguf.writer import FileTensor, sizes, tensor_bytes, write

METADATA: dict[str, Any] = {
    "general.architecture": "llama", "a.int": 7, "a.float": 0.5, "a.text": "é", "a.flag": True, "a.ints": [1, -2],
    "a.texts": ["x", "日本"], "a.none": None,
}  # fmt: skip


def tensors(seed: int = 0) -> list[FileTensor]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 2 * 34), dtype=np.uint8)  # Q8_0: rows of 64
    return [
        FileTensor("f32", Type.F32, (3, 5), lambda: np.arange(15, dtype=np.float32).reshape(3, 5)),
        FileTensor("q8", Type.Q8_0, (3, 64), lambda: blocks),
        FileTensor("f16", Type.F16, (7,), lambda: np.arange(7, dtype=np.float16)),
    ]


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    done: list[int] = []
    (path,) = write(tmp_path / "t.gguf", METADATA, tensors(), on_tensor=done.append)
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items() if key.startswith("a.")}
    assert said == {key: value for key, value in METADATA.items() if key.startswith("a.") and value is not None}
    stored = {t.name: t for t in reader.tensors}
    assert list(stored) == ["f32", "q8", "f16"]
    assert stored["q8"].shape.tolist() == [64, 3]
    for tensor in tensors():
        assert stored[tensor.name].data.tobytes() == tensor.data().tobytes()
        assert stored[tensor.name].data_offset % 32 == 0
    assert done == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["t.gguf"]


@pytest.mark.parametrize("split", [None, 100, 250])
def test_the_size_is_known_to_the_byte(tmp_path: Path, split: int | None) -> None:
    paths = write(tmp_path / "t.gguf", METADATA, tensors(), split)
    assert [path.stat().st_size for path in paths] == sizes(METADATA, tensors(), split)


def test_parts_are_named_and_numbered_as_llama_cpp_wants(tmp_path: Path) -> None:
    paths = write(tmp_path / "t.gguf", METADATA, tensors(), 250)
    assert [path.name for path in paths] == ["t-00001-of-00002.gguf", "t-00002-of-00002.gguf"]
    readers = [gguf.GGUFReader(path) for path in paths]
    assert [r.fields["split.no"].contents() for r in readers] == [0, 1]
    assert [r.fields["split.count"].contents() for r in readers] == [2, 2]
    assert [r.fields["split.tensors.count"].contents() for r in readers] == [3, 3]
    assert [t.name for r in readers for t in r.tensors] == ["f32", "q8", "f16"]


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    def broken() -> np.ndarray[Any, Any]:
        raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        write(tmp_path / "t.gguf", METADATA, [*tensors(), FileTensor("x", Type.F32, (2,), broken)])
    with pytest.raises(ValueError, match="q8: 12 bytes where its type and shape say 204"):
        write(tmp_path / "t.gguf", METADATA, [FileTensor("q8", Type.Q8_0, (3, 64), lambda: np.zeros(3, np.float32))])
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(BadInput, match="w: Q4_K needs rows of a multiple of 256, not 576"):
        tensor_bytes((3, 576), Type.Q4_K, "w")


def test_the_name_of_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "t.gguf").mkdir()
    started: list[int] = []
    with pytest.raises(BadInput, match=r"t.gguf is a folder; give the name of a file"):
        write(tmp_path / "t.gguf", METADATA, tensors(), on_tensor=started.append)
    assert started == []
