"""The transformers config that the metadata of a GGUF file describe: by the rows of model families."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..core.errors import BadInput
from ..models.architecture import check_sizes
from ..models.families import FAMILIES
from ..models.family import GgufForm


class Metadata(Mapping[str, Any]):
    """The key-value part of a GGUF file as plain values; `hparam` looks under the architecture's prefix."""

    def __init__(self, reader: gguf.GGUFReader, path: Path):
        self.path = path
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = str(self.get("general.architecture", "unknown"))

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        value = field.contents()
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{self.path}: {key} is {value}")
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

    def optional(self, key: str, default: Any) -> Any:
        """`<architecture>.<key>` as it is stored, a list where layers differ, or `default`."""
        return self.get(f"{self.architecture}.{key}", default)

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
    """transformers' rope_parameters; raises BadInput for a scaling that the file does not determine exactly."""
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
        raise BadInput(
            f"{meta.path}: rope.scale_linear of old files is not supported; convert the original checkpoint again"
        )
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
    """The llama3 scaling that explains the file's frequency divisors: they are stored, its parameters are not."""
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


def model_config(meta: Metadata, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformers config the file describes, for weights of type `dtype`.

    Raises BadInput for an architecture without a row.
    """
    from transformers import AutoConfig

    model_type, form = _family_of(meta)
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
    settings = _settings(meta, form)
    check_sizes(settings, str(meta.path))
    return AutoConfig.for_model(
        model_type,
        **settings,
        vocab_size=meta.vocab_size,
        tie_word_embeddings=not untied,
        dtype=dtype,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | tokens,
    )


def _family_of(meta: Metadata) -> tuple[str, GgufForm]:
    """Model type and form of the first family that fits: files of Llama, Mistral and Mixtral all say 'llama'."""
    forms = {kind: family.gguf for kind, family in FAMILIES.items() if family.gguf and family.gguf.reads_back}
    named = {model_type: form for model_type, form in forms.items() if form.architecture == meta.architecture}
    if not named:
        known = ", ".join(dict.fromkeys(form.architecture for form in forms.values()))
        raise BadInput(
            f"{meta.path}: GGUF architecture {meta.architecture!r} is not supported ({known} are); use the original "
            f"checkpoint, or round the file as it is: quantpress gguf {meta.path} NEW.gguf --type Q4_K_M"
        )
    windowed = [kind for kind, family in FAMILIES.items() if (f := family.gguf) and kind not in forms
                and f.architecture == meta.architecture and f.sliding_window]  # fmt: skip
    if windowed and meta.get(f"{meta.architecture}.attention.sliding_window"):
        raise BadInput(
            f"{meta.path}: a file of {windowed[0]}, with a sliding window, is not read; use the original checkpoint, "
            f"or round the file as it is: quantpress gguf {meta.path} NEW.gguf --type Q4_K_M"
        )
    for model_type, form in named.items():
        if ("expert_count" in form.counts.values()) == (meta.experts > 0):
            return model_type, form
    kind = "mixture-of-experts" if meta.experts else "dense"
    raise BadInput(f"{meta.path}: a {kind} file of architecture {meta.architecture!r}; transformers has no such model")


def _settings(meta: Metadata, form: GgufForm) -> dict[str, Any]:
    """The config fields that the metadata determines, as the family's row says."""
    heads = int(meta.hparam("attention.head_count"))
    per_head = int(meta.hparam("embedding_length")) // heads
    usual = {"attention.head_count_kv": heads, "attention.key_length": per_head}  # files may leave them out
    out = {name: meta.hparam(key, usual.get(key)) for name, key in form.sizes.items()}
    if form.rope != "none":
        head_dim, context = int(out.get("head_dim", per_head)), int(meta.hparam("context_length"))
        out["rope_parameters"] = _rope(meta, head_dim, context, partial=form.rope == "partial")
    out |= {name: meta.hparam(key) for name, key in (*form.counts.items(), *form.scales.items())}
    out |= {name: tensor in meta.tensors for name, tensor in form.switches.items()}
    return out | dict(form.fixed) | form.settings(meta, out)
