"""What servers refuse of a model's shapes, said before the work; and what is worth a note."""

from dataclasses import replace
from typing import Any

import pytest

from quantpress.artifact.artifact import Artifact
from quantpress.core.errors import BadInput
from quantpress.engine.job import prepare
from quantpress.engine.sources import resolve
from quantpress.exports.contracts import advice, check_job, of_artifact, of_job, problems
from quantpress.exports.servers.llama_cpp import LlamaCpp
from quantpress.exports.servers.resources import kv_bytes_per_token
from quantpress.exports.servers.served_model import ServedModel
from quantpress.exports.servers.sglang import Sglang
from quantpress.exports.servers.tgi import Tgi
from quantpress.exports.servers.vllm import Vllm
from quantpress.numbers.types import Activations, Bits, Grid
from quantpress.recipe import Target
from quantpress.recipe.loading import parse

from ..quantize.formats.artifacts import make, uniform
from ..tiny import build

W4 = Grid(group_size=64)
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def contents(grid: Grid | None = W4, format: str = "compressed-tensors", **keys: Any) -> ServedModel:
    """One block of a model with hidden size 512, intermediate size 1408, 8 heads and 2 key-value heads."""
    sides = {"q_proj": (512, 512), "k_proj": (128, 512), "v_proj": (128, 512), "o_proj": (512, 512),
             "gate_proj": (1408, 512), "up_proj": (1408, 512), "down_proj": (512, 1408)}  # fmt: skip
    names = {f"model.layers.0.{part}": sides[part.rpartition(".")[2]] for part in PARTS}
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    schemes = dict.fromkeys(names, grid) | {f"model.layers.0.{k}": v for k, v in keys.pop("schemes", {}).items()}
    return ServedModel(format, names, schemes, config=config | keys.pop("config", {}), **keys)


def test_nothing_is_said_of_what_loads() -> None:
    assert problems(Vllm(tensor_parallel=2), contents()) == []
    assert problems(Vllm(device="cpu"), contents()) == []
    assert problems(Tgi(), contents(format="gptq")) == []


def test_the_readers_table_is_part_of_it() -> None:
    (line,) = problems(Vllm(device="cpu"), contents(Grid(bits=3, group_size=64)))
    assert "does not take compressed-tensors files of int3 g64 sym weights" in line
    (line,) = problems(LlamaCpp(), contents())
    assert "reads gguf files" in line


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_vllm_takes_2_to_8_bits_on_a_gpu_only(bits: Bits) -> None:
    """compressed_tensors_wNa16.py and the humming kernels; zeros need groups, on a CPU there are kernels for 4 bits."""
    for symmetric in (True, False):
        assert problems(Vllm(), contents(Grid(bits=bits, group_size=64, symmetric=symmetric))) == []
        assert problems(Vllm(device="cpu"), contents(Grid(bits=bits, group_size=64, symmetric=symmetric)))
    assert problems(Vllm(), contents(Grid(bits=bits, group_size=-1))) == []
    assert problems(Vllm(), contents(Grid(bits=bits, group_size=-1, symmetric=False)))


def test_vllm_splits_packed_zeros_at_whole_words() -> None:
    narrow = {"model.layers.0.self_attn.v_proj": (40, 128), "model.layers.0.mlp.down_proj": (128, 256)}
    model = replace(
        contents(), shapes=narrow, schemes=dict.fromkeys(narrow, Grid(bits=3, group_size=32, symmetric=False))
    )
    (line,) = problems(Vllm(), model)
    assert "40 outputs on each GPU of 3 bits" in line
    assert (
        problems(Vllm(), replace(model, schemes=dict.fromkeys(narrow, Grid(bits=4, group_size=32, symmetric=False))))
        == []
    )
    assert problems(Vllm(), replace(model, schemes=dict.fromkeys(narrow, Grid(bits=3, group_size=32)))) == []


