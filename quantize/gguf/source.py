"""A GGUF file as an ordinary bf16 Hugging Face folder.

The tensor names come from the `gguf` library's own map, asked for every parameter of the transformers model the file
describes; a tensor that is missing, left over or of another shape is an error, never a guess.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadInput
from .source_tokenizer import check_reads_back, save_tokenizer

SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is read.

    permuted: rows of Q and K were reordered for ggml's interleaved RoPE; transposed: names of Conv1D weights, kept
    [in, out] by transformers and [out, in] by GGUF; left_over: tensors that carry nothing a checkpoint needs.
    """

    model_type: str
    settings: Callable[["Metadata"], dict[str, Any]]
    permuted: bool = False
    transposed: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ("rope_freqs.weight",)


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


def _rope(meta: Metadata, head_dim: int, context: int) -> dict[str, Any]:
    """rope_parameters of transformers; a scaling that cannot be told exactly from the file is refused."""
    if (rotary := meta.hparam("rope.dimension_count", head_dim)) != head_dim:
        raise BadInput(f"{meta.path}: partial rotary embedding ({rotary} of {head_dim}) is not supported")
    theta = float(meta.hparam("rope.freq_base", 10000.0))
    kind = meta.hparam("rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.tensors:
        return {"rope_theta": theta} | _llama3_scaling(meta, theta, head_dim)
    if meta.hparam("rope.scale_linear", 1.0) != 1.0:
        raise BadInput(f"{meta.path}: an old file with rope.scale_linear; convert the original checkpoint again")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise BadInput(f"{meta.path}: RoPE scaling {kind!r} is not supported; linear, yarn and llama3 are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(meta.hparam("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = int(meta.hparam("rope.scaling.original_context_length", context))
    return {"rope_theta": theta} | scaling


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


def _llama_like(meta: Metadata) -> dict[str, Any]:
    """Settings that llama, qwen2 and qwen3 share."""
    if meta.get(f"{meta.architecture}.expert_count"):
        raise BadInput(f"{meta.path}: mixture-of-experts GGUF files are not supported; use the original checkpoint")
    hidden, heads = int(meta.hparam("embedding_length")), int(meta.hparam("attention.head_count"))
    head_dim = int(meta.hparam("attention.key_length", hidden // heads))
    context = int(meta.hparam("context_length"))
    return {
        "hidden_size": hidden,
        "intermediate_size": int(meta.hparam("feed_forward_length")),
        "num_hidden_layers": int(meta.hparam("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.hparam("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": float(meta.hparam("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(meta, head_dim, context),
    }


def _llama(meta: Metadata) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return _llama_like(meta) | {key: name in meta.tensors for key, name in biases.items()}


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
    "llama": Architecture("llama", _llama, permuted=True),
    "qwen2": Architecture("qwen2", _llama_like),
    "qwen3": Architecture("qwen3", _llama_like),
    "gpt2": Architecture("gpt2", _gpt2, transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}


def convert(source: Path, folder: Path) -> None:
    """Write the model in GGUF file `source` into the existing empty `folder` as a bf16 checkpoint with its tokenizer.

    Raises BadInput for a file that is not a whole GGUF, an architecture, tensor type or tokenizer without support,
    and tensors that do not fit the model.
    """
    meta = _read(source)
    row = ARCHITECTURES.get(meta.architecture)
    if row is None:
        raise BadInput(
            f"{source}: GGUF architecture {meta.architecture!r} is not supported ({', '.join(ARCHITECTURES)} are); "
            "use the original checkpoint"
        )
    config = _config(meta, row)
    plan = _plan(meta, row, config)
    tokenizer = save_tokenizer(meta, source, folder, model_max_length=int(meta.hparam("context_length")))
    _save_config(meta, config, folder)
    check_reads_back(tokenizer, source, folder)
    _save_weights(meta, row, config, plan, folder)


def _read(source: Path) -> Metadata:
    try:
        meta = Metadata(gguf.GGUFReader(source), source)
    except (ValueError, IndexError, KeyError, OSError, TypeError, OverflowError) as error:
        raise BadInput(f"{source}: not a whole GGUF file: {' '.join(str(error).split())}") from error
    if meta.get("split.count", 1) > 1:
        raise BadInput(f"{source}: one part of a GGUF split in {meta['split.count']}; merge the parts first")
    return meta


def _config(meta: Metadata, row: Architecture) -> Any:
    """The transformers config the file describes."""
    from transformers import AutoConfig

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
    config = AutoConfig.for_model(
        row.model_type,
        **row.settings(meta),
        vocab_size=meta.vocab_size,
        tie_word_embeddings=not untied,
        dtype="bfloat16",
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | tokens,
    )
    return config


def _plan(meta: Metadata, row: Architecture, config: Any) -> dict[str, str]:
    """The GGUF tensor of each parameter of the transformers model: {parameter: tensor}."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == meta.architecture)
    names = gguf.get_tensor_name_map(arch, int(meta.hparam("block_count")))
    plan: dict[str, str] = {}
    for parameter, value in model.state_dict().items():
        if config.tie_word_embeddings and parameter == "lm_head.weight":
            continue
        tensor = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if tensor is None or tensor not in meta.tensors:
            raise BadInput(f"{meta.path}: the GGUF file has no tensor for {parameter} ({tensor or 'no known name'})")
        shape, want = meta.shape(tensor), tuple(value.shape)
        if (shape[::-1] if parameter.endswith(row.transposed) and len(shape) == 2 else shape) != want:
            raise BadInput(f"{meta.path}: tensor {tensor} has shape {list(shape)}, {parameter} needs {list(want)}")
        plan[parameter] = tensor
    spare = set(meta.tensors) - set(plan.values()) - set(row.left_over)
    spare -= {"output.weight"} if config.tie_word_embeddings else set()
    if spare:
        few = ", ".join(sorted(spare)[:3])
        raise BadInput(f"{meta.path}: tensors that a {meta.architecture} model does not have: {few}")
    return plan


def _save_config(meta: Metadata, config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def _save_weights(meta: Metadata, row: Architecture, config: Any, plan: dict[str, str], folder: Path) -> None:
    """Shards of about SHARD_BYTES, one tensor dequantized at a time: the peak is one shard and one tensor."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for parameter, tensor in plan.items():
        n_bytes = 2 * int(np.prod(meta.shape(tensor)))
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size, total = size + n_bytes, total + n_bytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {parameter: _weight(meta, row, config, parameter, plan[parameter]) for parameter in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight(meta: Metadata, row: Architecture, config: Any, parameter: str, name: str) -> Tensor:
    """One tensor as transformers holds it, bf16."""
    tensor = meta.tensors[name]
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise BadInput(f"{meta.path}: tensor {name}: type {tensor.tensor_type.name} cannot be read") from error
    weight = torch.from_numpy(np.require(values, np.float32, "W")).reshape(meta.shape(name)).to(torch.bfloat16)
    if row.permuted and ".attn_q." in name:
        weight = unpermute(weight, config.num_attention_heads)
    elif row.permuted and ".attn_k." in name:
        weight = unpermute(weight, config.num_key_value_heads)
    if parameter.endswith(row.transposed) and weight.ndim == 2:
        weight = weight.T
    return weight.contiguous()


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of Q or K [heads * head_dim, ...] from ggml's order, pairs interleaved, to transformers', halves."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
