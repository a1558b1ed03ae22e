"""GGUF files rounded by our own methods: whole runs, read back by the gguf package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from quantpress.core.errors import BadInput
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.formats.ggml_blocks import pack
from quantpress.gguf import imatrix
from quantpress.methods import ROUNDERS
from quantpress.numbers.types import BlockGrid
from quantpress.recipe import Recipe, Rtn

from ... import tiny
from ..gguf.models import build


def made(
    tmp_path: Path, family: str = "llama", overwrite: bool = True, **settings: Any
) -> tuple[dict[str, Any], gguf.GGUFReader]:
    """The manifest and the file of a run on a tiny model."""
    model, text, out = tmp_path / family, tmp_path / "text.txt", tmp_path / "out"
    if not model.exists():
        build(family, model, dtype=torch.bfloat16)
        text.write_text(tiny.text(2000))
    calibration = {"source": str(text), "samples": 4, "seq_len": 64}
    recipe = Recipe.model_validate({"calibration": calibration, "formats": ["gguf"], "evaluation": None} | settings)
    job = prepare(recipe, resolve(str(model), cache=tmp_path / "cache"))
    manifest = quantize(job, Settings(out, tmp_path / "cache", overwrite=overwrite))
    assert job.plan.artifact_bytes >= (out / "quantized" / "model.gguf").stat().st_size
    return manifest, gguf.GGUFReader(out / "quantized" / "model.gguf")


def weights(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_file_close_to_the_floats(family: str, tmp_path: Path) -> None:
    _, plain = made(tmp_path, family, method={"name": "llama.cpp"}, gguf={"type": "F32"})
    manifest, reader = made(tmp_path, family, gguf={"type": "Q8_0"})
    got, want = weights(reader), weights(plain)
    assert set(got) == set(want)
    for name, w in want.items():
        assert got[name].shape == w.shape
        assert (got[name] - w).abs().max() <= 0.02 * w.abs().max(), name  # rows in another order would be far off
    assert {t.tensor_type.name for t in reader.tensors} == {"Q8_0", "F32"}
    assert manifest.artifact.format == "gguf"
    assert all(layer.scheme == "Q8_0" for layer in manifest.layers)


def test_types_fall_back_and_say_so(tmp_path: Path) -> None:
    manifest, reader = made(
        tmp_path, gguf={"type": "Q4_K_M", "tensor_types": {"blk.0.attn_v.weight": "Q8_0"}}, method={"name": "rtn"}
    )
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.1.attn_q.weight"] == "Q5_0"  # rows of 64
    assert any("rows of 64 are not whole Q4_K blocks: Q4_K -> Q5_0" in line for line in manifest.fallbacks)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_what_the_blocks_could_not_do_as_asked_is_reported(tmp_path: Path) -> None:
    few = {"source": str(tmp_path / "text.txt"), "samples": 1, "seq_len": 16}
    manifest, _ = made(tmp_path, "mixtral", gguf={"type": "Q8_0"}, calibration=few)
    assert any("experts" in line and "fewer than its" in line for line in manifest.fallbacks)


@pytest.mark.parametrize(("method", "family"), [("gptq", "llama"), ("rtn", "llama"), ("gptq", "mixtral")])
def test_the_budget_is_kept_to_the_byte(method: str, family: str, tmp_path: Path) -> None:
    made(tmp_path, family, gguf={"type": "Q5_0"}, method={"name": "rtn"})
    file = tmp_path / "out" / "quantized" / "model.gguf"
    room = file.stat().st_size
    manifest, _ = made(tmp_path, family, gguf={"budget": {"bytes": room}}, method={"name": method})
    assert 0.97 * room <= file.stat().st_size <= room
    assert manifest.recipe["gguf"]["budget"]["bytes"] == room
    with pytest.raises(BadInput, match=r"bytes, and with the smallest types the file takes \d+; raise it"):
        made(tmp_path, family, gguf={"budget": {"bytes": room // 3}}, method={"name": method})


def test_a_budget_above_the_largest_types_is_not_what_the_file_takes(tmp_path: Path) -> None:
    """The plan said the budget's own size."""
    build("llama", tmp_path / "llama", dtype=torch.bfloat16)

    def planned(**section: Any) -> int:
        recipe = Recipe.model_validate({"formats": ["gguf"], "evaluation": None, "gguf": section})
        return prepare(recipe, resolve(str(tmp_path / "llama"), cache=tmp_path)).plan.artifact_bytes

    assert planned(budget={"bytes": "4GiB"}) == planned(type="Q8_0")


