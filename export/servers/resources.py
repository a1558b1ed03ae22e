"""The memory that serving a model takes, estimated from its config and its files."""

import math
from dataclasses import asdict, dataclass

from quantpress.core.latent_attention import latent_numbers

from .served_model import ServedModel
from .target_settings import Drafting, ServerSettings

SHARED_BYTES = 2 * 2**30  # of /dev/shm, which counts as a container's memory
_HOST_BYTES = 8 * 2**30  # of host memory for a GPU server's processes, beside the weights; assumed, not measured
# Kept free beside weights and cache for activations, the CUDA context, captured graphs. Assumed, not measured.
_RUNTIME_BYTES = 2_000_000_000
_TYPICAL_TOKENS = 4096  # of a sequence whose length nobody limits


@dataclass(frozen=True)
class Resources:
    """Memory that serving takes. All but the weights are estimates from the config.

    kv_bytes_per_token: keys and values of one token over all layers; tokens: the cache's size, over all requests;
    memory_bytes: weights, cache and `runtime_bytes`, over all GPUs; per_gpu_bytes: the share of one GPU.
    """

    weights_bytes: int
    kv_bytes_per_token: int
    tokens: int
    runtime_bytes: int
    gpus: int

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes_per_token * self.tokens + self.runtime_bytes * self.gpus

    @property
    def per_gpu_bytes(self) -> int:
        return math.ceil(self.memory_bytes / self.gpus)

    def host_bytes(self, *, cuda: bool) -> tuple[int, int]:
        """Host memory that a container asks for, and its limit: room for the weights once more, which a server that
        copies them as it loads has twice, and for /dev/shm."""
        asked = self.weights_bytes + _HOST_BYTES if cuda else self.memory_bytes
        return asked, asked + self.weights_bytes + SHARED_BYTES

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"memory_bytes": self.memory_bytes, "per_gpu_bytes": self.per_gpu_bytes}


def kv_bytes_per_token(model: ServedModel, cache_bytes: int) -> int:
    """Bytes of one token's keys and values, or of what latent attention keeps instead, `cache_bytes` a number; an upper
    bound for sliding-window layers."""
    layers = model.of_config("num_hidden_layers", "n_layer") or 0
    if (latent := latent_numbers(model.of_config)) is not None:
        return layers * latent * cache_bytes
    return 2 * layers * (model.kv_heads or 1) * model.head_size * cache_bytes


def of_target(target: ServerSettings, model: ServedModel, weights_bytes: int) -> Resources:
    """For as many concurrent requests as the target allows, each as long as it allows."""
    asked_for_fp8 = isinstance(target, Drafting) and target.kv_cache_dtype == "fp8"
    longest = target.max_model_len or min(model.positions or _TYPICAL_TOKENS, _TYPICAL_TOKENS)
    return Resources(
        weights_bytes,
        kv_bytes_per_token(model, 1 if model.kv_cache is not None or asked_for_fp8 else 2),
        longest * target.max_num_seqs,
        _RUNTIME_BYTES,
        target.gpus,
    )


def gibibytes(n: int) -> int:
    """Whole GiB that hold `n` bytes."""
    return math.ceil(n / 2**30)


def quantity(n: int) -> str:
    """Bytes as Kubernetes writes them."""
    return f"{gibibytes(n)}Gi"
