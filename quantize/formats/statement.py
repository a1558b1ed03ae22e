"""What a checkpoint says of its own quantization, in config.json or in a file beside it that some tools write."""

from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import BadInput

_KEYS = ("quantization_config", "compression_config")  # the latter: compressed-tensors before 0.5
_INSIDE = ("text_config", "language_config", "llm_config")  # multimodal configs state it for their text model
_WHOLE = ("compressed-tensors", "modelopt")  # what a method's name may be followed by: modelopt_fp4
_AUTO_ROUND = ("auto-round", "intel/auto-round")
KNOWN = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes", "auto-round")
_CT_FORMATS = (
    None, "dense", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


def stated_quantization(
    config: Mapping[str, Any], beside: Callable[[str], Mapping[str, Any] | None]
) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, with its `quant_method`; None when nothing states one.

    config: config.json. beside: reads a JSON file of the checkpoint's folder, None when there is none.
    """
    for part in (config, *(config.get(name) for name in _INSIDE)):
        for key in _KEYS if isinstance(part, Mapping) else ():
            found = part.get(key)  # type: ignore[union-attr]
            if found is not None and not found:
                raise BadInput(f"config.json: {key} is empty, which no reader takes: leave it out")
            if found:
                stated = _with_method(found if isinstance(found, Mapping) else {"quant_method": found})
                return _groups_of_awq(beside) | stated if stated.get("quant_algo") == "W4A16_AWQ" else stated
    if found := beside("hf_quant_config.json"):
        inner = found.get("quantization", found)
        inner = inner if isinstance(inner, Mapping) else {}
        ignored = {"ignore": inner["exclude_modules"]} if inner.get("exclude_modules") else {}
        cached = {"kv_cache_scheme": _FP8_CACHE} if inner.get("kv_cache_quant_algo") == "FP8" else {}
        return {"quant_method": "modelopt"} | dict(inner) | ignored | cached if inner.get("quant_algo") else None
    if found := beside("quantize_config.json"):  # AutoGPTQ's, of before transformers read GPTQ
        return {"quant_method": "gptq"} | dict(found) if found.get("bits") else _with_method(found)
    if found := beside("quant_config.json"):  # AutoAWQ's
        return {"quant_method": "awq"} | dict(found)
    return None


def _groups_of_awq(beside: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Any]:
    """The group_size that ModelOpt (0.47) leaves out of config.json, and states in the file beside it."""
    inner = (beside("hf_quant_config.json") or {}).get("quantization")
    return {"group_size": inner["group_size"]} if isinstance(inner, Mapping) and "group_size" in inner else {}


_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as that of the unquantized model."""
    out = {key: value for key, value in config.items() if key not in _KEYS}
    for name in _INSIDE:
        if isinstance(out.get(name), Mapping):
            out[name] = {key: value for key, value in out[name].items() if key not in _KEYS}
    return out


def check_readable(stated: Mapping[str, Any]) -> None:
    """Raise BadInput for a quantization whose weights cannot be computed from the tensors alone."""
    method = str(stated.get("quant_method"))
    if method in _AUTO_ROUND:
        raise BadInput(
            f"auto-round's {stated.get('data_type')} weights in packing_format {stated.get('packing_format')!r} cannot "
            "be dequantized here; give the original checkpoint"
        )
    if not method.startswith(_WHOLE) and method not in KNOWN:
        raise BadInput(
            f"quantized with {method!r}, which cannot be dequantized here; known: {', '.join(KNOWN)}. "
            "Give the original checkpoint"
        )
    if (stated.get("transform_config") or {}).get("config_groups"):
        raise BadInput(
            "quantized with transforms that the server applies as it runs (transform_config), so its weights are not "
            "those of the model; give the original checkpoint"
        )
    groups = stated.get("config_groups") or {}
    formats = {stated.get("format"), *(g.get("format") for g in groups.values() if isinstance(g, Mapping))}
    sparse = (stated.get("sparsity_config") or {}).get("format")
    if method == "compressed-tensors" and (odd := [f for f in (*formats, sparse) if f not in _CT_FORMATS]):
        raise BadInput(f"compressed-tensors format {odd[0]!r} cannot be dequantized here; give the original checkpoint")


def block_shape(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block of weights that share a scale, as far as the config says."""
    found = [stated.get("weight_block_size"), *(args.get("block_structure") for args in _weights(stated))]
    for shape in found:
        if isinstance(shape, list | tuple) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape):
            return shape[0], shape[1]
    return None


def stated_group(stated: Mapping[str, Any]) -> int | None:
    """The inputs that share a scale, as far as the config of GPTQ or AWQ files says."""
    found = next((stated[key] for key in ("group_size", "q_group_size") if stated.get(key) is not None), None)
    return found if isinstance(found, int) else None


def widths(stated: Mapping[str, Any]) -> set[int]:
    """The bits that a code of a weight may have, as far as the config says."""
    found = [stated.get("bits"), *(args.get("num_bits") for args in _weights(stated))]
    found += [rule.get("bits") for rule in (stated.get("dynamic") or {}).values() if isinstance(rule, Mapping)]
    return {bits for bits in found if isinstance(bits, int)}


def _weights(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    return [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]


def _with_method(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The statement with a quant_method, which some tools leave out."""
    if stated.get("quant_method") in _AUTO_ROUND:
        return _of_auto_round(stated)
    if stated.get("quant_method"):
        return dict(stated)
    told = {"quant_algo": "modelopt", "config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes",
            "weight_block_size": "fp8", "group_size": "gptq"}  # fmt: skip
    inner = stated.get("quantization")
    if isinstance(inner, Mapping) and inner.get("quant_algo"):  # hf_quant_config.json copied into config.json
        return {"quant_method": "modelopt"} | dict(inner)
    return dict(stated) | {"quant_method": next((method for key, method in told.items() if key in stated), None)}


def _of_auto_round(stated: Mapping[str, Any]) -> dict[str, Any]:
    """auto-round's statement as that of the format that its files are in; as it is where that cannot be read.

    vLLM reads them by the same rule (INCConfig, which has GPTQ's for the default); packing formats of before, without
    `gptq` in their names, stored zeros as they are.
    """
    kind, backend = str(stated.get("data_type") or "int"), str(stated.get("backend"))
    packing = str(stated.get("packing_format") or (backend if ":" in backend else "auto_round:auto_gptq"))
    as_is = ("auto_round", "auto_round:exllamav2", "auto_round:triton")
    if kind == "int" and "awq" in packing:
        return dict(stated) | {"quant_method": "awq"}
    if kind == "int" and ("gptq" in packing or packing in as_is):
        version = "gptq" if "gptq" in packing else "gptq_v2"
        rules = {"dynamic": stated.get("extra_config") or {}}
        return dict(stated) | {"quant_method": "gptq", "checkpoint_format": version} | rules
    if kind in ("fp", "fp8") and packing == "auto_round:fp8":
        return dict(stated) | {"quant_method": "fp8", "weight_block_size": stated.get("group_size")}
    if kind.startswith("mx_fp") and packing == "auto_round:llm_compressor":
        return {"quant_method": "compressed-tensors"}
    return dict(stated)
