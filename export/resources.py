"""What a model needs of a machine that serves it, from its config and its files."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from quantpress.recipe import Target

from .contracts import Contents

# Held back beside weights and cache: activations, the CUDA context, captured graphs. An assumption, not a measurement.
_RUNTIME_BYTES = 2_000_000_000
_TYPICAL_TOKENS = 4096  # of a sequence, where nobody said how long it may be


@dataclass(frozen=True)
class Resources:
    """Bytes that serving takes. All but the weights are estimates from the config.

    kv_bytes_per_token: keys and values of all layers, of one token; tokens: that the cache is reckoned for, over all
    requests; memory_bytes: weights, that cache and `runtime_bytes`, over all GPUs; per_gpu_bytes: of one of them.
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

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"memory_bytes": self.memory_bytes, "per_gpu_bytes": self.per_gpu_bytes}


def kv_bytes_per_token(contents: Contents, cache_bytes: int) -> int:
    """Keys and values of one token, `cache_bytes` each; an upper bound where layers see a sliding window."""
    layers = contents.of_config("num_hidden_layers", "n_layer") or 0
    hidden, heads = contents.of_config("hidden_size", "n_embd") or 0, contents.heads or 1
    head_size = contents.of_config("head_dim") or hidden // heads
    return 2 * layers * (contents.kv_heads or heads) * head_size * cache_bytes


def of_contents(target: Target, contents: Contents, weights_bytes: int) -> Resources:
    """For as many requests at one time as the target allows, each of the length it allows."""
    eight_bits = contents.kv_cache is not None or getattr(target, "kv_cache_dtype", "auto") == "fp8"
    longest = target.max_model_len or min(contents.positions or _TYPICAL_TOKENS, _TYPICAL_TOKENS)
    return Resources(
        weights_bytes,
        kv_bytes_per_token(contents, 1 if eight_bits else 2),
        longest * target.max_num_seqs,
        _RUNTIME_BYTES,
        getattr(target, "tensor_parallel", 1),
    )


def gibibytes(n: int) -> int:
    """Whole GiB that hold `n` bytes."""
    return math.ceil(n / 2**30)


def quantity(n: int) -> str:
    """Bytes as Kubernetes writes them."""
    return f"{gibibytes(n)}Gi"


def words(resources: Resources) -> list[tuple[str, Any]]:
    """The figures with their names, for a page."""
    from quantpress.engine.plan import size

    return [
        ("weights", size(resources.weights_bytes)),
        ("cache of one token", size(resources.kv_bytes_per_token)),
        (f"cache of {resources.tokens} tokens", size(resources.kv_bytes_per_token * resources.tokens)),
        (f"held back on each of {resources.gpus} device(s) (assumed)", size(resources.runtime_bytes)),
        ("together, at the most", size(resources.memory_bytes)),
    ]
