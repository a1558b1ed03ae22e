"""Triton Inference Server: a model repository for its vLLM backend, or the settings of its TensorRT-LLM one.

vLLM backend: triton-inference-server/vllm_backend, README and samples: config.pbtxt names the backend and one instance,
1/model.json holds vLLM's engine arguments. TensorRT-LLM: triton_backend/all_models/llmapi of NVIDIA/TensorRT-LLM, which
the container has under /app; LLM_CONFIG_PATH names the model.yaml that its model.py reads. OpenAI's protocol:
python/openai/openai_frontend/main.py of triton-inference-server/server, in the container below /opt/tritonserver.
"""

import json

import yaml

from quantpress.recipe import Triton

from ..deployment import HOST, MODEL, PORT, Deployment, Mount, Server, curl_free_check
from .tensorrt_llm import llm_arguments
from .vllm import completion

VERSION = "26.03"
_HEALTH = "/v2/health/ready"
_REPOSITORY = "{repository}"
_FRONTEND = "/opt/tritonserver/python/openai/openai_frontend/main.py"
_CONFIG = """# vLLM finds its devices itself.
backend: "vllm"
instance_group [
  {
    count: 1
    kind: KIND_MODEL
  }
]
"""


def server(target: Triton, model: Deployment) -> Server:
    """How to start it."""
    vllm = target.backend == "vllm"
    called = model.name if vllm else "tensorrt_llm"  # the name that the container's repository has
    mounts = [Mount("model", "/model"), Mount("repository", "/models", _REPOSITORY)]
    env = {"HF_HUB_OFFLINE": "1"}
    if vllm:
        files = {
            f"repository/{model.name}/config.pbtxt": _CONFIG,
            f"repository/{model.name}/1/model.json": json.dumps(_engine(target, model.kv_cache), indent=2) + "\n",
        }
    else:
        settings = llm_arguments(target, "/model") | {"triton_config": {"max_batch_size": 0, "decoupled": False}}
        files = {"repository/model.yaml": yaml.safe_dump(settings, sort_keys=False)}
        env["LLM_CONFIG_PATH"] = "/models/model.yaml"
    repository = _REPOSITORY if vllm else "/app/all_models/llmapi"
    start: tuple[str, ...] = ("tritonserver",)
    if target.frontend == "openai":
        start, health, probe = ("python3", _FRONTEND), "/health/ready", completion(model.name, target.port)
        arguments = ["--model-repository", repository, "--tokenizer", MODEL, "--host", HOST, "--openai-port", PORT]
    else:
        health = _HEALTH
        arguments = [f"--model-repository={repository}", f"--http-address={HOST}", f"--http-port={PORT}"]
        arguments += ["--allow-grpc=false", "--allow-metrics=false"]  # one port, and it is published as asked
        asked = {"parameters": {"stream": False, "max_tokens": 16}} if vllm else {"max_tokens": 16}
        body = json.dumps({"text_input": "The sea is"} | asked)
        probe = f"curl -fsS http://127.0.0.1:{target.port}/v2/models/{called}/generate -d '{body}'"
    return Server(
        name=model.name,
        title=f"Triton {VERSION}, {'vLLM' if vllm else 'TensorRT-LLM'} backend",
        image=f"nvcr.io/nvidia/tritonserver:{VERSION}-{'vllm' if vllm else 'trtllm'}-python-py3",
        local=start,
        entrypoint=start,
        arguments=tuple(arguments),
        needs="Docker and NVIDIA's container toolkit",
        port=target.port,
        health=health,
        check=curl_free_check(target.port, health),
        probe=probe,
        resources=model.resources,
        env=env,
        mounts=tuple(mounts),
        files=files,
        contained=True,
    )


def _engine(target: Triton, kv_cache: str | None) -> dict[str, object]:
    """vLLM's AsyncEngineArgs."""
    arguments: dict[str, object] = {
        "model": "/model",
        "tensor_parallel_size": target.tensor_parallel,
        "max_num_seqs": target.max_num_seqs,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if target.max_model_len is not None:
        arguments["max_model_len"] = target.max_model_len
    if kv_cache == "fp8":
        arguments["kv_cache_dtype"] = "fp8"
    return arguments
