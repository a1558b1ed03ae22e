"""Memory and cost: the key-value cache, how many sequences fit a GPU beside the weights, what a token costs."""

import math
from collections.abc import Sequence
from typing import Any

from quantpress.recipe import GPUS

from .layer_cache import layer_caches
from .sections import Cost, Fit, KvCache, Runtime

_MIB = 1 << 20
_USED = 0.9  # share of a GPU's memory that a server takes (vLLM's default gpu_memory_utilization)
_RESERVED = 1 << 30  # bytes for the runtime itself and for activations


def cache(config: Any, kv_cache: str | None, dtype: str, context: int) -> KvCache:
    """The key-value cache of one sequence of `context` tokens, from a transformers config.

    A layer caches keys and values of its key-value heads (fewer than its query heads with GQA); with latent attention
    (DeepSeek) one latent vector and the rotary part of the keys instead. Layers with a sliding window cache at most
    that many tokens; recurrent ones keep a state of constant size, which is counted in float32 (vLLM may keep it in 16
    bit), and that of their convolution in `dtype`.
    kv_cache: fp8 or int8 where the artifact says so; otherwise the cache is in `dtype`.
    """
    plain = {"float32": 4}.get(dtype, 2)
    name, size = (kv_cache, 1) if kv_cache else (dtype, plain)
    layers = list(layer_caches(config))
    windows = [one.window for one in layers if one.window and one.numbers]
    full = math.ceil(sum(one.every + (0 if one.window else one.numbers) for one in layers) * size)
    windowed = sum(one.numbers for one in layers if one.window) * size
    state = sum(4 * one.state + plain * one.convolved for one in layers)
    window = max(windows, default=None)
    return KvCache(
        dtype=name,
        bytes_per_token=full + windowed,
        bytes_per_token_past_window=full if window else None,
        sliding_window=window,
        state_bytes=state,
        context=context,
        bytes_at_context=full * context + windowed * min(context, window or context) + state,
    )


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