def test_vllm_takes_experts_of_few_bits_in_groups() -> None:
    names = {
        f"model.layers.0.mlp.experts.{i}.{p}": (64, 64) for i in range(2) for p in ("gate_proj", "up_proj", "down_proj")
    }
    for group, lines in ((-1, 1), (32, 0)):
        grid = Grid(bits=3, group_size=group)
        model = replace(contents(), shapes=names, schemes=dict.fromkeys(names, grid))
        assert len(problems(Vllm(), model)) == lines


@pytest.mark.parametrize(
    ("dense", "fused"), [("self_attn.v_proj", "q_proj, model"), ("mlp.up_proj", "gate_proj"), ("mlp.down_proj", None)]
)
@pytest.mark.parametrize("target", [Vllm(), Tgi()])
def test_fused_linears_have_one_scheme(target: Target, dense: str, fused: str | None) -> None:
    found = problems(target, contents(schemes={dense: None}))
    assert len(found) == (0 if fused is None else 1)
    assert all("needs one scheme" in line and str(fused) in line for line in found)


@pytest.mark.parametrize(
    ("grid", "gpus", "said"),
    [
        (Grid(group_size=64), 2, None),
        (Grid(group_size=64), 4, "cut a scale group of 64 in model.layers.0.mlp.down_proj (512 x 1408)"),
        (Grid(group_size=32), 4, None),
        (Grid(group_size=-1), 8, None),
        (Grid(type="fp8", group_size=0), 8, None),
        (Grid(type="fp8-block"), 2, "cut a block of 128 in model.layers.0.self_attn.k_proj (128 x 512)"),
        (Grid(group_size=64), 3, "cut 8 attention heads unevenly"),
    ],
)
def test_gpus_share_whole_groups_blocks_and_heads(grid: Grid, gpus: int, said: str | None) -> None:
    found = problems(Vllm(tensor_parallel=gpus), contents(grid))
    assert found == [] if said is None else any(said in line for line in found)


def test_more_gpus_than_key_value_heads_share_them_evenly() -> None:
    assert problems(Vllm(tensor_parallel=4), contents(Grid(group_size=32))) == []
    found = problems(Vllm(tensor_parallel=4), contents(Grid(group_size=32), config={"num_key_value_heads": 6}))
    assert any("6 key-value heads" in line for line in found)


def test_packed_words_are_not_cut() -> None:
    narrow = ServedModel("awq", {"model.layers.0.up_proj": (24, 64)}, {"model.layers.0.up_proj": Grid(group_size=32)})
    assert any("cut a packed word of 8" in line for line in problems(Vllm(tensor_parallel=2), narrow))
    assert problems(Vllm(tensor_parallel=3), narrow) == []


def test_a_length_beyond_the_models_is_refused() -> None:
    (line,) = problems(Vllm(max_model_len=4096), contents())
    assert "max_model_len 4096, and the model has 2048 positions" in line
    assert problems(Vllm(max_model_len=2048), contents()) == []
    scaled = contents(config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert problems(Vllm(max_model_len=4096), scaled) == []


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 2048),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16]}}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 2048),
    ],
)
def test_rotary_scaling_extends_as_far_as_vllm_lets_it(config: dict[str, Any], positions: int) -> None:
    """vLLM's config/model.py, _get_and_verify_max_len, over 2048 positions."""
    assert contents(config=config).positions == positions
    assert problems(Vllm(max_model_len=positions), contents(config=config)) == []
    assert problems(Vllm(max_model_len=positions + 1), contents(config=config)) != []


def test_latent_attention_keeps_its_latents() -> None:
    """DeepSeek-V3: 61 layers of 512 + 64 numbers in 16 bit; 25 times as many by its 128 heads."""
    config = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}
    assert kv_bytes_per_token(contents(config=config), 2) == 61 * (512 + 64) * 2


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_tgi_leaves_no_layer_of_these_out(format: str) -> None:
    (line,) = problems(Tgi(), contents(format=format, schemes={"mlp.down_proj": None}))
    assert "TGI wants every linear" in line
    assert "model.layers.0.mlp.down_proj" in line
    assert problems(Vllm(), contents(format=format, schemes={"mlp.down_proj": None})) == []


