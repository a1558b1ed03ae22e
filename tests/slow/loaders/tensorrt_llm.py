"""TensorRT-LLM's readers of quantization configs on an artifact: `python tensorrt_llm.py SOURCE FOLDER NAMES`.

SOURCE holds modelopt_config.py and quant_config_utils.py of NVIDIA/TensorRT-LLM. NAMES: JSON, the linears. Prints JSON:
why they refuse, what they warn of, and the algorithm, group size, cache and modules left out, of all and by layer.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

WARNED = []


class Name(type):
    """Any algorithm by its name: what it knows of them needs its bindings."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class QuantAlgo(metaclass=Name):
    pass


class QuantConfig(types.SimpleNamespace):
    def __init__(self, quant_algo=None, group_size=None, kv_cache_quant_algo=None, exclude_modules=None):
        super().__init__(
            quant_algo=quant_algo, group_size=group_size, kv_cache_quant_algo=kv_cache_quant_algo,
            exclude_modules=exclude_modules,
        )  # fmt: skip

    def model_copy(self):
        return QuantConfig(**vars(self))


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    made.__path__ = []
    sys.modules[name] = made


def own(source, name):
    spec = importlib.util.spec_from_file_location(name, source / f"{name.rpartition('.')[2]}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def main():
    source, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    for name in ("tensorrt_llm", "tensorrt_llm.quantization", "tensorrt_llm.models"):
        module(name)
    logger = types.SimpleNamespace(warning=WARNED.append, debug=lambda text: None, info=lambda text: None)
    module("tensorrt_llm.logger", logger=logger)
    module("tensorrt_llm.quantization.mode", QuantAlgo=QuantAlgo)
    module("tensorrt_llm.models.modeling_utils", QuantConfig=QuantConfig)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    modelopt = own(source, "tensorrt_llm.quantization.modelopt_config")
    said, layers = {"why": ""}, None
    try:
        if modelopt.is_modelopt_quant_config(stated):
            file = folder / "hf_quant_config.json"
            found = modelopt.parse_modelopt_quant_config(json.loads(file.read_text()))
            modelopt.warn_if_inline_quant_config_differs(found, stated, source_file=file.name)
            layers = {name: types.SimpleNamespace(**layer) for name, layer in found.quantized_layers.items()}
        else:
            found = QuantConfig()
            groups = own(source, "tensorrt_llm.models.quant_config_utils")
            layers = groups.update_quant_config_from_compressed_tensors(found, stated, names)
        said |= {
            "algorithm": found.quant_algo, "group_size": found.group_size, "cache": found.kv_cache_quant_algo,
            "left_out": found.exclude_modules, "layers": {n: v.quant_algo for n, v in (layers or {}).items()},
        }  # fmt: skip
    except Exception as error:
        said["why"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"SAID{json.dumps(said | {'warned': WARNED})}\n")


main()
