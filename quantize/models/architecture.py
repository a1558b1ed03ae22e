"""What config.json says the model is, and whether that is a decoder stack that can be quantized block by block."""

import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM

from ..core.errors import BadInput
from ..core.untrusted import read_json
from .building import auto_class, build_model

_OTHER_TASKS = (
    "ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "ForQuestionAnswering",
    "ForImageClassification",
)  # fmt: skip
_OF_TEXT = "and what is compared, calibrated and evaluated here is text"
_NOT_ALONE = {  # why a decoder cannot be given text alone, block by block
    "cpmant": "it puts tokens of its own before the text",
    "idefics": f"some blocks run on images only, {_OF_TEXT}",
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"),
        f"transformers runs it on text with an image only, {_OF_TEXT} alone",
    ),
    **dict.fromkeys(
        ("kyutai_speech_to_text", "voxtral_realtime"), f"transformers runs it on sound only, {_OF_TEXT} alone"
    ),
    "reformer": "its blocks hand on two streams of states",
    "diffusion_gemma": "it makes a text out of noise, not token by token",
    "shieldgemma2": "it is a classifier of images",
}
_BOTH_WAYS = ("bert-generation", "xlnet")  # unless they are decoders by config.json
# How the original was to be run, which says nothing of its weights; a kernel that is not installed would stop the run.
AS_RUN = ("attn_implementation", "_attn_implementation")
_NOT_OF_THE_MODEL = ("quantization_config", *AS_RUN)
_COUNTS = (  # of what is built one by one
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "num_experts", "num_local_experts",
    "n_routed_experts", "moe_num_experts", "num_labels",
)  # fmt: skip
_MOST = 10_000
_POSITIVE = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "n_embd", "n_head", "d_model", "n_heads",
)  # fmt: skip
# Settings of a rotary embedding that no number of 0 or below can be.
_ABOVE_0 = {"rope_theta", "factor", "short_factor", "long_factor", "original_max_position_embeddings"}
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_experts_per_token")


def model_config(config: Mapping[str, Any]) -> Any:
    """The transformers config of a checkpoint; raises BadInput unless it is a language model that only decodes.

    Of a multimodal model it is the whole model's, see `text_config`. As transformers' own loader does, floats written
    as {"__float__": "Infinity"} are read, and a mistral with layer_types is a ministral.
    """
    plain: dict[str, Any] = _of_the_model(config)
    kind = plain.get("model_type")
    if kind == "mistral" and "layer_types" in plain:
        plain["model_type"] = kind = "ministral"
    if not is_known(plain):
        raise BadInput(_unknown(plain))
    _check_dtype(stated_dtype(plain))
    check_sizes(plain, "config.json")
    try:
        if plain.get("text_config") and "text_config" not in CONFIG_MAPPING[str(kind)].sub_configs:
            raise BadInput(
                f"config.json: a {kind} model has no text_config, and transformers does not load one that says so: "
                "take it out, if what stands beside it is the model's"
            )
        built = AutoConfig.for_model(**plain)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"config.json does not describe a {kind} model: {' '.join(str(error).split())[:200]}") from error
    if getattr(built, "is_encoder_decoder", False):
        raise BadInput(f"model_type {kind!r} is an encoder with a decoder; only decoders are quantized")
    if type(built) in AutoModelForMaskedLM._model_mapping and not getattr(built, "is_decoder", False):
        raise BadInput(
            f"model_type {kind!r} is an encoder, as of embeddings and rerankers; only decoders are quantized"
        )
    if kind in _BOTH_WAYS and not getattr(built, "is_decoder", False):
        raise BadInput(f"model_type {kind!r} reads text in both directions; only decoders are quantized")
    if auto_class(built) is None:
        raise BadInput(f"model_type {kind!r} is not a causal language model; only these are quantized")
    decoder = decoder_config(built)
    slides = "sliding_window" in getattr(type(decoder), "__dataclass_fields__", ()) and (
        "sliding_attention" in (getattr(decoder, "layer_types", None) or ["sliding_attention"])
    )
    if slides and decoder.sliding_window == 0:
        raise BadInput("config.json: sliding_window is 0; it has to be at least 1, or null where there is none")
    if not hasattr(decoder_config(built), "num_hidden_layers"):
        raise BadInput(f"model_type {kind!r} is not a plain stack of decoder blocks; only these are quantized")
    if why := _NOT_ALONE.get(str(kind)):
        raise BadInput(f"model_type {kind!r} is not supported: {why}")
    if crossed := getattr(decoder_config(built), "cross_attention_layers", None):
        raise BadInput(
            f"model_type {kind!r}: its blocks {', '.join(map(str, crossed))} run on images only, and what is compared, "
            "calibrated and evaluated here is text; not supported"
        )
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if str(name).endswith(_OTHER_TASKS):
            raise BadInput(
                f"config.json: {name} is a classification or reward model; only language models are quantized, whose "
                "head gives a probability for each token"
            )
    return built


def decoder_config(config: Any) -> Any:
    """The part of a model's config that describes its text decoder: the config itself for a model of text alone."""
    return config.get_text_config(decoder=True)


def text_config(config: Mapping[str, Any]) -> Any:
    """The transformers config of a checkpoint's text decoder; raises BadInput as `model_config` does."""
    return decoder_config(model_config(config))


def with_text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what a multimodal one says of its text part beside what it says of the whole."""
    inner = config.get("text_config")
    return dict(config) | (dict(inner) if isinstance(inner, Mapping) else {})


def stated_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that config.json names, for the model or else for the text part of a multimodal one; None without."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                return part[key]
    return None


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether this transformers has a model class of its own for the checkpoint's model_type."""
    return isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING


