"""SGLang: its OpenAI server on the artifact, or on the original with the artifact as its draft.

Flags and health check: the PyPI package sglang 0.5.23, srt/arg_groups/fields and srt/entrypoints/http_server.py; image:
docs/get-started/install of sgl-project/sglang. What it loads: srt/layers/quantization and srt/models of that package.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from .deployment import (
    HOST,
    MODEL,
    PORT,
    PYTHON,
    Deployment,
    ModelFolder,
    completion,
    curl_free_check,
    drafted,
    served_as,
)
from .loader import ANY_SYMMETRY, FP8_INPUTS, MARLIN_GROUPS, SIXTEEN_BIT, Loadable, Loader
from .served_model import FUSED, ServedModel, is_expert, marlin_misfits
from .server import Server
from .target_settings import LISTENS_ON, Drafting

VERSION = "0.5.23"
_HEALTH = "/health"  # generates a token each time nothing else does
_BLACKWELL = "on Blackwell GPUs; on others it leaves the inputs in 16 bit"

_ROWS = (  # srt/layers/quantization of the PyPI package sglang 0.5.23, on CUDA
    # __init__.py has gptq_marlin only; gptq/gptq.py: TYPE_MAP has (4, sym) and (8, sym), and g_idx is read.
    Loadable("gptq", bits=(4, 8), groups=MARLIN_GROUPS, scattered=True),
    # awq/awq.py: AWQMarlinConfig with zeros; shapes it does not take go to a kernel that needs groups.
    Loadable("awq", bits=(4,), groups=(32, 64, 128), symmetric=ANY_SYMMETRY),
    # compressed_tensors/schemes/compressed_tensors_wNa16.py; marlin_utils.py: no 8-bit type with zeros.
    Loadable("compressed-tensors", bits=(4,), groups=MARLIN_GROUPS, symmetric=ANY_SYMMETRY),
    Loadable("compressed-tensors", bits=(8,), groups=MARLIN_GROUPS),
    # compressed_tensors_w8a8_int8.py: apply_weights scales each token; static scales would be ignored.
    Loadable("compressed-tensors", bits=(8,), groups=(-1,), inputs=("int8 dynamic",)),
    # compressed_tensors.py: _is_fp8_w8a8, _is_fp8_w8a16; utils.py: no mxfp4 or mxfp8 among the formats of linears.
    Loadable("compressed-tensors", ("fp8",), inputs=(SIXTEEN_BIT, *FP8_INPUTS)),
    Loadable("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
    Loadable("compressed-tensors", ("nvfp4",), inputs=(SIXTEEN_BIT,)),
    Loadable("compressed-tensors", ("nvfp4",), inputs=("nvfp4",), note=_BLACKWELL),
    # modelopt_quant.py: ModelOptFp8Config wants quant_algo FP8, ModelOptFp4Config NVFP4 or W4A16_NVFP4.
    Loadable("modelopt", ("fp8",), groups=(0,), inputs=("fp8 static",)),
    Loadable("modelopt", ("nvfp4",), inputs=(SIXTEEN_BIT,)),
    Loadable("modelopt", ("nvfp4",), inputs=("nvfp4",), note=_BLACKWELL),
)
# Model types whose class names the parts of both fused layers (packed_modules_mapping in srt/models).
# Gemma3nForCausalLM has `.qkv_proj` there, which compressed_tensors/utils.py, should_ignore_layer, does not find.
_NAMING = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "gemma4_unified",
                     "qwen3_moe", "exaone4"})  # fmt: skip


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    if model.activations is not None and not model.activations.symmetric:
        yield "SGLang rounds int8 inputs symmetrically whatever the files say: set activations.symmetric: true"
    if model.activations is not None and model.activations.type == "int8" and model.has_experts:
        yield "SGLang has no GPU kernel for experts with int8 inputs: set activations: null"
    if model.format == "modelopt" and len(model.grids) > 1:
        # modelopt_quant.py: ModelOptMixedPrecisionConfig has no FP8_PER_CHANNEL_PER_TOKEN, the FP8 of such mixtures.
        yield "SGLang reads no such mixture in modelopt files: set formats: [compressed-tensors] or one type of weights"
    yield from _fused_names(model)
    yield from _marlin(model, gpus)


def _fused_names(model: ServedModel) -> Iterator[str]:
    """SGLang looks schemes up by the fused layer's name (qkv_proj). Those of `_NAMING` say which layers it is made of,
    and only for compressed-tensors."""
    parts = tuple(f".{part}" for fused in FUSED for part in fused)
    fused = [name for name in model.shapes if name.endswith(parts) and not is_expert(name)]
    named = model.format == "compressed-tensors" and model.config.get("model_type") in _NAMING
    if not fused or named or model.format not in ("compressed-tensors", "awq"):
        return
    dense = next((name for name in fused if model.schemes.get(name) is None), None)
    if dense is not None:
        yield (
            f"SGLang fuses {dense} and does not find it by name among what {model.format} files leave in 16 bit: "
            "set formats: [gptq], or quantize it"
        )
    if len(model.grids) > 1:
        kinds = ", ".join(map(str, model.grids))
        yield f"SGLang finds no scheme for fused layers in {model.format} files of {kinds}: drop `overrides`"


def _marlin(model: ServedModel, gpus: int) -> Iterator[str]:
    """Shapes that SGLang's Marlin kernel, for weights with 16-bit inputs, refuses: is_valid_config of
    kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh. AWQ files have a second kernel for them; nvfp4 weights are padded."""
    if model.activations is not None or model.format not in ("compressed-tensors", "gptq"):
        return
    found = next(marlin_misfits(model, gpus, ("int", "fp8")), None)
    if found is not None:
        four_bits = (found.grid.type, found.grid.bits) == ("int", 4)
        yield (
            "SGLang's kernel for 16-bit inputs takes multiples of 128 x 64 or of 64 x 128, and "
            f"{found.said}: {'set formats: [awq]' if four_bits else 'round the inputs (activations) too'}"
        )


_INSIDE = {"transformers": "5.19.0", "compressed_tensors": "0.18.0"}  # what sglang 0.5.23 requires
LOADER = Loader("sglang", "SGLang", _ROWS, _limits, version=VERSION, inside=_INSIDE)


class Sglang(Drafting):
    """SGLang's OpenAI server."""

    name: Literal["sglang"] = Field("sglang", description="selects SGLang")
    _loader: ClassVar[Loader] = LOADER
    port: int = Field(30000, ge=1, le=65535, description=LISTENS_ON)
    memory_fraction: float | None = Field(
        None, gt=0, lt=1, strict=False, description="of a GPU's memory, for weights and cache; null: SGLang decides"
    )


