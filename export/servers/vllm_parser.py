"""A script for a Python that has vLLM: prints what vLLM's own classes make of an artifact's config, as a line of JSON.

    python vllm_parser.py FOLDER {cpu,cuda} TENSOR_PARALLEL MAX_MODEL_LEN

On the platform that vLLM was built for, the whole engine configuration is built, as the server does before it reads
weights. For another platform only the quantization config is parsed, since the rest depends on the platform.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, device: str, tensor_parallel: str, max_model_len: str) -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    stated = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    same = current_platform.is_cpu() == (device == "cpu")
    try:
        if same:
            from vllm.engine.arg_utils import EngineArgs

            length = None if max_model_len == "0" else int(max_model_len)
            arguments = EngineArgs(model=folder, tensor_parallel_size=int(tensor_parallel), max_model_len=length)
            parsed = arguments.create_engine_config().quant_config
        else:
            from vllm.model_executor.layers.quantization import get_quantization_config

            parsed = get_quantization_config(stated["quant_method"]).from_config(stated)
    except Exception as error:
        return {"version": vllm.__version__, "engine": same, "refused": " ".join(str(error).split())}
    return {"version": vllm.__version__, "engine": same, "parsed": type(parsed).__name__}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201
