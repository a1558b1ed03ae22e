"""TensorRT-LLM: trtllm-serve, its PyTorch backend, which reads hf_quant_config.json beside the shards.

Options: tensorrt_llm/commands/serve.py of NVIDIA/TensorRT-LLM 1.x; image: nvcr.io/nvidia/tensorrt-llm/release.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, completion, curl_free_check
from .loader import FP8_INPUTS, Loadable, Loader
from .server import Server
from .target_settings import MultiGpu

VERSION = "1.3.0rc20"
_HEALTH = "/health"

_ROWS = (  # tensorrt_llm of NVIDIA/TensorRT-LLM, the PyTorch backend of 1.x
    # _torch/model_config.py, quantization/mode.py: quant_algo FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4, W4A16_AWQ, W8A16;
    # load_modelopt_quant_config: MIXED_PRECISION, one of them for each of `quantized_layers`.
    Loadable("modelopt", ("fp8",), inputs=FP8_INPUTS),
    Loadable("modelopt", ("nvfp4",), inputs=("nvfp4",), note="on Blackwell GPUs only"),
    Loadable("modelopt", bits=(4,), groups=(64, 128)),
    Loadable("modelopt", bits=(8,), groups=(-1,)),
    # models/quant_config_utils.py: _quant_config_from_config_group.
    Loadable("compressed-tensors", ("fp8",), groups=(-1,), inputs=("fp8 dynamic",)),
    Loadable("compressed-tensors", ("fp8-block",), inputs=("fp8 dynamic",)),
    Loadable("compressed-tensors", ("nvfp4",), inputs=("nvfp4",), note="on Blackwell GPUs only", since="1.3"),
)
# Release candidate 15 requires transformers 5.5.3, 24 requires 5.5.4, by container/deps of ai-dynamo/dynamo.
_INSIDE = {"transformers": "5.5.3 or 5.5.4"}
LOADER = Loader(
    "tensorrt-llm", "TensorRT-LLM", tuple(replace(row, cuda=True) for row in _ROWS), version=VERSION, inside=_INSIDE
)


class TensorRtLlm(MultiGpu):
    """TensorRT-LLM's own server, PyTorch backend."""

    name: Literal["tensorrt-llm"] = Field("tensorrt-llm", description="selects TensorRT-LLM")
    _loader: ClassVar[Loader] = LOADER
    chunked_prefill: bool = Field(True, description="split long prompts, so that running answers are not held up")
    free_gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, strict=False, description="share of the memory left beside the weights that the cache takes"
    )


def deploy(target: TensorRtLlm, folder: ModelFolder) -> Deployment:
    """How the server is started on the model in `folder`. The backend reads the cache's type from the files."""
    arguments = [MODEL, "--host", HOST, "--port", PORT, "--tp_size", str(target.tensor_parallel)]
    arguments += ["--max_batch_size", str(target.max_num_seqs)]
    if target.max_model_len is not None:
        arguments += ["--max_seq_len", str(target.max_model_len)]
    arguments += ["--kv_cache_free_gpu_memory_fraction", f"{target.free_gpu_memory_fraction:g}"]
    arguments += ["--enable_chunked_prefill"] if target.chunked_prefill else []
    return Deployment(
        name=folder.name,
        title=f"TensorRT-LLM {VERSION}",
        image=f"nvcr.io/nvidia/tensorrt-llm/release:{VERSION}",
        local=("trtllm-serve", "serve"),
        entrypoint=("trtllm-serve", "serve"),
        arguments=tuple(arguments),
        needs=f"TensorRT-LLM {VERSION}, which its container has and PyPI has not",
        port=target.port,
        health=_HEALTH,
        check=curl_free_check(target.port, _HEALTH),
        probe=completion(folder, target.port, "model"),  # it calls a model after its folder
        resources=folder.resources,
        env={"HF_HUB_OFFLINE": "1"},
    )


def llm_arguments(target: MultiGpu, model: str) -> dict[str, Any]:
    """The same settings as arguments of TensorRT-LLM's LLM class, which Triton's backend calls."""
    arguments: dict[str, Any] = {"model": model, "backend": "pytorch", "tensor_parallel_size": target.tensor_parallel}
    arguments["max_batch_size"] = target.max_num_seqs
    if target.max_model_len is not None:
        arguments["max_seq_len"] = target.max_model_len
    return arguments


SERVER = Server(
    name="tensorrt-llm",
    settings=TensorRtLlm,
    deploy=deploy,
    variants=(TensorRtLlm(),),
    hub_command="trtllm-serve {name}",
)