@pytest.mark.parametrize(
    ("format", "dense", "family", "said"),
    [
        ("compressed-tensors", ("mlp.down_proj",), "llama", None),
        ("compressed-tensors", ("mlp.gate_proj", "mlp.up_proj"), "llama", "fuses model.layers.0.mlp.gate_proj"),
        ("compressed-tensors", ("mlp.gate_proj", "mlp.up_proj"), "gemma3_text", None),
        ("compressed-tensors", ("mlp.gate_proj", "mlp.up_proj"), "qwen3_moe", None),
        ("compressed-tensors", ("mlp.gate_proj", "mlp.up_proj"), "gemma3n_text", "fuses model.layers.0.mlp.gate_proj"),
        ("awq", ("mlp.gate_proj", "mlp.up_proj"), "gemma3_text", "set formats: [gptq]"),
        ("gptq", ("mlp.gate_proj", "mlp.up_proj"), "llama", None),
    ],
)
def test_sglang_knows_fused_layers_by_their_own_names(
    format: str, dense: tuple[str, ...], family: str, said: str | None
) -> None:
    found = problems(Sglang(), contents(format=format, schemes=dict.fromkeys(dense), config={"model_type": family}))
    assert found == [] if said is None else [said in line for line in found] == [True]


def test_sglang_finds_one_scheme_in_compressed_tensors() -> None:
    eight = {"mlp.down_proj": Grid(bits=8, group_size=64)}
    (line,) = problems(Sglang(), contents(schemes=eight))
    assert "finds no scheme for fused layers in compressed-tensors files of int4 g64 sym, int8 g64 sym" in line
    assert problems(Sglang(), contents(format="gptq", schemes=eight)) == []


@pytest.mark.parametrize(
    ("format", "grid", "sides", "gpus", "said"),
    [
        ("gptq", W4, (128, 64), 1, None),
        ("gptq", W4, (64, 128), 1, None),
        ("gptq", W4, (64, 64), 1, "is 64 x 64 on a GPU: set formats: [awq]"),
        ("awq", W4, (64, 64), 1, None),
        ("gptq", W4, (256, 64), 2, None),
        ("gptq", W4, (128, 64), 2, "is 64 x 64 on a GPU"),
        ("compressed-tensors", Grid(type="fp8"), (64, 64), 1, "round the inputs (activations) too"),
        ("compressed-tensors", Grid(type="nvfp4"), (64, 64), 1, None),
    ],
)
def test_sglangs_kernel_has_shapes_that_it_takes(
    format: str, grid: Grid, sides: tuple[int, int], gpus: int, said: str | None
) -> None:
    one = ServedModel(format, {"model.layers.0.fc1": sides}, {"model.layers.0.fc1": grid})
    found = problems(Sglang(tensor_parallel=gpus), one)
    assert found == [] if said is None else [said in line for line in found] == [True]


def test_sglang_multiplies_fused_layers_as_one() -> None:
    """SmolLM2's shapes: 576 + 192 + 192 rows together are a multiple of 64, and 576 columns none of 128. On four GPUs
    three key-value heads would be copied."""
    names = {
        f"model.layers.0.self_attn.{part}_proj": (rows, 576) for part, rows in zip("qkv", (576, 192, 192), strict=True)
    }
    (line,) = problems(Sglang(), ServedModel("gptq", names, dict.fromkeys(names, W4)))
    assert "q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj are together 960 x 576" in line
    wide = {"model.layers.0.self_attn.q_proj": (1024, 64), "model.layers.0.self_attn.k_proj": (128, 64)}
    two = ServedModel(
        "gptq", wide, dict.fromkeys(wide, W4), config={"num_attention_heads": 8, "num_key_value_heads": 1}
    )
    assert problems(Sglang(tensor_parallel=4), two) == []  # 1024 / 4 and a copy of 128