def deploy(target: Sglang, folder: ModelFolder) -> Deployment:
    """How SGLang is started on the model in `folder`."""
    served, mounts, notes = drafted(target.draft_for)
    name = served_as(folder, target.draft_for)
    # `sglang serve` is the shorter name for this, and looks for further backends first.
    module = ("-m", "sglang.launch_server")
    arguments = ["--model-path", served, "--served-model-name", name, "--host", HOST, "--port", PORT]
    arguments += ["--tensor-parallel-size", str(target.tensor_parallel)]
    arguments += ["--max-running-requests", str(target.max_num_seqs)]
    if target.max_model_len is not None:
        arguments += ["--context-length", str(target.max_model_len)]
    if target.memory_fraction is not None:
        arguments += ["--mem-fraction-static", f"{target.memory_fraction:g}"]
    # auto uses the scales in the files; a draft's scales are not those of the served model
    arguments += ["--kv-cache-dtype", "fp8_e4m3" if target.kv_cache_dtype == "fp8" else "auto"]
    arguments += [] if target.prefix_caching else ["--disable-radix-cache"]
    arguments += [] if target.chunked_prefill else ["--chunked-prefill-size", "-1"]
    if target.draft_for is not None:
        steps = target.draft_tokens
        arguments += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", MODEL]
        arguments += ["--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1"]
        arguments += ["--speculative-num-draft-tokens", str(steps + 1)]  # the count includes the original's own token
    return Deployment(
        name=folder.name,
        title=f"SGLang {VERSION}",
        image=f"lmsysorg/sglang:v{VERSION}",
        local=(PYTHON, *module),
        entrypoint=("python3", *module),
        arguments=tuple(arguments),
        needs=f"`pip install sglang=={VERSION}`",
        port=target.port,
        health=_HEALTH,
        check=curl_free_check(target.port, _HEALTH),
        probe=completion(folder, target.port, name),
        resources=folder.resources,
        env={"HF_HUB_OFFLINE": "1"} if target.draft_for is None or target.draft_for.startswith("/") else {},
        mounts=tuple(mounts),
        notes=tuple(notes),
    )


SERVER = Server(
    name="sglang",
    settings=Sglang,
    deploy=deploy,
    variants=(Sglang(),),
    hub_command="python3 -m sglang.launch_server --model-path {name}",
)
