"""Before any test: Triton's kernels are interpreted where there is no GPU to run them on."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, Triton's own among them
