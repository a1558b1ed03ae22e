"""Triton Inference Server: a model repository for its vLLM backend, or the settings of its TensorRT-LLM one.

vLLM backend: triton-inference-server/vllm_backend, README and samples: config.pbtxt names the backend and one instance,
1/model.json holds vLLM's engine arguments. TensorRT-LLM: triton_backend/all_models/llmapi of NVIDIA/TensorRT-LLM, which
the container has under /app; LLM_CONFIG_PATH names the model.yaml that its model.py reads. OpenAI's protocol:
python/openai/openai_frontend/main.py of triton-inference-server/server, in the container below /opt/tritonserver.
"""

import json
from dataclasses import replace
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from .deployment import HOST, MODEL, PORT, Deployment, ModelFolder, Mount, completion, curl_free_check
from .loader import Loader
from .server import Server
from .target_settings import MultiGpu
from .tensorrt_llm import LOADER as TENSORRT_LLM_LOADER
from .tensorrt_llm import llm_arguments
from .vllm import LOADER as VLLM_LOADER

VERSION = "26.07"  # the newest of docs/introduction/compatibility.md of triton-inference-server/server
# By that page its containers hold older servers than those of these names: what they took up since is not for it.
_VLLM = replace(
    VLLM_LOADER,
    name="triton-vllm",
    label="Triton's vLLM",
    rows=tuple(replace(row, cuda=True) for row in VLLM_LOADER.rows if not row.since),
    parse=None,
    outer={},
    version=f"{VERSION} (vLLM 0.24)",
    inside={"transformers": "from 5.5.3 on", "compressed_tensors": "0.17.0"},  # what vllm 0.24.0 requires
)
_TENSORRT_LLM = replace(
    TENSORRT_LLM_LOADER,
    name="triton-tensorrt-llm",
    label="Triton's TensorRT-LLM",
    rows=tuple(row for row in TENSORRT_LLM_LOADER.rows if not row.since),
    version=f"{VERSION} (TensorRT-LLM 1.2.1)",
    inside={"transformers": "4.57.1"},  # requirements.txt of 1.2 and of 1.3's first candidates
)
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


class Triton(MultiGpu):
    """Triton Inference Server with one of its backends for language models."""

    name: Literal["triton"] = Field("triton", description="selects Triton")
    backend: Literal["vllm", "tensorrt-llm"] = Field("vllm", description="which engine runs the model")
    frontend: Literal["kserve", "openai"] = Field("kserve", description="Triton's own protocol, or OpenAI's")

    @model_validator(mode="after")
    def _has_the_frontend(self) -> Self:
        if self.frontend == "openai" and self.backend == "tensorrt-llm":
            raise ValueError(
                "frontend openai is for backend vllm; TensorRT-LLM's own OpenAI server is the target tensorrt-llm"
            )
        return self

    @property
    def loader(self) -> Loader:
        return _VLLM if self.backend == "vllm" else _TENSORRT_LLM

    def smoke_refusal(self) -> str | None:
        if self.frontend == "openai":
            return None
        return (
            "speaks Triton's own protocol, and the smoke test OpenAI's: export it with --set triton.frontend=openai"
            + ("" if self.backend == "vllm" else ", which backend vllm has, or for tensorrt-llm")
        )


def deploy(target: Triton, folder: ModelFolder) -> Deployment:
    """How Triton is started on the model in `folder`."""
    vllm = target.backend == "vllm"
    called = folder.name if vllm else "tensorrt_llm"  # the name in the container's own repository
    mounts = [Mount("model", "/model"), Mount("repository", "/models", _REPOSITORY)]
    env = {"HF_HUB_OFFLINE": "1"}
    if vllm:
        files = {
            f"repository/{folder.name}/config.pbtxt": _CONFIG,
            f"repository/{folder.name}/1/model.json": json.dumps(_engine(target, folder.kv_cache), indent=2) + "\n",
        }
    else:
        settings = llm_arguments(target, "/model")
        settings["triton_config"] = {"max_batch_size": 0, "decoupled": False}
        files = {"repository/model.yaml": yaml.safe_dump(settings, sort_keys=False)}
        env["LLM_CONFIG_PATH"] = "/models/model.yaml"
    repository = _REPOSITORY if vllm else "/app/all_models/llmapi"
    start: tuple[str, ...] = ("tritonserver",)
    if target.frontend == "openai":
        start, health, probe = ("python3", _FRONTEND), "/health/ready", completion(folder, target.port)
        arguments = ["--model-repository", repository, "--tokenizer", MODEL, "--host", HOST, "--openai-port", PORT]
    else:
        health = _HEALTH
        arguments = [f"--model-repository={repository}", f"--http-address={HOST}", f"--http-port={PORT}"]
        arguments += ["--allow-grpc=false", "--allow-metrics=false"]  # only the HTTP port is published
        asked = {"parameters": {"stream": False, "max_tokens": 16}} if vllm else {"max_tokens": 16}
        body = json.dumps({"text_input": "The sea is"} | asked)
        probe = f"curl -fsS http://127.0.0.1:{target.port}/v2/models/{called}/generate -d '{body}'"
    return Deployment(
        name=folder.name,
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
        resources=folder.resources,
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


SERVER = Server(name="triton", settings=Triton, deploy=deploy, variants=(Triton(), Triton(backend="tensorrt-llm")))