def is_unknown(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a family that transformers does not have; not where it names none."""
    return bool(config.get("model_type")) and not is_known(config)


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a text decoder within a larger model; its config may have the text settings on top."""
    try:
        whole = model_config(config)
    except BadInput:
        return False
    return decoder_config(whole) is not whole


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model without its weights; raises BadInput for a config that its class cannot be built from."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about sizes of 0; the shapes are compared with the checkpoint's
            model = build_model(config, dtype)
    except BadInput:
        raise
    except ImportError as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"{config.model_type}: transformers needs another package for it: {said}") from error
    except Exception as error:
        _check_rope(config)
        raise BadInput(
            f"config.json does not describe a {config.model_type} model: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if any("inv_freq" in name for name, _ in model.named_buffers()):
        _check_rope(config)
    return model


def load_whole(folder: Path, dtype: torch.dtype | str) -> Any:
    """transformers' own model of a checkpoint folder, with all its weights."""
    config = model_config(read_json(folder / "config.json"))
    return auto_class(config).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def special_tokens(config: Any) -> set[int]:
    """The tokens that a model's config gives a meaning, such as the one that stands for a part of an image."""
    found: set[int] = set()
    parts = [config.to_dict()]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif str(key).endswith(("_token_id", "_token_index")):
                found |= {one for one in (value if isinstance(value, list) else [value]) if type(one) is int}
    return found


def experts_per_token(config: Any) -> int | None:
    """To how many experts a model sends each token; None where its config does not say, or says it layer by layer."""
    settings = config.to_dict()
    settings |= settings.get("ffn_config") or {}
    chosen = next((settings[name] for name in _PER_TOKEN if settings.get(name) is not None), None)
    return chosen if isinstance(chosen, int) else None


def check_block_count(config: Any, tensors: int) -> None:
    """Raise BadInput for a config with more blocks than the checkpoint has tensors, before all of them are built."""
    if isinstance(blocks := config.num_hidden_layers, int) and blocks > tensors:
        raise BadInput(
            f"config.json describes {blocks} blocks and the checkpoint has {tensors} tensors; is it the one that "
            "belongs to these weights?"
        )


def check_outside_blocks(kind: str, missing: list[str], heads: list[str]) -> None:
    """Raise BadInput for tensors around the blocks that the checkpoint lacks; `heads` names the output head's."""
    if not missing:
        return
    if set(missing) <= set(heads):
        raise BadInput(
            f"{missing[0]} is missing: the head is not tied to the embedding. Embedding, reward and classification "
            "models have none; only language models are quantized"
        )
    raise BadInput(
        f"{kind}: the checkpoint lacks {len(missing)} tensors outside the blocks, the first {missing[0]}; "
        "is config.json the one that belongs to these weights?"
    )


def unknown_family(config: Mapping[str, Any]) -> str:
    """What is wrong with a model_type that transformers has no class for."""
    kind, library = config.get("model_type"), f"transformers {version('transformers')}"
    said = f"unknown architecture: model_type {kind!r} is not one that {library} knows"
    own = ", and a model's own code (auto_map) cannot be run block by block" if "auto_map" in config else ""
    return said + own


def _unknown(config: Mapping[str, Any]) -> str:
    if not config.get("model_type"):
        return "config.json has no model_type, which says what model it is; add that of the original"
    return f"{unknown_family(config)}; use a release of transformers that has the family"


def _check_dtype(name: Any) -> None:
    if name is not None and not isinstance(getattr(torch, str(name).removeprefix("torch."), None), torch.dtype):
        raise BadInput(f"config.json: dtype {name!r} is not bfloat16, float16 or float32")


def check_sizes(config: Mapping[str, Any], where: str, inside: str = "") -> None:
    """Raise BadInput for a count that no model has: transformers would build it for hours, or fail on it darkly.

    where: what says so, for the message.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, where, f"{inside}{key}.")
        elif type(value) is int:
            if key in _COUNTS and value > _MOST:
                raise BadInput(f"{where}: {inside}{key} is {value}; no model has more than {_MOST}")
            if value < 1 and key in _POSITIVE and inside in ("", "text_config."):
                raise BadInput(f"{where}: {inside}{key} is {value}; it has to be at least 1")


def _check_rope(config: Any) -> None:
    """Raise BadInput for a kind of rotary embedding that transformers has no function for, and for impossible numbers.

    Of theta 0 or a scaling by 0 it makes infinite frequencies, of a negative theta none at all.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = getattr(decoder_config(config), "rope_parameters", None)
    for one in (settings, *settings.values()) if isinstance(settings, dict) else ():
        if not isinstance(one, dict):
            continue
        for key in _ABOVE_0.intersection(one):
            values = one[key] if isinstance(one[key], list) else [one[key]]
            if bad := [value for value in values if value is not None and not _is_above_0(value)]:
                raise BadInput(
                    f"config.json: {key} of the rotary embedding is {bad[0]!r}; it has to be a number above 0"
                )
        kind = one.get("rope_type", "default")
        if kind != "default" and str(kind) not in ROPE_INIT_FUNCTIONS:
            raise BadInput(
                f"config.json: rope type {kind!r} is not one that transformers computes for {config.model_type} "
                f"({', '.join(sorted(ROPE_INIT_FUNCTIONS))}); is this config.json of another model?"
            )


def _is_above_0(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _of_the_model(value: Any) -> Any:
    """`value` without what says nothing of the model, and with a float for every {"__float__": text}.

    transformers writes infinity so. A multimodal config has configs within.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _of_the_model(item) for key, item in value.items() if key not in _NOT_OF_THE_MODEL}
    return [_of_the_model(item) for item in value] if isinstance(value, list) else value