def test_a_killed_run_keeps_the_types_of_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a tensor's own type stands whatever the budget would give it."""
    section = {"budget": {"bits_per_weight": 6.0}, "tensor_types": {"blk.0.ffn_up.weight": "Q8_0"}}
    _, before = made(tmp_path, gguf=section)
    with monkeypatch.context() as patch:
        patch.setattr("quantpress.engine.pipeline.run_blocks", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            made(tmp_path, gguf=section)
    monkeypatch.setattr("quantpress.gguf.rounded_file.measure", lambda *_: pytest.fail("measured again"))
    _, after = made(tmp_path, gguf=section, overwrite=False)
    assert [t.data.tobytes() for t in after.tensors] == [t.data.tobytes() for t in before.tensors]
    types = {t.name: t.tensor_type.name for t in after.tensors}
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert len(set(types.values())) > 2


def test_a_type_without_a_grid_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gguf.type IQ4_XS: method gptq rounds to Q8_0.*made by method llama.cpp"):
        made(tmp_path, gguf={"type": "IQ4_XS"})


def matrix(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A matrix in llama.cpp's form of these tensors; returns the mean squares [experts, in]."""
    make, found = torch.Generator().manual_seed(3), {}
    for name, shape in shapes.items():
        means = torch.rand(shape[0] if len(shape) == 3 else 1, shape[-1], generator=make) ** 4 + 1e-3
        found[name] = means
    counts = {name: np.full(len(means), 2, np.float32) for name, means in found.items()}
    imatrix.save(path, {n: imatrix.Importance(2 * m.numpy(), counts[n]) for n, m in found.items()}, "theirs", 32)
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rtn_weighs_by_a_matrix_of_theirs(family: str, tmp_path: Path) -> None:
    _, plain = made(tmp_path, family, method={"name": "llama.cpp"}, gguf={"type": "F32"})
    weight = weights(plain)
    names = {
        n: tuple(w.shape) for n, w in weight.items() if n.startswith("blk.") and w.dim() > 1 and "gate_inp" not in n
    }
    lacking = "blk.1.attn_q.weight"
    given = matrix(tmp_path / "i.gguf", {n: shape for n, shape in names.items() if n != lacking})
    section = {"type": "Q4_0", "imatrix": str(tmp_path / "i.gguf")}
    manifest, reader = made(tmp_path, family, method={"name": "rtn"}, gguf=section)
    assert manifest.calibration is None
    assert any(f"blk.*.attn_q.weight): not in {tmp_path}" in line for line in manifest.fallbacks)
    got = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert {kinds[name] for name in names} >= {"Q4_0"}
    for name in names:
        search = "mse" if name == lacking else "activation"
        grid = BlockGrid(type=kinds[name], scale_search=search)
        parts = weight[name].to(torch.bfloat16).reshape(-1, *weight[name].shape[-2:])
        want = [
            pack(ROUNDERS["rtn"](w, grid, Rtn(), None if name == lacking else given[name][e], None).linear)
            for e, w in enumerate(parts)
        ]
        assert torch.equal(got[name].reshape(len(want), *want[0].shape), torch.stack(want)), name


def test_gptq_takes_of_a_matrix_what_it_does_not_know_itself(tmp_path: Path) -> None:
    """The blocks are as without it; the embedding, which is the head, is rounded by it."""
    _, before = made(tmp_path, gguf={"type": "Q4_0"})
    shapes = {t.name: tuple(t.shape.tolist()[::-1]) for t in before.tensors if len(t.shape) > 1}
    outside = {name: shape for name, shape in shapes.items() if not name.startswith("blk.")}
    matrix(tmp_path / "i.gguf", shapes)
    _, after = made(tmp_path, gguf={"type": "Q4_0", "imatrix": str(tmp_path / "i.gguf")})
    changed = {
        b.name for b, a in zip(before.tensors, after.tensors, strict=True) if b.data.tobytes() != a.data.tobytes()
    }
    assert changed == set(outside)
    matrix(tmp_path / "blocks.gguf", {name: shape for name, shape in shapes.items() if name not in outside})
    with pytest.raises(BadInput, match=r"gptq rounds the blocks by their own Hessians, .* --process-output"):
        made(tmp_path, gguf={"type": "Q4_0", "imatrix": str(tmp_path / "blocks.gguf")})


def test_another_matrix_under_the_same_name_is_another_run(tmp_path: Path) -> None:
    section = {"type": "Q4_0", "imatrix": str(tmp_path / "i.gguf")}
    matrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": (64, 64)})
    made(tmp_path, method={"name": "rtn"}, gguf=section)
    matrix(tmp_path / "i.gguf", {"blk.1.attn_q.weight": (64, 64)})
    with pytest.raises(BadInput, match="finished run of something else"):
        made(tmp_path, method={"name": "rtn"}, gguf=section, overwrite=False)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_head_is_weighed_by_what_it_gets(method: str, tmp_path: Path) -> None:
    """With `imatrix: true`: the embedding, which is the head, is rounded by the states that leave the last block."""
    _, before = made(tmp_path, gguf={"type": "Q4_0"}, method={"name": method})
    manifest, after = made(tmp_path, gguf={"type": "Q4_0", "imatrix": True}, method={"name": method})
    data = {t.name: (t.data.tobytes(), t.tensor_type) for t in before.tensors}
    changed = {t.name for t in after.tensors if data[t.name] != (t.data.tobytes(), t.tensor_type)}
    assert "token_embd.weight" in changed
    assert (changed == {"token_embd.weight"}) == (method == "gptq")  # rtn has the blocks' importance besides
    assert manifest.calibration is not None
