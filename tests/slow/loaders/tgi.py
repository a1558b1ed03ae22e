"""TGI's own loader on an artifact, its kernels left out: `python tgi.py SOURCE FOLDER OUT`.

SOURCE: huggingface/text-generation-inference; run with the transformers and compressed-tensors of its
container. Writes the weights of the first block, dequantized, to OUT (safetensors) and prints JSON: why it refuses, the
rope base that its transformers reads, the versions.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

CAPABILITY = (9, 0)


def module(name: str, **contents: object) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    return made


class Kernels:
    """What repacks for Marlin leaves the weights as they are."""

    scalar_types = types.SimpleNamespace(uint4="uint4", uint8="uint8", uint4b8="uint4b8", uint8b128="uint8b128")

    @staticmethod
    def gptq_marlin_repack(qweight, perm, n_in, n_out, bits):
        assert qweight.shape == (n_in * bits // 32, n_out)
        return qweight

    @staticmethod
    def awq_marlin_repack(qweight, n_in, n_out, bits):
        assert qweight.shape == (n_in, n_out * bits // 32)
        return qweight

    @staticmethod
    def cutlass_scaled_mm_supports_fp8(capability):
        return True


def stand_in(source: Path) -> None:
    """Its packages without their __init__.py, which import all of the server, and with kernels that do nothing."""
    root = source / "server" / "text_generation_server"
    for name, place in (("", root), (".utils", root / "utils"), (".layers", root / "layers")):
        module(f"text_generation_server{name}").__path__ = [str(place)]
    module("text_generation_server.utils.import_utils", SYSTEM="cuda")
    module("text_generation_server.utils.kernels", load_kernel=lambda module, repo_id: Kernels)
    module("text_generation_server.utils.log", log_once=lambda log, text, master=True: None)
    torch.cuda.get_device_capability = lambda *given: CAPABILITY
    gptq = importlib.import_module("text_generation_server.layers.marlin.gptq")
    gptq.permute_scales = lambda scales: scales.contiguous()
    gptq.awq_to_marlin_zero_points = lambda zeros, *sizes: zeros


def codes(packed: torch.Tensor, bits: int, order: list[int]) -> torch.Tensor:
    """[rows, n] int32 -> [rows, n * 32/bits], the codes of each word in `order`."""
    found = torch.stack([packed >> (bits * i) & (2**bits - 1) for i in order], -1)
    return found.flatten(-2)


def weight(found: object) -> torch.Tensor:
    """[out, in] of one of TGI's weights, by the rule of the kernel that it has them for."""
    kind = type(found).__name__
    if kind == "UnquantizedWeight":
        return found.weight.float()
    if kind in ("Int8Weight", "Fp8Weight"):
        return found.weight.float() * found.weight_scale.float().reshape(-1, 1)
    assert kind == "GPTQMarlinWeight", kind
    linear = found.get_linear(None)
    bits, scales = found.bits, found.scales.float()
    if found.qweight.shape[1] == scales.shape[1]:  # packed along the inputs
        plain = list(range(32 // bits))
        q = codes(found.qweight.t().contiguous(), bits, plain).t()
    else:
        q = codes(found.qweight, bits, [0, 4, 1, 5, 2, 6, 3, 7])
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    if linear.quant_type in ("uint4", "uint8"):
        zeros = codes(found.qzeros, bits, [0, 4, 1, 5, 2, 6, 3, 7]).float()
    groups = torch.arange(q.shape[0]) // (q.shape[0] // scales.shape[0])
    if found.g_idx.numel():  # the inputs are sorted by group, and permuted as they come
        groups = found.g_idx.long()
        q = q[found.perm.long()]
    rows = (q.float() - zeros[groups]) * scales[groups]
    if found.g_idx.numel():
        rows = rows[torch.argsort(found.perm.long())]
    return rows.t()


def load(folder: Path, out: Path) -> None:
    from text_generation_server.utils.quantization import get_loader
    from text_generation_server.utils.weights import Weights

    config = json.loads((folder / "config.json").read_text())
    loader = get_loader(config["quantization_config"]["quant_method"], str(folder), None)
    group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    weights = Weights(sorted(folder.glob("*.safetensors")), "cpu", torch.bfloat16, group, loader)
    block = "model.layers.0"
    fused = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    }
    found = {
        name: weights.get_multi_weights_col([f"{block}.{part}" for part in parts], dim=0)
        for name, parts in fused.items()
    }
    found |= {name: weights.get_weights_row(f"{block}.{name}") for name in ("self_attn.o_proj", "mlp.down_proj")}
    save_file({name: weight(one).contiguous() for name, one in found.items()}, out)


def main() -> None:
    source, folder, out = map(Path, sys.argv[1:])
    stand_in(source)
    import compressed_tensors
    import transformers

    said = {"transformers": transformers.__version__, "compressed_tensors": compressed_tensors.__version__, "why": ""}
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        said |= {"rope_theta": config.rope_theta, "type": str(config.torch_dtype)}
        load(folder, out)
    except Exception as error:
        said["why"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"SAID{json.dumps(said)}\n")


main()
