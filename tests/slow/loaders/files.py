"""Files of one small family that several loaders are asked about."""

from quantpress.numbers.types import Activations, Grid

CT, INT8, FP8 = "compressed-tensors", Activations(type="int8"), Activations(type="fp8")
STATIC = Activations(type="fp8", dynamic=False)
FILES: dict[str, tuple[str, Grid, Activations | None]] = {
    "int4": (CT, Grid(group_size=32), None),
    "int4, zeros": (CT, Grid(group_size=32, symmetric=False), None),
    "int4, groups of 16": (CT, Grid(group_size=16), None),
    "int8": (CT, Grid(bits=8, group_size=-1), None),
    "int8, zeros": (CT, Grid(bits=8, group_size=32, symmetric=False), None),
    "int3": (CT, Grid(bits=3, group_size=32), None),
    "w8a8": (CT, Grid(bits=8, group_size=-1), INT8),
    "fp8": (CT, Grid(type="fp8"), FP8),
    "fp8, static": (CT, Grid(type="fp8"), STATIC),
    "nvfp4": (CT, Grid(type="nvfp4"), None),
    "gptq": ("gptq", Grid(group_size=32), None),
    "gptq, int8": ("gptq", Grid(bits=8, group_size=-1), None),
    "awq": ("awq", Grid(group_size=32, symmetric=False), None),
}

# A family whose linears the servers' kernels take, Marlin among them.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
