"""What an answer depends on, in a few words that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def of_values(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def of_weights(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named CPU tensors: names, shapes and contents."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).numpy().data)
    return found.hexdigest()


def of_arithmetic() -> str:
    """Which kernels compute: backends and instruction sets differ in the last digits of a score."""
    import torch

    from minilm_fast.ops import forced_backend
    from minilm_fast.ops._dispatch import EXTENSION_ERROR

    if EXTENSION_ERROR is None and forced_backend() != "reference":
        from minilm_fast import _C

        return f"C++ {_C.isa()}"
    return f"PyTorch {torch.backends.cpu.get_cpu_capability()}"
