"""The transformers config that the metadata of a GGUF file describe: one row of settings an architecture."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..core.errors import BadInput


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is read: the transformers model type, and the config's settings from the metadata.

    What was done to its tensors is in architectures.py, by model type. experts: the model type of a file with experts.
    """

    model_type: str
    settings: Callable[["Metadata"], dict[str, Any]]
    experts: str | None = None


class Metadata(Mapping[str, Any]):
    """The key-value part of a GGUF file as plain values; `hparam` looks under the architecture's own prefix."""

    def __init__(self, reader: gguf.GGUFReader, path: Path):
        self.path = path
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = str(self.get("general.architecture", "unknown"))

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        value = field.contents()
        if field.types[0] == gguf.GGUFValueType.FLOAT32:
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def hparam(self, key: str, default: Any = None) -> Any:
        """`<architecture>.<key>`; BadInput when absent without a default, or different from layer to layer."""
        name = f"{self.architecture}.{key}"
        value = self.get(name, default)
        if value is None:
            raise BadInput(f"{self.path}: the GGUF metadata lacks {name}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise BadInput(f"{self.path}: {name} differs from layer to layer, which is not supported")
            value = value[0]
        return value

    @property
    def experts(self) -> int:
        """How many experts a block has, 0 when it is dense."""
        return int(self.get(f"{self.architecture}.expert_count", 0))

    @property
    def vocab_size(self) -> int:
        return int(self.shape("token_embd.weight")[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in torch's order, [out, in] for a linear."""
        if name not in self.tensors:
            raise BadInput(f"{self.path}: the GGUF file has no tensor {name}")
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors are stored identically."""
        x, y = self.tensors[a], self.tensors[b]
        return bool(x.tensor_type == y.tensor_type and np.array_equal(x.data, y.data))


def _rope(meta: Metadata, head_dim: int, context: int, partial: bool = False) -> dict[str, Any]:
    """rope_parameters of transformers; a scaling that cannot be told exactly from the file is refused."""
    rotary = int(meta.hparam("rope.dimension_count", head_dim))
    if rotary != head_dim and not partial:
        raise BadInput(f"{meta.path}: partial rotary embedding ({rotary} of {head_dim}) is not supported")
    base: dict[str, Any] = {"rope_theta": float(meta.hparam("rope.freq_base", 10000.0))}
    if partial:
        base["partial_rotary_factor"] = rotary / head_dim
    kind = meta.hparam("rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.tensors:
        return base | _llama3_scaling(meta, base["rope_theta"], head_dim)
    if "rope_factors_long.weight" in meta.tensors:
        return base | _longrope(meta, context)
    if meta.hparam("rope.scale_linear", 1.0) != 1.0:
        raise BadInput(f"{meta.path}: an old file with rope.scale_linear; convert the original checkpoint again")
    if kind == "none":
        return {"rope_type": "default"} | base
    if kind not in ("linear", "yarn"):
        raise BadInput(f"{meta.path}: RoPE scaling {kind!r} is not supported; linear, yarn, llama3 and longrope are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(meta.hparam("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = int(meta.hparam("rope.scaling.original_context_length", context))
        for name in ("beta_fast", "beta_slow"):
            if (value := meta.get(f"{meta.architecture}.rope.scaling.yarn_{name}")) is not None:
                scaling[name] = float(value)
        if (value := meta.get(f"{meta.architecture}.rope.scaling.attn_factor")) is not None:
            scaling["attention_factor"] = float(value) * (1 + 0.1 * math.log(scaling["factor"]))
    return base | scaling


def _longrope(meta: Metadata, context: int) -> dict[str, Any]:
    factors = {n: meta.tensors[f"rope_factors_{n}.weight"].data.astype(np.float64).tolist() for n in ("long", "short")}
    original = int(meta.hparam("rope.scaling.original_context_length"))
    return {
        "rope_type": "longrope",
        "long_factor": factors["long"],
        "short_factor": factors["short"],
        "original_max_position_embeddings": original,
        "factor": context / original,
        "attention_factor": float(meta.hparam("rope.scaling.attn_factor", 1.0)),
    }


def _llama3_scaling(meta: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 rule that gives the file's divisors of each frequency: only they are stored, not the rule."""
    divisors = torch.from_numpy(np.array(meta.tensors["rope_freqs.weight"].data, dtype=np.float32))
    factor = round(float(divisors.max()), 3)
    low, high, original = 1.0, 4.0, 8192  # the same in Llama 3.1, 3.2 and 3.3
    wavelength = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-3):
        raise BadInput(f"{meta.path}: rope_freqs.weight does not follow the llama3 RoPE scaling rule")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _sizes(meta: Metadata) -> dict[str, Any]:
    """Sizes that every model but GPT-2 calls by these names."""
    return {
        "hidden_size": int(meta.hparam("embedding_length")),
        "intermediate_size": int(meta.hparam("feed_forward_length")),
        "num_hidden_layers": int(meta.hparam("block_count")),
        "num_attention_heads": int(meta.hparam("attention.head_count")),
        "max_position_embeddings": int(meta.hparam("context_length")),
    }


def _llama_like(meta: Metadata, partial: bool = False) -> dict[str, Any]:
    """Settings that llama, qwen, gemma and phi share."""
    sizes = _sizes(meta)
    heads, context = sizes["num_attention_heads"], sizes["max_position_embeddings"]
    head_dim = int(meta.hparam("attention.key_length", sizes["hidden_size"] // heads))
    return sizes | {
        "num_key_value_heads": int(meta.hparam("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(meta.hparam("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(meta, head_dim, context, partial),
    }


def _llama(meta: Metadata) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    return (
        _llama_like(meta)
        | {key: name in meta.tensors for key, name in biases.items()}
        | {key: int(meta.hparam(name)) for key, name in experts.items() if meta.experts}
    )


def _qwen_moe(meta: Metadata) -> dict[str, Any]:
    shared = meta.get(f"{meta.architecture}.expert_shared_feed_forward_length")
    return (
        _llama_like(meta)
        | {"num_experts": meta.experts, "num_experts_per_tok": int(meta.hparam("expert_used_count"))}
        | {"moe_intermediate_size": int(meta.hparam("expert_feed_forward_length"))}
        | {"norm_topk_prob": meta.architecture == "qwen3moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
        | ({} if shared is None else {"shared_expert_intermediate_size": int(shared)})
    )


def _gemma(meta: Metadata) -> dict[str, Any]:
    """Gemma 2 and 3, with what llama.cpp takes for granted where the file does not say."""
    second = meta.architecture == "gemma2"
    settings, blocks = _llama_like(meta), int(meta.hparam("block_count"))
    every = 2 if second else 6
    pattern = meta.get(
        f"{meta.architecture}.attention.sliding_window_pattern", [(i + 1) % every != 0 for i in range(blocks)]
    )
    settings |= {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "sliding_window": int(meta.hparam("attention.sliding_window", 4096)),
        "query_pre_attn_scalar": settings["head_dim"],
    }
    if blocks == (46 if second else 62):  # the 27B models
        settings["query_pre_attn_scalar"] = settings["hidden_size"] // settings["num_attention_heads"]
    final = meta.get(f"{meta.architecture}.final_logit_softcapping", 30.0 if second else None)
    settings["final_logit_softcapping"] = final
    if second:
        return settings | {"attn_logit_softcapping": float(meta.hparam("attn_logit_softcapping", 50.0))}
    local = {"rope_type": "default", "rope_theta": float(meta.hparam("rope.freq_base_swa", 10000.0))}
    settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    return settings


def _phi3(meta: Metadata) -> dict[str, Any]:
    settings = _llama_like(meta, partial=True)
    original = int(meta.hparam("rope.scaling.original_context_length", settings["max_position_embeddings"]))
    window = int(meta.hparam("attention.sliding_window", 0)) or None
    return settings | {"original_max_position_embeddings": original, "sliding_window": window}


def _gpt_neox(meta: Metadata) -> dict[str, Any]:
    sizes = _sizes(meta)
    head_dim, context = sizes["hidden_size"] // sizes["num_attention_heads"], sizes["max_position_embeddings"]
    return sizes | {
        "layer_norm_eps": float(meta.hparam("attention.layer_norm_epsilon")),
        "use_parallel_residual": bool(meta.hparam("use_parallel_residual", True)),
        "rope_parameters": _rope(meta, head_dim, context, partial=True),
    }


def _gpt2(meta: Metadata) -> dict[str, Any]:
    return {
        "n_embd": int(meta.hparam("embedding_length")),
        "n_inner": int(meta.hparam("feed_forward_length")),
        "n_layer": int(meta.hparam("block_count")),
        "n_head": int(meta.hparam("attention.head_count")),
        "n_positions": int(meta.hparam("context_length")),
        "layer_norm_epsilon": float(meta.hparam("attention.layer_norm_epsilon")),
    }


ARCHITECTURES = {  # the key is GGUF's general.architecture; Mistral files say "llama"
    "llama": Architecture("llama", _llama, experts="mixtral"),
    "qwen2": Architecture("qwen2", _llama_like),
    "qwen3": Architecture("qwen3", _llama_like),
    "qwen2moe": Architecture("qwen2_moe", _qwen_moe, experts="qwen2_moe"),
    "qwen3moe": Architecture("qwen3_moe", _qwen_moe, experts="qwen3_moe"),
    "gemma2": Architecture("gemma2", _gemma),
    "gemma3": Architecture("gemma3_text", _gemma),
    "phi3": Architecture("phi3", _phi3),
    "gptneox": Architecture("gpt_neox", _gpt_neox),
    "gpt2": Architecture("gpt2", _gpt2),
}


def model_config(meta: Metadata) -> Any:
    """The transformers config the file describes; raises BadInput for an architecture without a row."""
    from transformers import AutoConfig

    row = ARCHITECTURES.get(meta.architecture)
    if row is None:
        raise BadInput(
            f"{meta.path}: GGUF architecture {meta.architecture!r} is not supported ({', '.join(ARCHITECTURES)} are); "
            "use the original checkpoint"
        )
    if meta.experts and row.experts is None:
        raise BadInput(
            f"{meta.path}: a mixture-of-experts file of {meta.architecture!r}, which transformers has not got"
        )
    untied = "output.weight" in meta.tensors and not meta.same_bytes("output.weight", "token_embd.weight")
    tokens = {
        f"{name}_token_id": int(meta[key])
        for name, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in meta
    }
    return AutoConfig.for_model(
        (row.experts if meta.experts else None) or row.model_type,
        **row.settings(meta),
        vocab_size=meta.vocab_size,
        tie_word_embeddings=not untied,
        dtype="bfloat16",
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | tokens,
    )
