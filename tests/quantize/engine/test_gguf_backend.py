"""Recipes with format gguf, from a checkpoint to a run folder that is read back."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.artifact.artifact import open_artifact, verify
from quantpress.core.errors import BadInput
from quantpress.engine import gguf_backend
from quantpress.engine.job import Job, prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.exports.contracts import of_artifact
from quantpress.exports.servers import loaders
from quantpress.exports.servers.loader import refusal
from quantpress.gguf import imatrix
from quantpress.gguf import llama_cpp_library as llama_cpp
from quantpress.recipe.loading import parse

from ... import tiny
from ..gguf.models import IDS, build, logits

BASE = {"method": {"name": "llama.cpp"}, "formats": ["gguf"], "evaluation": None}


def job(folder: Path, **section: Any) -> Job:
    """A run of the model in `folder`, calibrated, if at all, on a text beside it."""
    text = folder.parent / "text.txt"
    text.write_text(tiny.text())
    calibration = {"source": str(text), "samples": 4, "seq_len": 32}
    recipe = parse(BASE | {"calibration": calibration, "gguf": section, "model": str(folder)})
    return prepare(recipe, resolve(str(folder), cache=folder.parent / "cache"))


def run(folder: Path, out: Path, **section: Any) -> dict[str, Any]:
    return quantize(job(folder, **section), Settings(out, out.parent / "cache"))


def stored(out: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(out / "quantized" / "model.gguf").tensors}


def test_a_file_of_floats_needs_no_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "library", lambda: pytest.fail("llama.cpp was asked for"))
    model = build("llama", tmp_path / "m", dtype=torch.bfloat16)
    planned = job(tmp_path / "m", type="BF16").plan
    manifest = run(tmp_path / "m", tmp_path / "out", type="BF16")
    file = tmp_path / "out" / "quantized" / "model.gguf"
    assert file.stat().st_size == planned.artifact_bytes
    assert {layer.scheme for layer in manifest.layers} == {"BF16"}
    assert {layer.bits for layer in manifest.layers} == {16}
    assert manifest.artifact.quantized_bits_per_weight == 16
    assert verify(tmp_path / "out") >= 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "quantized"]
    assert (file.parent / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    _, skeleton = open_artifact(file.parent, torch.device("cpu"), torch.float32)
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(IDS[None]), skeleton.block_arguments(IDS[None])
    for k, block in skeleton.blocks():
        args, kwargs = arguments[k].of(slice(0, 1))
        with torch.no_grad():
            hidden = block(hidden, *args, **kwargs)
    torch.testing.assert_close(skeleton.logits(hidden[0]), logits(model.float(), IDS), rtol=1e-4, atol=1e-4)


def test_parts_are_read_back_and_have_no_modelfile(tmp_path: Path) -> None:
    build("llama", tmp_path / "m")
    manifest = run(tmp_path / "m", tmp_path / "out", type="F16", split="80k")
    files = sorted(p.name for p in (tmp_path / "out" / "quantized").glob("*.gguf"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.gguf"
    assert any("Ollama does not load a file in parts" in line for line in manifest.fallbacks)
    artifact, _ = open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"))
    name = "model.layers.1.mlp.down_proj.weight"
    want = load_file(tmp_path / "m" / "model.safetensors")[name].half().float()
    torch.testing.assert_close(artifact.read(name), want, rtol=0, atol=0)
    (tmp_path / "out" / "quantized" / files[0]).unlink()
    with pytest.raises(BadInput, match="parts of the GGUF file are there"):
        open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"))


def test_the_same_command_again_leaves_it_and_another_recipe_is_refused(tmp_path: Path) -> None:
    build("llama", tmp_path / "m")
    first = run(tmp_path / "m", tmp_path / "out", type="F16")
    assert run(tmp_path / "m", tmp_path / "out", type="F16").document() == first.document()
    with pytest.raises(BadInput, match="already holds a finished run of something else"):
        run(tmp_path / "m", tmp_path / "out", type="F32")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"type": "Q4_0", "tensor_types": {"*.attn_w.*": "Q8_0"}}, "'\\*.attn_w.\\*' matches no matrix .* token_embd"),
        ({"type": "Q4_0", "imatrix": "no.dat"}, "imatrix no.dat: cannot be read"),
    ],
)
def test_bad_sections_are_refused_before_the_work(
    tmp_path: Path, section: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    build("llama", tmp_path / "m")
    with pytest.raises(BadInput, match=words):
        job(tmp_path / "m", **section)


def test_without_llama_cpp_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    build("llama", tmp_path / "m")
    with pytest.raises(BadInput, match="pip install 'quantpress\\[llamacpp\\]' builds it from source"):
        job(tmp_path / "m", type="Q4_0")


def test_llama_cpp_quantizes_with_overrides_and_says_what_fell_back(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    build("llama", tmp_path / "m")
    manifest = run(tmp_path / "m", tmp_path / "out", type="Q4_K_M", tensor_types={"*.attn_v.weight": "Q8_0"})
    kinds = {name: tensor.tensor_type.name for name, tensor in stored(tmp_path / "out").items()}
    assert kinds["blk.0.attn_v.weight"] == kinds["blk.1.attn_v.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"  # rows of 64 are no blocks of 256
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    layers = {layer.name: layer for layer in manifest.layers}
    asked = layers["model.layers.0.self_attn.q_proj"]
    assert (asked.scheme, asked.bits) == ("Q5_0", 5.5)
    assert asked.note == "rows of 64 are not whole blocks of 256: Q4_K -> Q5_0"
    assert layers["model.layers.0.self_attn.v_proj"].note is None
    assert any("Q4_K -> Q5_0" in line and "blk.*.attn_q.weight" in line for line in manifest.fallbacks)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_llama_cpp_takes_our_importance_matrix(tmp_path: Path, family: str) -> None:
    """It changes what a type that heeds it becomes, in the file made here and in the one made from the saved matrix."""
    pytest.importorskip("llama_cpp")
    build(family, tmp_path / "m")
    plain, ours, again = tmp_path / "plain", tmp_path / "ours", tmp_path / "again"
    run(tmp_path / "m", plain, type="Q4_0")
    run(tmp_path / "m", ours, type="Q4_0", imatrix=True)
    run(tmp_path / "m", again, type="Q4_0", imatrix=str(ours / "quantized" / "imatrix.gguf"))
    name = "blk.1.ffn_up_exps.weight" if family == "mixtral" else "blk.1.ffn_up.weight"
    bytes_of = {out: stored(out)[name].data.tobytes() for out in (plain, ours, again)}
    assert bytes_of[plain] != bytes_of[ours]
    assert bytes_of[again] == bytes_of[ours]


def test_the_importance_is_the_mean_square_of_the_inputs(tmp_path: Path) -> None:
    """Against hooks on transformers' own model, experts seen by their own tokens only."""
    model = build("mixtral", tmp_path / "m")
    j = job(tmp_path / "m", type="Q8_0", imatrix=True) if llama_available() else job(tmp_path / "m", type="F16")
    from quantpress.calibrate.tokens import Tokens
    from quantpress.gguf.conversion import Conversion

    tokens = Tokens(IDS.reshape(2, 20), "a test", False)
    found = imatrix.measure(j.skeleton, Conversion(j.checkpoint, tmp_path / "m").entries, tokens)
    last = model.model(tokens.ids).last_hidden_state.detach().reshape(-1, 64)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, 64))
        )
    with torch.no_grad():
        model(tokens.ids)
    want = torch.cat(seen["model.layers.1.self_attn.q_proj"]).square().mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blk.1.attn_q.weight"].mean[0]), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.from_numpy(found["output.weight"].mean[0]), last.square().mean(0), rtol=1e-4, atol=1e-6
    )
    rows = torch.cat(seen["model.layers.1.mlp"])
    router = load_file(tmp_path / "m" / "model.safetensors")["model.layers.1.block_sparse_moe.gate.weight"]
    chosen = (rows @ router.T).topk(2, 1).indices
    experts = found["blk.1.ffn_gate_exps.weight"]
    for e in range(4):
        mine = rows[(chosen == e).any(1)]
        assert experts.counts[e] == len(mine)
        torch.testing.assert_close(torch.from_numpy(experts.sums[e]), mine.square().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("section", [
    {"type": "Q4_K_M"}, {"type": "Q2_K", "imatrix": True}, {"type": "Q8_0"},
    {"type": "Q3_K_L", "tensor_types": {"blk.0.attn_v.weight": "IQ4_NL", "*.ffn_down.weight": "Q6_K"}},
])  # fmt: skip
def test_the_plan_knows_the_bytes_of_llama_cpps_mixes(section: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    build("llama", tmp_path / "m", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    planned = job(tmp_path / "m", **section).plan
    manifest = run(tmp_path / "m", tmp_path / "out", **section)
    files = list((tmp_path / "out" / "quantized").glob("model*.gguf"))
    assert planned.artifact_bytes == sum(file.stat().st_size for file in files)
    assert planned.layers == {layer.name: layer.scheme for layer in manifest.layers}


def test_llama_cpp_quantizes_parts_into_parts(tmp_path: Path) -> None:
    """As the whole file, tensor by tensor."""
    pytest.importorskip("llama_cpp")
    build("llama", tmp_path / "m")
    run(tmp_path / "m", tmp_path / "one", type="Q5_0")
    run(tmp_path / "m", tmp_path / "parts", type="Q5_0", split="80k")
    files = sorted((tmp_path / "parts" / "quantized").glob("*.gguf"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))]
    assert len(files) > 1
    parts = {t.name: t.data.tobytes() for file in files for t in gguf.GGUFReader(file).tensors}
    assert parts == {name: tensor.data.tobytes() for name, tensor in stored(tmp_path / "one").items()}
    with (
        llama_cpp.Loaded(files[0]) as together,
        llama_cpp.Loaded(tmp_path / "one/quantized/model.gguf") as whole,
    ):
        assert np.array_equal(together.logits(IDS.tolist()), whole.logits(IDS.tolist()))


@pytest.mark.parametrize("damage", [None, "converted", "text"])
def test_a_killed_run_goes_on_after_what_is_whole(
    damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither measured nor converted again, to the same bytes; but what is damaged is."""
    pytest.importorskip("llama_cpp")
    build("llama", tmp_path / "m")
    section = {"type": "Q4_0", "imatrix": True}
    run(tmp_path / "m", tmp_path / "whole", **section)
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "quantize", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            run(tmp_path / "m", killed, **section)
    asked: list[str] = []
    measure, write = imatrix.measure, gguf_backend.write
    monkeypatch.setattr(imatrix, "measure", lambda *a: asked.append("measured") or measure(*a))
    monkeypatch.setattr(gguf_backend, "write", lambda *a: asked.append("converted") or write(*a))
    if damage == "converted":
        file = killed / ".work" / "model.gguf"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    if damage == "text":
        with pytest.raises(BadInput, match=r"unfinished run of something else \(recipe.gguf.type"):
            run(tmp_path / "m", killed, type="Q5_0", imatrix=True)
        return
    run(tmp_path / "m", killed, **section)
    assert asked == ([damage] if damage else [])
    for name in ("model.gguf", "imatrix.gguf"):
        assert (killed / "quantized" / name).read_bytes() == (tmp_path / "whole" / "quantized" / name).read_bytes()
    assert not (killed / ".work").exists()


def llama_available() -> bool:
    try:
        llama_cpp.library()
    except BadInput:
        return False
    return True


def test_importance_files_of_both_kinds(tmp_path: Path) -> None:
    values = {
        "blk.0.attn_q.weight": imatrix.Importance(np.array([[2.0, 6.0]], np.float32), np.array([2], np.float32)),
        "blk.0.ffn_up_exps.weight": imatrix.Importance(
            np.array([[3.0, 9.0], [0.0, 0.0]], np.float32), np.array([3, 0], np.float32)
        ),
    }
    imatrix.save(tmp_path / "i.gguf", values, "text", 32)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        ("blk.0.attn_q.weight.in_sum2", [2, 1]), ("blk.0.attn_q.weight.counts", [1, 1]),
        ("blk.0.ffn_up_exps.weight.in_sum2", [2, 2]), ("blk.0.ffn_up_exps.weight.counts", [1, 2]),
    ]  # fmt: skip
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.type"], said["imatrix.chunk_size"], said["imatrix.datasets"]) == ("imatrix", 32, ["text"])
    back = imatrix.load(tmp_path / "i.gguf")
    assert back["blk.0.attn_q.weight"].mean.tolist() == [[1, 3]]
    assert back["blk.0.ffn_up_exps.weight"].mean.tolist() == [[1, 3], [1, 1]]  # no token: no preference
    name = b"blk.0.attn_q.weight"
    entry = np.int32(len(name)).tobytes() + name + np.int32(4).tobytes() + np.int32(2).tobytes()
    data = np.int32(1).tobytes() + entry + np.array([4, 12], np.float32).tobytes() + np.int32(1).tobytes()
    (tmp_path / "i.dat").write_bytes(data)
    assert imatrix.load(tmp_path / "i.dat")["blk.0.attn_q.weight"].mean.tolist() == [[1, 3]]
    (tmp_path / "cut.dat").write_bytes(data[:-6])
    with pytest.raises(BadInput, match="cut short"):
        imatrix.load(tmp_path / "cut.dat")


def test_inputs_that_were_all_zero_weigh_as_much_as_any() -> None:
    """As an expert's that no token reached: with weights of zero llama.cpp rounds to zeros."""
    sums = np.array([[0, 0], [0, 6], [0, 0]], np.float32)
    found = imatrix.Importance(sums, np.array([5, 3, 0], np.float32))
    assert found.mean.tolist() == [[1, 1], [0, 2], [1, 1]]


@pytest.mark.parametrize("method", ["llama.cpp", "rtn"])
def test_a_weight_that_no_scale_holds_is_refused_before_the_work(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = -1e6
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    monkeypatch.setattr(imatrix, "measure", lambda *args: pytest.fail("the work has begun"))
    recipe = parse(BASE | {"method": {"name": method}, "gguf": {"type": "Q4_K_M"}, "model": str(tmp_path / "m")})
    with pytest.raises(BadInput, match=r"down_proj.weight holds 1e\+06, and more than 524032 cannot be rounded"):
        quantize(prepare(recipe, resolve(str(tmp_path / "m"), cache=tmp_path)), Settings(tmp_path / "out", tmp_path))


def test_a_matrix_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    build("llama", tmp_path / "m")
    ones = imatrix.Importance(np.ones((1, 96), np.float32), np.ones(1, np.float32))
    imatrix.save(tmp_path / "a.gguf", {"blk.0.attn_q.weight": ones}, "text", 32)
    with pytest.raises(BadInput, match="weight has 96 values and the model 64: another model's"):
        job(tmp_path / "m", type="Q4_0", imatrix=str(tmp_path / "a.gguf"))
    imatrix.save(tmp_path / "b.gguf", {"blk.0.attn_qkv.weight": ones}, "text", 32)
    with pytest.raises(BadInput, match="none of its tensors is in the model"):
        job(tmp_path / "m", type="Q4_0", imatrix=str(tmp_path / "b.gguf"))


def test_a_run_that_fails_leaves_nothing_under_a_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama", tmp_path / "m")
    monkeypatch.setattr("quantpress.engine.gguf_backend.copy_companions", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path / "m", tmp_path / "out", type="F16")
    assert not (tmp_path / "out" / "quantized").exists()


def test_bits_per_weight_of_an_artifact_are_those_of_its_quantized_tensors(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    build("llama", tmp_path / "m")
    run(tmp_path / "m", tmp_path / "q8", type="Q8_0")
    run(tmp_path / "m", tmp_path / "f16", type="F16")
    for out, bits in (("q8", 8.5), ("f16", None)):
        artifact, _ = open_artifact(tmp_path / out / "quantized", torch.device("cpu"))
        assert artifact.bits_per_weight() == bits


def test_export_takes_the_artifact_for_what_it_is(tmp_path: Path) -> None:
    build("llama", tmp_path / "m")
    run(tmp_path / "m", tmp_path / "out", type="F16")
    artifact, _ = open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"))
    contents = of_artifact(artifact)
    assert contents.format == "gguf"
    assert refusal(loaders()["llama.cpp"], contents.format, []) is None
    assert refusal(loaders()["vllm"], contents.format, []) is not None
