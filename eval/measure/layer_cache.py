"""What each layer of a model keeps of a sequence while it is served, from a transformers config."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantpress.core.latent_attention import latent_numbers

_WINDOWED = ("sliding_attention", "hybrid_sliding", "reference_sliding_attention")
_COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")  # DeepSeek-V4
_INDEXED = ("indexed_attention", "deepseek_sparse_attention")  # the latter before transformers 5.24
_RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")
_WITHOUT = ("moe", "mlp")
_BESIDE_ATTENTION = ("hybrid", "hybrid_sliding")  # both attention and a state


@dataclass(frozen=True)
class LayerCache:
    """Of one layer. numbers: of each token, of the last `window` ones if there is a window; every: of each token
    besides, whatever the window (a fraction where tokens are kept together); state: numbers of a sequence, whatever its
    length, in float32; convolved: the same, in the model's type."""

    numbers: int = 0
    window: int | None = None
    every: float = 0.0
    state: int = 0
    convolved: int = 0


def layer_caches(config: Any) -> Iterator[LayerCache]:
    """Of every layer, in order. A layer of unknown type is taken to keep all tokens."""
    layers = list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or [_kind(one) for one in layers]
    shared = getattr(config, "num_kv_shared_layers", None) or 0  # before transformers 5.24: the last so many
    sharing = getattr(config, "kv_sharing_modes", None) or [None] * (len(kinds) - shared) + ["reuse"] * shared
    indexers = getattr(config, "indexer_types", None) or ["full"] * len(kinds)
    for kind, keys, indexer, one in zip(kinds, sharing, indexers, layers, strict=True):
        if kind in _WITHOUT or keys == "reuse":
            yield LayerCache()
        elif kind in _COMPRESSED:
            yield _compressed(one, kind)
        elif kind in _RECURRENT:
            yield LayerCache(**_state(one))
        else:
            state = _state(one) if kind in _BESIDE_ATTENTION else {}
            index = _index(one) if kind in _INDEXED and indexer == "full" else 0
            yield LayerCache(_attended(one, kind), _window(one, kind), index, **state)


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _first(config: Any, *names: str) -> int:
    """The value of the first of these names that the config has."""
    return int(next(getattr(config, name) for name in names if _has(config, name)))


def _kind(config: Any) -> str:
    """Of a layer in a config that names no types."""
    if not _has(config, "num_attention_heads"):
        return "linear_attention"
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _window(config: Any, kind: str) -> int | None:
    name = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window" if kind in _WINDOWED else ""
    return int(getattr(config, name)) if name and _has(config, name) else None


def _index(config: Any) -> int:
    """Numbers of one token's key by which tokens are chosen (DeepSeek-V3.2, GLM-5)."""
    if _has(config, "indexer_head_dim"):
        return int(config.indexer_kv_heads * config.indexer_head_dim)
    return int(getattr(config, "index_head_dim", None) or 0)


def _attended(config: Any, kind: str) -> int:
    """Numbers of one token: keys and values of key-value heads, or what latent attention keeps instead."""
    if (latent := latent_numbers(lambda name: getattr(config, name, None))) is not None:
        return latent
    heads = config.num_attention_heads
    if config.model_type == "falcon":  # its heads are named otherwise
        several = config.num_kv_heads if config.new_decoder_architecture else heads
        kv_heads = 1 if config.multi_query and not config.new_decoder_architecture else several
    else:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "mimo_v2_flash" and kind in _WINDOWED:
        kv_heads *= 2
    width = next((getattr(config, name) for name in ("attention_head_dim", "head_dim") if _has(config, name)), None)
    width = width or config.hidden_size // heads
    return int(kv_heads * (width + (getattr(config, "v_head_dim", None) or width)))


def _compressed(config: Any, kind: str) -> LayerCache:
    """Keys that are values, too, of one head: of the last tokens, and of as many together as the rate says; beside
    those of the smaller rate stand the keys of their index."""
    index = config.index_head_dim if kind == _COMPRESSED[0] else 0
    every = (config.head_dim + index) / config.compress_rates[kind]
    return LayerCache(config.head_dim, config.sliding_window, every)


def _state(config: Any) -> dict[str, int]:
    """`state` and `convolved` of a layer."""
    recurrent, convolved = _recurrent(config)
    return {"state": recurrent, "convolved": convolved}


def _recurrent(config: Any) -> tuple[int, int]:
    """Numbers of a layer's recurrent state and of its convolution's, by the names that transformers has for them."""
    if _has(config, "linear_num_value_heads"):  # gated delta rule: Qwen3-Next and later
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return values * config.linear_key_head_dim, (2 * keys + values) * config.linear_conv_kernel_dim
    if _has(config, "linear_num_heads"):  # Kimi
        rows = config.linear_num_heads * config.linear_head_dim
        return rows * config.linear_head_dim, 3 * rows * config.linear_conv_kernel_dim
    if _has(config, "conv_L_cache"):  # LFM2
        return 0, config.hidden_size * config.conv_L_cache
    if _has(config, "lru_width"):  # RecurrentGemma
        return config.lru_width, config.lru_width * (config.conv1d_width - 1)
    if _has(config, "mamba_d_state") or _has(config, "ssm_state_size") or _has(config, "state_size"):
        return _state_space(config)
    if config.model_type == "minimax":  # lightning attention
        return config.num_attention_heads * config.head_dim**2, 0
    return 0, 0


def _state_space(config: Any) -> tuple[int, int]:
    """Of Mamba 2, where there are heads, or Mamba."""
    size = _first(config, "mamba_d_state", "ssm_state_size", "state_size")
    kernel = _first(config, "mamba_d_conv", "conv_kernel")
    if any(_has(config, name) for name in ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "n_groups")):
        heads = _first(config, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
        inner = heads * _first(config, "mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
        groups = _first(config, "mamba_n_groups", "mamba_ngroups", "n_groups")
        return inner * size, (inner + 2 * groups * size) * kernel
    inner = _first(config, "mamba_expand", "expand") * config.hidden_size
    return inner * size, inner * kernel
