"""What the tests of the C++ operators share: the instruction sets, an error bound, poisoned memory."""

from __future__ import annotations

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
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test with :data:`NEEDS_GPU`."""
    for mark in NEEDS_GPU:
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


def assert_accurate(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, allowance: float = 0.0) -> None:
    """Holds the error against fp64 to twice that of eager PyTorch in the same dtype.

    On average and at worst; to that comes an allowance of about one rounding of the largest result, for the cases
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
    assert mine.max() <= 2 * theirs.max() + 2 * rounding + 8 * allowance


def wide(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The same numbers in fp64; what is None stays None."""
    return [None if t is None else t.double() for t in tensors]
