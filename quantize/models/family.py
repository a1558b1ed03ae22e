"""What the row of a model family says: what feeds what in its blocks, how GGUF files hold it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

NOT_DESCRIBED = "where its blocks meet the residual stream is not described"
TensorChange = Literal[  # done by gguf/tensor_map.py
    "query", "key", "plus_one", "transposed", "by_head", "squeezed", "negative_exp", "key_b", "value_b",
    "queries_keys_values", "gates", "value_rows", "value_tail", "value_columns",
]  # fmt: skip

# Config fields and the GGUF keys, without the architecture's prefix, that hold them.
LLAMA_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


class GgufMetadata(Protocol):
    """The key-value part of a GGUF file, by keys without the architecture's prefix."""

    def hparam(self, key: str, default: Any = None) -> Any:
        """One value for all layers. Raises BadInput when it is absent and has no default, or differs by layer."""

    def optional(self, key: str, default: Any) -> Any:
        """The value as it is stored, a list where layers differ, or `default`, which may be None."""


def setting(config: Any, name: str) -> Any:
    """A field of a config, None where it has none; the usual value of one that differs by layer."""
    written = config.to_dict()
    return written[name] if name in written else getattr(config, name, None)


@dataclass(frozen=True)
class Feed:
    """The output channels of module `source` are the input channels of the modules `into`, and nothing else reads them.

    Names are those of modules inside a block. `*` in `into` stands for every expert; where `source` has one too, for
    the expert at hand. The first of `into` sees every token that the others see. Modules that a block does not have
    are skipped: some families mix dense and sparse blocks. plus_one: `source` is a norm that multiplies by 1 + weight.
    heads: `source` makes the attention values, each key-value head of which is read by a group of query heads. last:
    `source` is several projections fused, and only its last rows are read.
    """

    source: str
    into: tuple[str, ...]
    plus_one: bool = False
    heads: bool = False
    last: bool = False


@dataclass(frozen=True)
class GgufForm:
    """How GGUF files hold a family, and what llama.cpp assumes of it; a checkpoint that is otherwise is refused.

    Sources: llama.cpp's converter (its conversion/ folder, as vendored by llama-cpp-python 0.3.36) and the loaders
    under its src/models/.

    architecture: general.architecture in the file. changes: (end of a parameter's name, how its tensor changes), the
    first that fits counts. named: parameters, by the end of their name, for which the `gguf` package's map has no name
    or another one: the tensors of the block that they go into, and how they change. acts: activation functions that
    llama.cpp has for the family. fixed: config fields for which llama.cpp has one value only,
    whatever the file says. untied: the head is written even when it is tied to the embedding. sliding_window: whether
    llama.cpp applies the family's sliding window. rope: how much of a head the rotary embedding may cover.

    How config fields and the file's metadata give each other: sizes, counts and scales (config field -> GGUF key;
    `counts` are written as they are, `scales` as floats, `sizes` by rules common to all families), switches (config
    field -> the tensor that is in the file when it is true) and, for the rest, two functions: `metadata` of a config,
    which raises BadInput for a model that no file can hold, and config `settings` of metadata and the settings read so
    far. reads_back: False where metadata does not give the config, so that a file of the family is no source of a
    checkpoint. mscale: what YaRN's mscale_all_dim is multiplied with in the file; None for a family without one.
    truncates: a model with YaRN bounds that are not whole (truncate: false) is written although llama.cpp rounds them,
    as all published files of it are. caveats: what llama.cpp computes otherwise, a line each.
    """

    architecture: str
    changes: tuple[tuple[str, tuple[TensorChange, ...]], ...] = ()
    acts: tuple[str, ...] = ("silu",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    untied: bool = False
    sliding_window: bool = False
    rope: Literal["whole", "partial", "none"] = "whole"
    sizes: Mapping[str, str] = field(default_factory=lambda: LLAMA_SIZES)
    counts: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, tuple[tuple[str, tuple[TensorChange, ...]], ...]] = field(default_factory=dict)
    metadata: Callable[[Any], dict[str, Any]] = lambda config: {}
    settings: Callable[[GgufMetadata, Mapping[str, Any]], dict[str, Any]] = lambda meta, settings: {}
    reads_back: bool = True
    mscale: float | None = None
    truncates: bool = False
    caveats: Callable[[Any], list[str]] = lambda config: []


@dataclass(frozen=True)
class Family:
    """What the transformers class of a model type does not say about its blocks; every part may be left out.

    feeds: in the order they are reached; awq, smoothquant and hadamard need them. no_hadamard: why rotating a model of
    this family is not exact; None when it is. It is exact where the only readers of the residual stream are RMSNorms,
    each the source of a feed, and the only writers are the linears that `feeds` ends in.

    gguf: None for a family that cannot be written as GGUF, nor read from it.
    """

    feeds: tuple[Feed, ...] = ()
    no_hadamard: str | None = NOT_DESCRIBED
    gguf: GgufForm | None = None