def test_sglang_rounds_inputs_in_its_own_way() -> None:
    inputs = Activations(type="int8", symmetric=False)
    (line,) = problems(Sglang(), contents(Grid(bits=8, group_size=-1), activations=inputs))
    assert "set activations.symmetric: true" in line
    names = {"model.layers.0.mlp.experts.0.up_proj": (64, 128)}
    grid = Grid(bits=8, group_size=-1)
    experts = ServedModel("compressed-tensors", names, dict.fromkeys(names, grid), Activations(type="int8"))
    (line,) = problems(Sglang(), experts)
    assert "no GPU kernel for experts with int8 inputs" in line


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        ({"0.mlp.experts.1.down_proj": Grid(bits=8, group_size=64)}, "experts.1.down_proj in int8 g64 sym"),
        ({f"0.mlp.experts.{k}.down_proj": None for k in (0, 1)}, "layers.0.mlp.experts.0.down_proj in 16 bit"),
        ({"0.mlp.shared_experts.down_proj": Grid(bits=8, group_size=64)}, None),
        ({f"1.mlp.experts.{k}.{p}_proj": None for k in (0, 1) for p in ("gate", "up", "down")}, None),
    ],
)
def test_vllm_wants_one_scheme_for_the_experts_of_a_block(other: dict[str, Grid | None], said: str | None) -> None:
    parts = ("experts.0", "experts.1", "shared_experts")
    names = {
        f"model.layers.{i}.mlp.{part}.{p}_proj": (128, 128)
        for i in (0, 1) for part in parts for p in ("gate", "up", "down")
    }  # fmt: skip
    schemes = dict.fromkeys(names, W4) | {f"model.layers.{name}": grid for name, grid in other.items()}
    found = problems(Vllm(), ServedModel("compressed-tensors", names, schemes))
    assert found == [] if said is None else [said in line for line in found] == [True]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"ignore": ["*.experts.*.down_proj"]}, "16 bit"),
        ({"overrides": [{"match": "*.experts.*.down_proj", "bits": 8}], "formats": ["gptq"]}, "int8 g32 sym"),
    ],
)
def test_a_job_with_mixed_experts_is_refused_for_vllm(tmp_path: Any, keys: dict[str, Any], kind: str) -> None:
    said = f"vLLM needs one scheme for all experts of a block, .*down_proj in {kind}: override them alike"
    with pytest.raises(BadInput, match=said):
        check_job(job(tmp_path, "qwen3_moe", targets=["vllm"], **keys))


def test_a_cpu_takes_no_integer_experts_with_16_bit_inputs() -> None:
    """Seen with vLLM 0.32.0: "No WNA16 MoE backend supports the deployment configuration"; else it serves."""
    names = {f"model.layers.0.{part}_proj": (128, 128) for part in ("self_attn.q", "mlp.experts.0.up")}
    for schemes, refused in ((dict.fromkeys(names, W4), True), ({"model.layers.0.self_attn.q_proj": W4}, False)):
        model = ServedModel("compressed-tensors", names, schemes)
        said = "no kernel for experts of integers with inputs in 16 bit (model.layers.0.mlp.experts.0.up_proj)"
        assert any(said in line for line in problems(Vllm(device="cpu"), model)) is refused
        assert not any(said in line for line in problems(Vllm(), model))


def test_the_cpu_kernel_wants_multiples_of_32() -> None:
    odd = ServedModel("gptq", {"model.layers.0.up_proj": (72, 64)}, {"model.layers.0.up_proj": Grid(group_size=64)})
    assert any("multiples of 32, and it is 72 x 64" in line for line in problems(Vllm(device="cpu"), odd))
    assert problems(Vllm(), odd) == []


@pytest.mark.parametrize(
    ("config", "size"), [({"head_dim": 80}, 80), ({"hidden_size": 384}, 48), ({"head_dim": 64}, None), ({}, None)]
)
def test_an_fp8_cache_on_a_cpu_wants_heads_of_multiples_of_32(config: dict[str, int], size: int | None) -> None:
    """8 heads; vLLM's v1/attention/backends/cpu_attn.py, _get_attn_isa."""
    said = [f"multiples of 32 in an FP8 cache, and they are {size}"] if size else []
    found = problems(Vllm(device="cpu"), contents(kv_cache="fp8", config=config))
    assert [part in line for part, line in zip(said, found, strict=True)] == [True] * len(said)
    assert problems(Vllm(device="cpu"), contents(config=config)) == []
    assert problems(Vllm(), contents(kv_cache="fp8", config=config)) == []


