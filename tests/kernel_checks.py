"""What the tests of the C++ operators share: the instruction sets, an error bound, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

extension = pytest.importorskip("minilm_fast._C", reason="the extension is not built")

_ASCENDING = ("default", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
BEST_ISA: str = extension.isa()
ISAS = _ASCENDING[: _ASCENDING.index(BEST_ISA) + 1]
DTYPES = (torch.float32, torch.bfloat16)
EPSILON = torch.finfo(torch.float32).eps
_HAS_GPU = torch.cuda.is_available()
ON_GPU = pytest.mark.gpu
"""Runs on the simulated GPU (simulated_gpu.py) where there is no other."""
NEEDS_GPU = [ON_GPU, pytest.mark.skipif(not _HAS_GPU, reason="there is no GPU")]
SLOW = pytest.mark.skipif(
    not _HAS_GPU and os.environ.get("MINILM_FAST_SLOW_TESTS") != "1",
    reason="there is no GPU, and MINILM_FAST_SLOW_TESTS=1 is not set",
)
SLOW_SIMULATED = [ON_GPU, SLOW]
"""As ON_GPU, without a GPU only if the environment asks for it."""
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test with :data:`NEEDS_GPU`."""
    return _marked(test, NEEDS_GPU)


def slow_simulated(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test with :data:`SLOW_SIMULATED`."""
    return _marked(test, SLOW_SIMULATED)


def _marked(test: Callable[..., None], marks: list[pytest.MarkDecorator]) -> Callable[..., None]:
    for mark in marks:
        test = mark(test)
    return test


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the block with one of :data:`ISAS`, and with fresh tensors full of NaN instead of uninitialised."""
    before = torch.are_deterministic_algorithms_enabled()
    extension.set_isa(name)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        extension.set_isa(BEST_ISA)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_accurate(
    ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, allowance: float = 0.0, worst: float = 2.0
) -> None:
    """Holds the error against fp64 to twice that of eager PyTorch in the same dtype.

    On average and at worst (there to ``worst`` times, which is more than 2 for sums of many rounded numbers, whose
    largest errors scatter); to that comes an allowance of about one rounding of the largest result, for the cases
    in which eager happens to be exact, and ``allowance`` (at worst eight times as much) where the result is what is
    left of larger numbers that cancel.
    """
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    if not exact.numel():
        return
    assert torch.isfinite(exact).all()
    mine, theirs = ((x.double() - exact).abs() for x in (ours, eager))
    rounding = EPSILON * exact.abs().max().item()
    assert mine.pow(2).mean().sqrt() <= 2 * theirs.pow(2).mean().sqrt() + rounding + allowance
    assert mine.max() <= worst * theirs.max() + 2 * rounding + 8 * allowance


def wide(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The same numbers in fp64; what is None stays None."""
    return [None if t is None else t.double() for t in tensors]
