"""Rows for model families: what the transformers class does not say about a block.

A decoder stack whose blocks are one ModuleList of `num_hidden_layers` entries is quantized without a row. Transforms
need one: they scale what an op puts out and undo it in the linears that take it in, so the row has to name them all.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Feed:
    """`source` puts out, channel by channel, what the modules `into` take in, and nothing else reads it.

    Names are those of modules inside a block. `*` in `into` stands for every expert; where `source` has one too, for
    the expert at hand. The first of `into` sees every token that the others see. Names a block lacks are left out:
    some families mix dense and sparse blocks. plus_one: a norm that multiplies by 1 + weight. heads: the values that
    attention mixes, each key-value head read by a group of query heads. last: only the last rows of the source, which
    is several projections fused.
    """

    source: str
    into: tuple[str, ...]
    plus_one: bool = False
    heads: bool = False
    last: bool = False


@dataclass(frozen=True)
class Architecture:
    """experts: the fused-experts module inside a block, taken apart into linears.

    routers: linears inside a block that decide how much of an expert is taken, and stay in 16 bit in every server.
    expert_names: on-disk names of an expert's gate, up and down projections. on_disk: (module name, on-disk name)
    pieces, replaced in that order where the checkpoint names a module otherwise. feeds: in the order they are reached.
    """

    experts: str | None = None
    routers: tuple[str, ...] = ()
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    on_disk: tuple[tuple[str, str], ...] = ()
    feeds: tuple[Feed, ...] = ()


_ATTENTION = (
    Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Feed("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
)
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_SHARED = ("mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
_EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_DOWN = Feed("mlp.up_proj", ("mlp.down_proj",))
_LLAMA = Architecture(feeds=(*_ATTENTION, Feed("post_attention_layernorm", _MLP), _DOWN))
_GEMMA = Architecture(
    feeds=(
        replace(_ATTENTION[0], plus_one=True),
        _ATTENTION[1],
        Feed("pre_feedforward_layernorm", _MLP, plus_one=True),
        _DOWN,
    )
)
_QWEN_MOE = Architecture(
    experts="mlp.experts",
    routers=("mlp.shared_expert_gate",),
    feeds=(
        *_ATTENTION,
        Feed("post_attention_layernorm", ("mlp.gate", *_SHARED, *_EXPERTS, *_MLP)),
        Feed("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
        Feed("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        _DOWN,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Architecture(
        feeds=(
            Feed("input_layernorm", ("self_attn.qkv_proj",)),
            Feed("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True, last=True),
            Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Feed("mlp.gate_up_proj", ("mlp.down_proj",), last=True),
        )
    ),
    # The fused rows go head by head, (q, k, v) each: the values are not the last ones. A GELU stands before the second
    # linear of the feed-forward, here and in GPT-2: no scale passes it.
    "gpt_neox": Architecture(
        on_disk=(("lm_head.", "embed_out."),),
        feeds=(
            Feed("input_layernorm", ("attention.query_key_value",)),
            Feed("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
    ),
    "gpt2": Architecture(
        feeds=(
            Feed("ln_1", ("attn.c_attn",)),
            Feed("attn.c_attn", ("attn.c_proj",), heads=True, last=True),
            Feed("ln_2", ("mlp.c_fc",)),
        )
    ),
    "qwen2_moe": _QWEN_MOE,
    "qwen3_moe": _QWEN_MOE,
    "mixtral": Architecture(
        experts="mlp.experts",
        expert_names=("w1", "w3", "w2"),
        on_disk=((".mlp.", ".block_sparse_moe."),),
        feeds=(
            *_ATTENTION,
            Feed("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
            Feed("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
        ),
    ),
}
PLAIN = Architecture()