def job(folder: Any, family: str = "llama", **keys: Any) -> Any:
    build(family, folder)
    small = {"weights": {"group_size": 32}, "method": {"name": "rtn"}, "model": str(folder)}
    return prepare(parse(small | keys), resolve(str(folder), cache=folder))


def test_a_job_is_refused_for_its_shapes_before_the_work(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match=r"targets: vLLM split over 2 GPUs would cut a scale group of 32 .*down_proj"):
        check_job(job(tmp_path, targets=[{"name": "vllm", "tensor_parallel": 2}]))
    formats = ["gptq", "compressed-tensors"]
    both = job(
        tmp_path,
        targets=["vllm", {"name": "triton"}],
        formats=formats,
        weights={"bits": 4, "group_size": 32, "symmetric": False},
    )
    assert check_job(both) == {"vllm": "compressed-tensors", "triton": "compressed-tensors"}
    with pytest.raises(BadInput, match=r"needs one scheme for all of them"):
        check_job(job(tmp_path, ignore=["*v_proj"], targets=["vllm"]))


def test_advice_is_for_recipes_that_name_no_target(tmp_path: Any) -> None:
    eight = {"weights": {"bits": 8, "group_size": 32}}
    assert any("vLLM on a CPU does not take" in line for line in advice(job(tmp_path, **eight)))
    assert not any("on a CPU" in line for line in advice(job(tmp_path, targets=["vllm"], **eight)))
    assert any(line.startswith("tensor parallelism up to 1") for line in advice(job(tmp_path)))


def test_advice_on_experts(tmp_path: Any) -> None:
    found = advice(job(tmp_path, "qwen3_moe", weights={"type": "nvfp4"}, targets=["vllm"]))
    assert any("answers wrongly" in line for line in found)
    inputs = advice(job(tmp_path, "qwen3_moe", weights={"type": "fp8"}, activations={"type": "fp8"}))
    assert any("leaves the inputs of experts in 16 bit" in line for line in inputs)
    assert not any("experts" in line for line in advice(job(tmp_path, weights={"type": "nvfp4"})))


def test_advice_on_zero_points(tmp_path: Any) -> None:
    """transformers loads none of experts, and from 5.23 on none beside another scheme."""
    zeros = {"weights": {"group_size": 32, "symmetric": False}}
    for family, more, said in (
        ("qwen3_moe", {"targets": ["vllm"]}, "transformers does not load experts of int4 g32 asym weights"),
        ("llama", {"overrides": [{"match": "*.down_proj", "bits": 8}]}, "transformers 5.23 and newer does not load"),
        ("llama", {}, None),
    ):
        found = advice(job(tmp_path / f"{family}{len(more)}", family, **zeros | more))
        assert [said in line for line in found if line.startswith("transformers")] == [True] * (said is not None), found


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_an_artifact_is_seen_as_the_job_that_makes_it(format: str, tmp_path: Any) -> None:
    grid = Grid(group_size=32)
    make(tmp_path / "made", format, uniform(grid, dense=("mlp.down_proj",)))
    found = of_artifact(Artifact(tmp_path / "made"))
    planned = of_job(job(tmp_path / "plain", ignore=["*down_proj"], formats=[format]), format)
    assert (found.format, found.shapes, found.scattered) == (format, planned.shapes, False)
    assert {n: g and (g.bits, g.group_size) for n, g in found.schemes.items()} == {
        n: g and (g.bits, g.group_size) for n, g in planned.schemes.items()
    }
    assert (found.heads, found.kv_heads, found.positions) == (4, 2, 128)


def test_activations_count(tmp_path: Any) -> None:
    static = contents(Grid(bits=8, group_size=-1), activations=Activations(type="int8", dynamic=False))
    assert problems(Vllm(), static) == []
    assert any("with int8 static activations" in line for line in problems(Tgi(), static))
