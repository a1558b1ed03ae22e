"""Memory and cost: the key-value cache, how many sequences fit a GPU beside the weights, what a token costs."""

from collections.abc import Sequence
from typing import Any

from quantpress.recipe import GPUS

from .sections import Cost, Fit, KvCache, Runtime

_MIB = 1 << 20
_USED = 0.9  # share of a GPU's memory that a server takes (vLLM's default gpu_memory_utilization)
_RESERVED = 1 << 30  # bytes for the runtime itself and for activations
_FULL, _WINDOWED, _NONE = "full", "windowed", "none"


def cache(config: Any, kv_cache: str | None, dtype: str, context: int) -> KvCache:
    """The key-value cache of one sequence of `context` tokens, from a transformers config.

    A layer caches keys and values of its key-value heads (fewer than its query heads with GQA); with latent attention
    (DeepSeek) one latent vector and the rotary part of the keys instead. Layers with a sliding window cache at most
    that many tokens; linear-attention layers keep a state of constant size, which is not counted.
    kv_cache: fp8 or int8 where the artifact says so; otherwise the cache is in `dtype`.
    """
    name, size = (kv_cache, 1) if kv_cache else (dtype, {"float32": 4}.get(dtype, 2))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * heads * width
    if getattr(config, "kv_lora_rank", None):
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    kinds = _kinds(config)
    window = getattr(config, "sliding_window", None) if _WINDOWED in kinds else None
    full, windowed = kinds.count(_FULL) * numbers * size, kinds.count(_WINDOWED) * numbers * size
    return KvCache(
        dtype=name,
        bytes_per_token=full + windowed,
        bytes_per_token_past_window=full if window else None,
        sliding_window=window,
        context=context,
        bytes_at_context=full * context + windowed * min(context, window or context),
    )


def _kinds(config: Any) -> list[str]:
    """For each layer: whether its cache grows with the text, up to a window, or not at all."""
    layers = getattr(config, "layer_types", None)
    if layers:
        named = {"full_attention": _FULL, "sliding_attention": _WINDOWED, "chunked_attention": _WINDOWED}
        return [named.get(kind, _NONE) for kind in layers]
    windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    return [_WINDOWED if windowed else _FULL] * config.num_hidden_layers


def fits(names: Sequence[str], weight_bytes: int, held: KvCache) -> tuple[Fit, ...]:
    """How many sequences of the cache's context fit beside the weights on each GPU:

    (0.9 x memory - weights - 1 GiB) / cache bytes per sequence, rounded down.
    """
    out = []
    for name in names:
        memory = GPUS[name] * _MIB
        room = int(memory * _USED) - weight_bytes - _RESERVED
        count = max(0, room // max(1, held.bytes_at_context))
        out.append(Fit(gpu=name, memory_bytes=memory, context=held.context, concurrency=count))
    return tuple(out)


def cost(per_hour: float, runtime: Runtime) -> Cost | None:
    """Price of a million tokens at the highest measured rates: price per hour / 3600 / tokens per second x 1e6."""
    if not runtime.speed:
        return None
    decode = max(speed.decode_tokens_per_second for speed in runtime.speed)
    prefill = max(speed.prefill_tokens_per_second for speed in runtime.speed)
    decoded, prefilled = (per_hour / 3600 / rate * 1e6 for rate in (decode, prefill))
    formula = (
        f"{per_hour:g} an hour / 3600 s / {decode:.4g} tokens/s x 1,000,000 = {decoded:.4g} per million decoded tokens"
    )
    return Cost(per_hour=per_hour, per_million_decoded=decoded, per_million_prefilled=prefilled, formula=formula)
