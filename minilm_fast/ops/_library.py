"""Schemas of the operators in the namespace ``minilm_fast``.

They are defined here and not in C++, so that the operators exist (with their fakes, and on a CPU with a pure
PyTorch kernel) where nothing could be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minilm_fast.ops import _triton
from minilm_fast.ops._dispatch import EXTENSION_ERROR

LIBRARY = torch.library.Library("minilm_fast", "FRAGMENT")


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], cpu_kernel: bool = True) -> Any:
    """Defines an operator and returns its ``torch.ops`` overload.

    Args:
        schema: ``name(arguments) -> results``; the extension registers its CPU kernel under the same name.
        reference: pure PyTorch kernel with the schema's arguments, registered for the CPU where the extension
            is missing.
        fake: shape function for meta tensors.
        cpu_kernel: whether the extension has a kernel for the CPU; else that is the reference always.
    """
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    if EXTENSION_ERROR is not None or not cpu_kernel:
        LIBRARY.impl(name, reference, "CPU")
    torch.library.register_fake(f"minilm_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.minilm_fast, name).default


def define_triton(schema: str, *, kernels: str, fake: Callable[..., Any]) -> Any:
    """Defines the Triton twin ``triton_<name>`` of an operator and returns its ``torch.ops`` overload.

    It is an operator of its own, so that one process can hold several implementations for one device.

    Args:
        schema: that of the operator.
        kernels: the file of ``kernels/`` that has a host function ``<name>`` with the schema's arguments.
        fake: shape function for meta tensors.
    """
    name = schema[: schema.index("(")]

    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return getattr(_triton.kernels(kernels), name)(*arguments)

    LIBRARY.define(f"triton_{schema}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(f"triton_{name}", run, key)
    torch.library.register_fake(f"minilm_fast::triton_{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.minilm_fast, f"triton_{name}").default
