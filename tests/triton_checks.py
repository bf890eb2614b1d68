"""What the tests of the Triton kernels share. Without a GPU Triton interprets them, so shapes are tiny."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from minilm_fast import backend

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = torch.finfo(torch.float32).eps


def _round_as_a_gpu_does() -> None:
    """Triton's interpreter cuts fp32 off to bf16, where every GPU rounds to nearest even, and cannot multiply bf16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        types = str(source.dtype.scalar), str(dtype.scalar)
        if types == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), dtype.scalar)
        if types == ("bf16", "fp32"):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), dtype.scalar)
        return convert(self, source, dtype)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if str(a.dtype.scalar) == "bf16":
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot


if DEVICE == "cpu":
    _round_as_a_gpu_does()


@contextmanager
def triton_backend() -> Iterator[None]:
    """Runs the block with the Triton kernels, and with fresh tensors full of NaN instead of uninitialised."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with backend("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_accurate(
    ours: torch.Tensor | None, eager: torch.Tensor | None, exact: torch.Tensor | None, allowance: float = 0.0
) -> None:
    """Holds the error against fp64 to twice that of eager PyTorch in the same dtype, see ``kernel_checks``.

    To it come a rounding of the largest result and ``allowance``, for what is left of larger numbers that cancel.
    """
    if ours is None:
        assert eager is None and exact is None
        return
    assert eager is not None and exact is not None
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    if not exact.numel():
        return
    assert torch.isfinite(exact).all()
    mine, theirs = ((x.double() - exact).abs() for x in (ours, eager))
    rounding = EPSILON * exact.abs().max().item()
    assert mine.pow(2).mean().sqrt() <= 2 * theirs.pow(2).mean().sqrt() + rounding + allowance
    assert mine.max() <= 2 * theirs.max() + 2 * rounding + 8 * allowance
