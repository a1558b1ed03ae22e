"""The types of each mix: the published lists restated, and llama.cpp's own quantizer where it is installed."""

import ctypes
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest

from quantpress.gguf.mixes import Choice, FileType, Traits, choose, default_type, fitting

MIXES: tuple[FileType, ...] = get_args(FileType)


def tensors(
    blocks: int, columns: int = 256, inner: int = 512, *, tied: bool = False, fused: bool = False, experts: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model; few rows, since the rule does not look at them."""
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (4, columns), "output_norm.weight": (columns,)}
    if not tied:
        out["output.weight"] = (4, columns)
    for i in range(blocks):
        qkv = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
        out |= {f"blk.{i}.{name}.weight": (2, columns) for name in (*qkv, "attn_output")}
        out |= {f"blk.{i}.{name}.weight": (columns,) for name in ("attn_norm", "ffn_norm")}
        if experts:
            out[f"blk.{i}.ffn_gate_inp.weight"] = (experts, columns)
            out |= {f"blk.{i}.ffn_{name}_exps.weight": (experts, 2, columns) for name in ("gate", "up")}
            out[f"blk.{i}.ffn_down_exps.weight"] = (experts, 2, inner)
        else:
            out |= {f"blk.{i}.ffn_{name}.weight": (2, columns) for name in ("gate", "up")}
            out[f"blk.{i}.ffn_down.weight"] = (2, inner)
    return out


def types(mix: FileType, names: dict[str, tuple[int, ...]], model: Traits, imatrix: bool = False) -> dict[str, str]:
    return {name: "kept" if c is None else c.type for name, c in choose(mix, names, model, imatrix=imatrix).items()}


def layers(found: dict[str, str], part: str) -> dict[str, list[int]]:
    """Which blocks have which type of tensor `part`."""
    out: dict[str, list[int]] = {}
    for name, kind in found.items():
        if name.startswith("blk.") and f".{part}." in name:
            out.setdefault(kind, []).append(int(name.split(".")[1]))
    return out


LLAMA_7B = Traits("llama", 32, 32, 32)
EVERY_THIRD = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]  # as in every Q4_K_M file of a 32-layer Llama


def test_a_q4_k_m_file_of_a_32_layer_llama() -> None:
    found = types("Q4_K_M", tensors(32), LLAMA_7B)
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    for part in ("attn_v", "ffn_down"):
        assert layers(found, part) == {"Q6_K": EVERY_THIRD, "Q4_K": [i for i in range(32) if i not in EVERY_THIRD]}
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert layers(found, part) == {"Q4_K": list(range(32))}
    assert {found[name] for name in found if "norm" in name} == {"kept"}


@pytest.mark.parametrize(
    ("mix", "value", "down", "attention_output"),
    [
        ("Q2_K", {"Q3_K": 32}, {"Q3_K": 32}, "Q3_K"),
        ("Q2_K_S", {"Q2_K": 32}, {"Q4_K": 4, "Q2_K": 28}, "Q2_K"),
        ("Q3_K_S", {"Q3_K": 32}, {"Q3_K": 32}, "Q3_K"),
        ("Q3_K_M", {"Q5_K": 2, "Q4_K": 30}, {"Q5_K": 2, "Q4_K": 30}, "Q4_K"),
        ("Q3_K_L", {"Q5_K": 32}, {"Q5_K": 32}, "Q5_K"),
        ("Q4_K_S", {"Q5_K": 4, "Q4_K": 28}, {"Q5_K": 4, "Q4_K": 28}, "Q4_K"),
        ("Q5_K_S", {"Q5_K": 32}, {"Q5_K": 32}, "Q5_K"),
        ("Q5_K_M", {"Q6_K": 16, "Q5_K": 16}, {"Q6_K": 16, "Q5_K": 16}, "Q5_K"),
        ("Q6_K", {"Q6_K": 32}, {"Q6_K": 32}, "Q6_K"),
        ("Q8_0", {"Q8_0": 32}, {"Q8_0": 32}, "Q8_0"),
        ("Q4_0", {"Q4_0": 32}, {"Q4_0": 32}, "Q4_0"),
    ],
)
def test_the_other_mixes_of_a_32_layer_llama(
    mix: FileType, value: dict[str, int], down: dict[str, int], attention_output: str
) -> None:
    found = types(mix, tensors(32), LLAMA_7B)
    assert {kind: len(at) for kind, at in layers(found, "attn_v").items()} == value
    assert {kind: len(at) for kind, at in layers(found, "ffn_down").items()} == down
    assert set(layers(found, "attn_output")) == {attention_output}
    assert set(layers(found, "ffn_up")) == {default_type(mix)}
    assert found["output.weight"] == ("Q8_0" if mix == "Q8_0" else "Q6_K")


def test_an_importance_matrix_moves_the_first_down_projections() -> None:
    assert layers(types("Q4_0", tensors(32), LLAMA_7B, imatrix=True), "ffn_down")["Q4_1"] == [0, 1, 2, 3]
    assert layers(types("Q5_0", tensors(32), LLAMA_7B, imatrix=True), "ffn_down")["Q5_1"] == [0, 1, 2, 3]


def test_tied_embeddings_are_treated_as_the_head() -> None:
    assert types("Q3_K_S", tensors(2, tied=True), LLAMA_7B)["token_embd.weight"] == "Q6_K"


def test_shared_values_and_experts_get_more() -> None:
    assert layers(types("Q2_K", tensors(4), Traits("llama", 4, 32, 8)), "attn_v") == {"Q4_K": [0, 1, 2, 3]}
    mixtral = types("Q4_K_M", tensors(4, experts=8), Traits("llama", 4, 32, 8, experts=8))
    assert set(layers(mixtral, "attn_v")) == set(layers(mixtral, "attn_k")) == {"Q8_0"}
    assert set(layers(mixtral, "attn_output")) == {"Q5_K"}
    assert set(layers(mixtral, "ffn_gate_inp")) == {"kept"}
    assert set(layers(types("Q3_K_S", tensors(80), Traits("llama", 80, 64, 8)), "attn_v")) == {"Q5_K"}


@pytest.mark.parametrize(
    ("wanted", "columns", "got"),
    [("Q4_K", 576, "Q5_0"), ("Q6_K", 576, "Q8_0"), ("Q5_K", 32, "Q5_1"), ("Q2_K", 96, "Q4_0"), ("Q3_K", 96, "Q4_0"),
     ("Q4_K", 520, "F16"), ("Q4_0", 80, "F16")],
)  # fmt: skip
def test_rows_that_are_not_whole_blocks_fall_back(wanted: str, columns: int, got: str) -> None:
    assert fitting(wanted, columns) == Choice(got, wanted)  # type: ignore[arg-type]
    assert fitting("Q4_K", 512) == Choice("Q4_K")


MODELS = {
    "llama 12": (Traits("llama", 12, 32, 32), {"blocks": 12}),
    "llama 33 tied, shared values": (Traits("llama", 33, 32, 8), {"blocks": 33, "tied": True}),
    "llama 80": (Traits("llama", 80, 64, 8), {"blocks": 80}),
    "mixtral": (Traits("llama", 9, 32, 8, experts=8), {"blocks": 9, "experts": 8}),
    "llama with 4 experts": (Traits("llama", 17, 32, 8, experts=4), {"blocks": 17, "experts": 4}),
    "qwen2 with rows of 576": (
        Traits("qwen2", 24, 14, 2),
        {"blocks": 24, "columns": 576, "inner": 1536, "tied": True},
    ),
    "qwen2 80": (Traits("qwen2", 80, 64, 8), {"blocks": 80}),
    "gemma2 with rows of 96": (
        Traits("gemma2", 26, 8, 4),
        {"blocks": 26, "columns": 96, "inner": 80, "tied": True},
    ),
    "gptneox": (Traits("gptneox", 16, 8, 8), {"blocks": 16, "fused": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("imatrix", [False, True])
def test_llama_cpp_chooses_the_same(name: str, imatrix: bool, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, settings = MODELS[name]
    shapes = tensors(**settings)  # type: ignore[arg-type]
    source = tmp_path / "in.gguf"
    write(source, shapes, model)
    for mix in MIXES:
        if mix == "Q2_K_S" and not imatrix:
            continue  # llama.cpp refuses it
        result = quantized(llama_cpp, source, tmp_path / "out.gguf", mix, shapes if imatrix else {})
        ours = types(mix, shapes, model, imatrix)
        for tensor in shapes:
            assert result[tensor] == (ours[tensor] if ours[tensor] != "kept" else "F32"), (mix, tensor)


def write(path: Path, shapes: dict[str, tuple[int, ...]], model: Traits) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(shapes["token_embd.weight"][-1])
    writer.add_feed_forward_length(512)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_parallel_residual(True)
    writer.add_sliding_window(32)
    writer.add_key_length(16)
    writer.add_value_length(16)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(
    llama_cpp: Any, source: Path, target: Path, mix: FileType, weighted: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """The types in the file that llama.cpp's quantizer makes, with an importance matrix of ones for `weighted`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{mix}"].value
    params.nthread = 1
    ones = (ctypes.c_float * (1 << 14))(*[1.0] * (1 << 14))
    matrix = (llama_cpp.llama_model_imatrix_data * (len(weighted) + 1))()  # ends with an entry without a name
    for entry, (name, shape) in zip(matrix, weighted.items(), strict=False):
        count = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        entry.name, entry.data, entry.size = name.encode(), ctypes.cast(ones, ctypes.POINTER(ctypes.c_float)), count
    if weighted:
        params.imatrix = matrix
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
