"""The hyper-parameters in a GGUF file, from a transformers config, and what such a file cannot express."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..models.families import FAMILIES, family_of
from ..models.family import GgufForm, setting


def form_of(config: Any) -> GgufForm:
    """How GGUF files hold the model of a transformers config; raises BadInput, with the reason, where none can."""
    form = family_of(config.model_type).gguf
    if form is None:
        known = ", ".join(model_type for model_type, family in FAMILIES.items() if family.gguf)
        raise BadInput(
            f"architecture {config.model_type!r} cannot be written as GGUF; {known} can. For "
            "others set gguf.converter to a checkout of llama.cpp, whose converter then makes the unquantized file"
        )
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    act = getattr(config, "activation_function", act)
    if act is not None and act not in form.acts:
        raise BadInput(f"{config.model_type} with activation {act!r}: llama.cpp has {', '.join(form.acts)} for it")
    for key, value in form.fixed.items():
        if getattr(config, key, value) != value:
            raise BadInput(
                f"config.json: {key} is {getattr(config, key)!r} and llama.cpp runs {form.architecture} with "
                f"{value!r}; no GGUF file can hold this model"
            )
    return form


def hyperparameters(config: Any, form: GgufForm) -> dict[str, Any]:
    """The metadata that describes the model, by full keys, RoPE included."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    head_dim = head_dim_of(config)
    values: dict[str, Any] = {
        "vocab_size": int(config.vocab_size),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": hidden,
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(inner),
        "attention.head_count": heads,
        "attention.head_count_kv": int(setting(config, "num_key_value_heads") or heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        values["attention.layer_norm_rms_epsilon"] = float(eps)
    eps = getattr(config, "layer_norm_eps", getattr(config, "layer_norm_epsilon", None))
    if eps is not None:
        values["attention.layer_norm_epsilon"] = float(eps)
    values |= _rope(config, form, head_dim)
    values |= {key: getattr(config, field) for field, key in form.counts.items()}
    values |= {key: float(getattr(config, field)) for field, key in form.scales.items()} | form.metadata(config)
    return {f"{form.architecture}.{key}": value for key, value in values.items() if value is not None}


def head_dim_of(config: Any) -> int:
    """The size of an attention head; the usual one, where layers differ."""
    return int(setting(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def notes(config: Any, form: GgufForm) -> list[str]:
    """What llama.cpp will compute differently for this model, in one line each."""
    return [*form.caveats(config), *_window_note(config, form)]


def _window_note(config: Any, form: GgufForm) -> list[str]:
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if not window or "sliding_attention" not in layers or form.sliding_window:
        return []
    if window >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        return []
    return [
        f"llama.cpp has no sliding window for {form.architecture}: beyond {window} tokens it attends to all of them"
    ]


def _rope(config: Any, form: GgufForm, head_dim: int) -> dict[str, Any]:
    """RoPE's base, dimensions and scaling; raises BadInput for a scaling that GGUF cannot express."""
    if form.rope == "none":
        return {}
    rope = rope_parameters(config)
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    values = {"rope.dimension_count": int(head_dim * partial), "rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.get("factor") or 1.0)}
    match kind:
        case "default" | "llama3" | "proportional":  # the factors of the latter two are a tensor
            return values
        case "linear":
            return values | scaling
        case "yarn":
            return values | scaling | _yarn(rope, form)
        case "longrope":
            return values | {"rope.scaling.type": kind, "rope.scaling.attn_factor": _attention_factor(config, rope)}
    raise BadInput(f"RoPE scaling {kind!r} cannot be written as GGUF; linear, yarn, llama3 and longrope can")


def rope_parameters(config: Any) -> dict[str, Any]:
    """The config's RoPE settings; those of full attention where kinds of layers differ."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _yarn(rope: Mapping[str, Any], form: GgufForm) -> dict[str, Any]:
    """YaRN's other settings; llama.cpp itself scales attention by 1 + 0.1 ln(factor), times attn_factor."""
    whole, mscale = rope.get("mscale_all_dim"), rope.get("mscale")
    if (
        (form.mscale is None and (mscale or whole))
        or mscale != whole
        or not (form.truncates or rope.get("truncate", True))
    ):
        raise BadInput("YaRN with mscale or truncate: false cannot be written as GGUF for this family")
    out: dict[str, Any] = {
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if whole and form.mscale is not None:
        out["rope.scaling.yarn_log_multiplier"] = form.mscale * float(whole)
    if (factor := rope.get("attention_factor")) is not None:
        usual = 1 + 0.1 * math.log(rope["factor"])
        out["rope.scaling.attn_factor"] = float(factor) / usual
    return out


def _attention_factor(config: Any, rope: Mapping[str, Any]) -> float:
    """LongRoPE's attention factor of Phi-3 (arXiv:2402.13753): sqrt(1 + ln(scale) / ln(original context))."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_tensors(config: Any, form: GgufForm) -> dict[str, Tensor]:
    """RoPE tensors by GGUF name: what each frequency is divided by, float32 [rotated dimensions / 2]."""
    if form.rope == "none":
        return {}
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        both = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{n}.weight": torch.tensor(v, dtype=torch.float32) for n, v in both.items()}
    if kind == "proportional":  # Gemma 4: the rest of the head is not rotated
        pairs = form.metadata(config)["rope.dimension_count"] // 2
        rotated = int(pairs * rope["partial_rotary_factor"])
        return {"rope_freqs.weight": torch.tensor([1.0] * rotated + [1e30] * (pairs - rotated))}
    if kind != "llama3":
        return {}
    head_dim = head_dim_of(config)
    original, low, high = (
        float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).to(torch.float32)}
