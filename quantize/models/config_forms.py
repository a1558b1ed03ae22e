"""config.json in a form that transformers 4 and 5, and the servers that carry either, read alike.

transformers 5 moved what rotary embeddings are made of into `rope_parameters`, renamed `torch_dtype` to `dtype` and in
some families `num_experts`. Version 4, which TGI and older vLLM carry, takes its defaults instead, without a word:
theta 10000, no scaling. Version 5 reads both forms, the older winning where both are there.
"""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from ..core.errors import BadInput
from .architecture import AS_RUN, model_config

_OUTSIDE = (
    "rope_theta",
    "partial_rotary_factor",
)  # keys of rope_parameters that stand beside rope_scaling in version 4
_PHI3 = ("type", "short_factor", "long_factor")  # version 4 refuses any other key
_EXPERTS = ("num_experts", "num_local_experts")  # each the other's name in some family of either version
_BY_LAYER = {"full_attention", "sliding_attention"}


def readable_by_all(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with both forms of every key that moved; as it is where transformers would then read another model.

    Without the attention kernel that the original was run with, which readers would ask for.
    """
    config = _of_any_kernel(config)
    both = _both_forms(config)
    return both if both != config and _meaning(both) == _meaning(config) else config


def _of_any_kernel(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in AS_RUN}
    return {key: _of_any_kernel(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    if config.get("dtype") is not None:
        added["torch_dtype"] = config["dtype"]
    kind = str(config.get("model_type"))
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    added |= {one: config[names[one]] for one in _EXPERTS if names.get(one) in config}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        by_layer = rope.keys() == _BY_LAYER and all(isinstance(one, Mapping) for one in rope.values())
        if by_layer and kind.startswith("gemma3"):
            added |= _flat(rope["full_attention"], kind)
            added["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        elif not any(isinstance(one, Mapping) for one in rope.values()):
            added |= _flat(rope, kind)
    both = dict(config) | {key: value for key, value in added.items() if value is not None and key not in config}
    if isinstance(inner := config.get("text_config"), Mapping):
        both["text_config"] = _both_forms(inner)
    return both


def _flat(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What version 4 calls the settings in one `rope_parameters`."""
    flat: dict[str, Any] = {name: rope.get(name) for name in _OUTSIDE}
    if kind.startswith("gpt_neox"):
        flat |= {"rotary_emb_base": flat["rope_theta"], "rotary_pct": flat["partial_rotary_factor"]}
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in _OUTSIDE}
        if kind == "phi3":
            scaling["type"] = rope["rope_type"]
            flat["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
            scaling = {name: scaling[name] for name in _PHI3 if name in scaling}
        flat["rope_scaling"] = scaling
    return flat


def _meaning(config: Mapping[str, Any]) -> Any:
    """What transformers makes of a config, but for keys that say again what `rope_parameters` says.

    None of a config that it does not know.
    """
    try:
        return _said_once(model_config(config).to_dict())
    except BadInput:
        return None


def _said_once(value: Any) -> Any:
    if isinstance(value, Mapping):
        again = (*_OUTSIDE, *_EXPERTS, "rope_local_base_freq", "rotary_emb_base", "rotary_pct")
        kept = {key: _said_once(one) for key, one in value.items() if key not in again or "rope_type" in value}
        return {key: one for key, one in kept.items() if key != "type" or "rope_type" not in value}
    return value
