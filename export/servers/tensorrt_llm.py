"""TensorRT-LLM: trtllm-serve, its PyTorch backend, which reads hf_quant_config.json beside the shards.

Options: tensorrt_llm/commands/serve.py of NVIDIA/TensorRT-LLM 1.x; image: nvcr.io/nvidia/tensorrt-llm/release.
"""

from typing import Any

from quantpress.recipe import TensorRtLlm

from ..deployment import HOST, MODEL, PORT, Deployment, Server, curl_free_check
from .vllm import completion

VERSION = "1.3.0rc20"
_HEALTH = "/health"


def server(target: TensorRtLlm, model: Deployment) -> Server:
    """How to start it. The type of the cache is in the files: the backend takes it from there."""
    arguments = [MODEL, "--host", HOST, "--port", PORT, "--tp_size", str(target.tensor_parallel)]
    arguments += ["--max_batch_size", str(target.max_num_seqs)]
    if target.max_model_len is not None:
        arguments += ["--max_seq_len", str(target.max_model_len)]
    arguments += ["--kv_cache_free_gpu_memory_fraction", f"{target.free_gpu_memory_fraction:g}"]
    arguments += ["--enable_chunked_prefill"] if target.chunked_prefill else []
    return Server(
        name=model.name,
        title=f"TensorRT-LLM {VERSION}",
        image=f"nvcr.io/nvidia/tensorrt-llm/release:{VERSION}",
        local=("trtllm-serve", "serve"),
        entrypoint=("trtllm-serve", "serve"),
        arguments=tuple(arguments),
        needs=f"`pip install tensorrt-llm=={VERSION}`",
        port=target.port,
        health=_HEALTH,
        check=curl_free_check(target.port, _HEALTH),
        probe=completion("model", target.port),  # it calls a model after its folder
        resources=model.resources,
        env={"HF_HUB_OFFLINE": "1"},
    )


def llm_arguments(target: Any, model: str) -> dict[str, Any]:
    """The same for TensorRT-LLM's LLM class, which other servers call."""
    arguments: dict[str, Any] = {"model": model, "backend": "pytorch", "tensor_parallel_size": target.tensor_parallel}
    arguments["max_batch_size"] = target.max_num_seqs
    if target.max_model_len is not None:
        arguments["max_seq_len"] = target.max_model_len
    return arguments
