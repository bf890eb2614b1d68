"""The Triton kernels: where they are, whether they can run, and their loading when the first one is needed.

Nothing here imports triton before a kernel is called. With ``TRITON_INTERPRET=1`` in the environment before that,
Triton interprets the kernels on tensors of the CPU; it is meant for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

import minilm_fast
from minilm_fast.ops._compile import constant
from minilm_fast.ops._cuda import HEAD_SIZES, too_old

OPERATORS = (
    "attention",
    "bias_gelu",
    "dropout_add_layer_norm",
    "label_smoothed_cross_entropy",
    "projected_attention",
    "relation_kl",
)
"""The operators that have Triton kernels."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _folder() -> Path:
    """Installed, the kernels lie in the package; in a checkout beside it."""
    package = Path(minilm_fast.__file__).parent
    return next(folder for folder in (package / "kernels", package.parent / "kernels") if (folder / "norm.py").exists())


@cache
def kernels(name: str) -> ModuleType:
    """Imports ``kernels/<name>.py`` and with it triton."""
    if "minilm_fast.kernels" not in sys.modules:
        # The folder is no package: one of that name beside this one would hide the package of others from them.
        module = ModuleType("minilm_fast.kernels")
        module.__path__ = [str(_folder())]
        sys.modules["minilm_fast.kernels"] = module
    return importlib.import_module(f"minilm_fast.kernels.{name}")


@constant
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def unusable(operator: str, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run an operator on a device; None if they can."""
    if operator not in OPERATORS:
        return f"{operator} has no triton implementation yet"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on cpu, for which Triton has only its interpreter (TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"the tensors are on {device.type}"
    elif (reason := too_old(device)) is not None:
        return reason
    return _missing()


def refuse_attention(q: torch.Tensor) -> dict[str, str | None]:
    """Why the Triton kernels cannot run attention for these queries."""
    if q.shape[-1] > HEAD_SIZES[-1]:
        return {"triton": f"the head size {q.shape[-1]} is above {HEAD_SIZES[-1]}"}
    return refuse_dtype(q)


def refuse_relation(teacher: torch.Tensor, student: torch.Tensor) -> dict[str, str | None]:
    """Why the Triton kernels cannot compute the loss of a relation."""
    for x in (teacher, student):
        if not 8 <= x.shape[-1] <= 128:
            return {"triton": f"the head size {x.shape[-1]} is not between 8 and 128"}
        if (refusal := refuse_dtype(x))["triton"] is not None:
            return refusal
    return {}


def refuse_dtype(x: torch.Tensor) -> dict[str, str | None]:
    """Why the Triton kernels cannot run on numbers of this type."""
    return {"triton": None if x.dtype in _DTYPES else f"the tensors are {x.dtype}, not fp16, bf16 or fp32"}
