"""Without a GPU, Triton interprets its kernels; it reads the variable when it is imported, which any test may do."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
