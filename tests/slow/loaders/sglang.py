"""SGLang's own quantization classes on an artifact: `python sglang.py FOLDER SHAPES`, with PyPI's sglang on the path.

SHAPES: JSON, {linear: [out, in]}. Prints JSON: why they refuse, and by fused layer the parameters that they make room
for, name: [shape, dtype]. Only its files of quantization are its own; the rest of the server, kernels included, is
invented as it is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import torch

CAPABILITY = (9, 0)
_OWN = "sglang.srt.layers.quantization"
OWN = (_OWN, "sglang.srt.layers.parameter", "sglang.srt.layers.modelopt_utils")
INVENTED_THERE = tuple(f"{_OWN}.{name}" for name in (
    "fp8_utils", "fp4_utils", "unquant", "marlin_utils_fp4", "marlin_utils_fp8", "int8_utils", "mxfp4_tensor",
))  # fmt: skip
BLOCK = "model.layers.0"
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}


class Anything(type):
    """A class that is any function, decorator, base class or namespace."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, invented(name))
        return cls.__dict__[name]

    def __call__(cls, *given, **named):
        if not cls.__dict__.get("invented"):  # a class of its own, derived from an invented one
            return super().__call__(*given, **named)
        return given[0] if len(given) == 1 and callable(given[0]) and not named else cls

    def __bool__(cls):
        return False

    def __iter__(cls):
        return iter(())

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __getitem__(cls, key):
        return cls


def invented(name):
    return Anything(name, (), {"invented": True})


class InventedModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, invented(name))
        return vars(self)[name]


class Inventor(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Invents what is not SGLang's quantization, and what is not installed."""

    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in ("triton", "sgl_kernel", "flashinfer")
        if missing or (name.startswith("sglang") and not own(name)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return InventedModule(spec.name)

    def exec_module(self, module):
        vars(module).update(KNOWN.get(module.__name__, {}))


def own(name):
    return name.startswith(OWN) and not name.startswith(INVENTED_THERE)


def set_weight_attrs(weight, attributes):
    for key, value in (attributes or {}).items():
        setattr(weight, key, value)


class LinearBase(torch.nn.Module):
    """What its schemes ask whether a layer is."""


class FormerMethod:
    """Of its quantization method for layers in 16 bit."""


UTILS = {
    "is_cuda": lambda: True, "get_device_capability": lambda *given: CAPABILITY, "set_weight_attrs": set_weight_attrs,
    **{name: lambda: False for name in ("is_hip", "is_npu", "is_xpu", "is_cpu", "is_musa", "cpu_has_amx_support")},
}  # fmt: skip
KNOWN = {
    "sglang.srt.utils": UTILS, "sglang.srt.utils.common": UTILS,
    "sglang.srt.layers.linear": {"LinearBase": LinearBase, "set_weight_attrs": set_weight_attrs},
    f"{_OWN}.unquant": {"UnquantizedLinearMethod": FormerMethod},
    "sglang.srt.layers.radix_attention": {"RadixAttention": type("RadixAttention", (), {})},
    "sglang.srt.layers.vocab_parallel_embedding": {"ParallelLMHead": type("ParallelLMHead", (), {})},
    "sglang.srt.layers.moe.fused_moe_triton": {"FusedMoE": type("FusedMoE", (), {})},
}  # fmt: skip
CLASSES = {
    "gptq": ("gptq.gptq", "GPTQMarlinConfig"), "awq": ("awq.awq", "AWQMarlinConfig"),
    "compressed-tensors": ("compressed_tensors.compressed_tensors", "CompressedTensorsConfig"),
    "modelopt": ("modelopt_quant", "ModelOptFp8Config"), "modelopt_fp4": ("modelopt_quant", "ModelOptFp4Config"),
}  # fmt: skip


def stand_in():
    sys.meta_path.insert(0, Inventor())
    found = next(Path(place) for place in sys.path if (Path(place) / "sglang" / "srt").is_dir()) / "sglang"
    names = ("sglang", "sglang.srt", "sglang.srt.layers", _OWN)
    for name in names:  # packages without their __init__.py
        module = InventedModule(name)
        module.__path__ = [str(found.parent / name.replace(".", "/"))]
        sys.modules[name] = module
    torch.cuda.get_device_capability = lambda *given: CAPABILITY
    torch.cuda.is_available = lambda: True


def room(config, sizes, dtype):
    """The parameters of each fused layer; sizes: {linear: [out, in]}."""
    made = {}
    for name, parts in FUSED.items():
        outs, n_in = [sizes[f"{BLOCK}.{part}"][0] for part in parts], sizes[f"{BLOCK}.{parts[0]}"][1]
        layer = LinearBase()
        layer.input_size = layer.input_size_per_partition = n_in
        layer.output_size = layer.output_size_per_partition = sum(outs)
        method = config.get_quant_method(layer, f"{BLOCK}.{name}")
        assert method is not None, f"no method for {name}"
        layer.scheme = getattr(layer, "scheme", None) or getattr(method, "scheme", None)
        method.create_weights(
            layer, n_in, outs, n_in, sum(outs), dtype, weight_loader=lambda *given: None, layer_name=name
        )
        refuse_types(layer.scheme)
        made[name] = {key: [list(value.shape), str(value.dtype)] for key, value in layer.named_parameters()}
    return made


def refuse_types(scheme):
    """What its Marlin kernel would refuse as it computes."""
    if hasattr(scheme, "quant_type") and hasattr(scheme, "group_size"):
        marlin = importlib.import_module(f"{_OWN}.marlin_utils")
        marlin.verify_marlin_supported(scheme.quant_type, scheme.group_size, has_zp=not scheme.symmetric)


def main():
    folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path[:] = [place for place in sys.path if Path(place).absolute() != Path(__file__).parent.absolute()]
    stand_in()
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    kind = stated["quant_method"]
    kind = "modelopt_fp4" if "NVFP4" in str(stated.get("quant_algo")) else kind
    file, name = CLASSES[kind]
    said = {"why": "", "room": {}}
    try:
        chosen = getattr(importlib.import_module(f"{_OWN}.{file}"), name)
        overridden = chosen.override_quantization_method(stated, None)
        config = chosen.from_config(stated)
        config.packed_modules_mapping = {}  # as of most of its model classes
        said |= {"name": overridden or config.get_name(), "room": room(config, sizes, torch.bfloat16)}
    except Exception as error:
        if "--trace" in sys.argv:
            raise
        said["why"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"SAID{json.dumps(said)}\n")


main()
