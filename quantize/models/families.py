"""The model families, one row each.

A decoder stack whose blocks are one ModuleList of `num_hidden_layers` entries can be quantized without a row. Needed is
one for the transforms, which scale or rotate the output of a module and undo it in the linears that read it, and for
GGUF.
"""

from dataclasses import replace

from .family import Family, Feed
from .gguf_forms import FORMS

_SANDWICH = "norms after attention and MLP scale, channel by channel, what is added to the residual stream"
TOWERS = "what their towers add to the residual stream would not be rotated"
_LAYER_NORM = "LayerNorm subtracts the mean over channels, which a rotation does not keep"

# ---- what feeds what ---------------------------------------------------------------------------------------------

_ATTENTION = (
    Feed("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Feed("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
)
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = Feed("mlp.up_proj", ("mlp.down_proj",))
_LLAMA_FEEDS = (*_ATTENTION, Feed("post_attention_layernorm", _MLP), _DOWN)
_PHI3_FEEDS = (
    Feed("input_layernorm", ("self_attn.qkv_proj",)),
    Feed("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True, last=True),
    Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Feed("mlp.gate_up_proj", ("mlp.down_proj",), last=True),
)
_GEMMA_FEEDS = tuple(replace(feed, plus_one=feed.source.endswith("layernorm")) for feed in _LLAMA_FEEDS)
_SANDWICH_FEEDS = tuple(
    replace(feed, source="pre_feedforward_layernorm") if feed.source == "post_attention_layernorm" else feed
    for feed in _GEMMA_FEEDS
)
# Norms after attention and MLP alone, none before: only what lies between two linears can be scaled.
_OLMO_FEEDS = (_ATTENTION[1], _DOWN)
_GLM_FEEDS = (
    *_ATTENTION,
    Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Feed("mlp.gate_up_proj", ("mlp.down_proj",), last=True),
)
_QWEN_MOE_FEEDS = (
    *_ATTENTION,
    Feed(
        "post_attention_layernorm",
        (
            "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj",
            "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", *_MLP,
        ),
    ),
    Feed("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    Feed("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    _DOWN,
)  # fmt: skip
_MIXTRAL_FEEDS = (
    *_ATTENTION,
    Feed("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
    Feed("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
)
# GPT-NeoX fuses q, k and v head by head, so that the values are not the last rows. Here and in GPT-2 a GELU comes
# before the second linear of the feed-forward: no scale can be moved through it.
_GPT_NEOX_FEEDS = (
    Feed("input_layernorm", ("attention.query_key_value",)),
    Feed("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
_GPT2_FEEDS = (
    Feed("ln_1", ("attn.c_attn",)),
    Feed("attn.c_attn", ("attn.c_proj",), heads=True, last=True),
    Feed("ln_2", ("mlp.c_fc",)),
)

# ---- the table ---------------------------------------------------------------------------------------------------

_LLAMA = Family(feeds=_LLAMA_FEEDS, no_hadamard=None)
_QWEN_VL = Family(feeds=_LLAMA_FEEDS, no_hadamard=TOWERS)
_QWEN_MOE = Family(feeds=_QWEN_MOE_FEEDS, no_hadamard=None)
_SANDWICHED = Family(feeds=_SANDWICH_FEEDS, no_hadamard=_SANDWICH)

_FED = {  # what feeds what, by the model_type of config.json
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(feeds=_MIXTRAL_FEEDS, no_hadamard=None),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen2_moe": _QWEN_MOE,
    "qwen3_moe": _QWEN_MOE,
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": _QWEN_VL,
    **dict.fromkeys(("qwen3_vl_moe_text", "qwen3_omni_moe_text"), Family(feeds=_QWEN_MOE_FEEDS, no_hadamard=TOWERS)),
    "gemma": Family(feeds=_GEMMA_FEEDS, no_hadamard=None),
    "gemma2": _SANDWICHED,
    "gemma3_text": _SANDWICHED,
    "phi3": Family(feeds=_PHI3_FEEDS, no_hadamard=None),
    "gpt2": Family(feeds=_GPT2_FEEDS, no_hadamard=_LAYER_NORM),
    "gpt_neox": Family(feeds=_GPT_NEOX_FEEDS, no_hadamard=_LAYER_NORM),
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "seed_oss": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "ernie4_5": _LLAMA,
    "olmo2": Family(feeds=_OLMO_FEEDS, no_hadamard=_SANDWICH),
    "olmo3": Family(feeds=_OLMO_FEEDS, no_hadamard=_SANDWICH),
    "glm": Family(feeds=_GLM_FEEDS, no_hadamard=None),
    "glm4": Family(feeds=_GLM_FEEDS, no_hadamard=_SANDWICH),
}
UNLISTED = Family()
# A GGUF file is read as the first row it fits.
FAMILIES = {name: replace(_FED.get(name, UNLISTED), gguf=FORMS.get(name)) for name in [*FORMS, *_FED]}


def family_of(model_type: str) -> Family:
    """The row of a model type; `UNLISTED`, which says nothing, where there is none."""
    return FAMILIES.get(model_type, UNLISTED)
