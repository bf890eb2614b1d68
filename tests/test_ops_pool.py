"""Vectors of sequences: the kernel against its specification."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import threads

from minilm_fast import ops
from minilm_fast.ops import reference
from minilm_fast.ops.pool import POOLINGS

LENGTHS = ([1], [5, 0, 3], [0], [], [2] * 300, [700, 1])


def hidden_of(lengths: list[int], channels: int) -> torch.Tensor:
    return torch.randn(sum(lengths), channels, generator=torch.Generator().manual_seed(len(lengths)))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:3]))
@pytest.mark.parametrize("channels", [384, 21])
def test_equals_the_specification(lengths: list[int], channels: int, pooling: str, normalize: bool) -> None:
    hidden, layout = hidden_of(lengths, channels), ops.SequenceLayout.bidirectional(lengths)
    out = ops.pool_sequences(hidden, layout, pooling, normalize)
    exact = reference.pool_sequences(hidden.double(), layout.cu_seqlens, pooling, normalize)
    eager = reference.pool_sequences(hidden, layout.cu_seqlens, pooling, normalize)
    assert out.shape == (len(lengths), channels) and out.dtype == torch.float32
    if normalize:
        torch.testing.assert_close(out.double(), exact, rtol=3e-6, atol=1e-7)
    else:
        assert torch.equal(out, eager)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_alone_and_on_threads(pooling: str) -> None:
    lengths = [40, 3, 200, 1] * 4
    hidden, layout = hidden_of(lengths, 384), ops.SequenceLayout.bidirectional(lengths)
    with threads(1):
        whole = ops.pool_sequences(hidden, layout, pooling, True)
    with threads(3):
        assert torch.equal(ops.pool_sequences(hidden, layout, pooling, True), whole)
    for part, expected in zip(hidden.split(lengths), whole, strict=True):
        alone = ops.pool_sequences(part, ops.SequenceLayout.bidirectional([len(part)]), pooling, True)
        assert torch.equal(alone[0], expected)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_nan_stays(pooling: str) -> None:
    hidden = torch.zeros(3, 4)
    hidden[1, 2] = math.nan
    out = ops.pool_sequences(hidden, ops.SequenceLayout.bidirectional([3]), pooling, False)
    assert out.isnan().tolist() == [[False, False, True, False]]


def test_gradient() -> None:
    """The kernel has none: the specification runs."""
    hidden = torch.randn(5, 8, requires_grad=True)
    ops.pool_sequences(hidden, ops.SequenceLayout.bidirectional([2, 3]), "mean", False).sum().backward()
    expected = torch.tensor([1 / 2] * 2 + [1 / 3] * 3)[:, None].expand(5, 8)
    torch.testing.assert_close(hidden.grad, expected)


def test_wrong_arguments() -> None:
    layout = ops.SequenceLayout.bidirectional([4])
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, max"):
        ops.pool_sequences(torch.zeros(4, 8), layout, "sum", False)
    with pytest.raises(ValueError, match=r"hidden must be fp32 \[4, channels\]"):
        ops.pool_sequences(torch.zeros(3, 8), layout, "mean", False)
    kernel = torch.ops.minilm_fast.pool_sequences
    for starts in ([0, 3], [1, 4], [0, 5, 4], []):
        with pytest.raises(RuntimeError, match="cu_seqlens must ascend from 0 to the 4 rows"):
            kernel(torch.zeros(4, 8), torch.tensor(starts, dtype=torch.int32), 0, False)
    with pytest.raises(RuntimeError, match="pooling must be 0"):
        kernel(torch.zeros(4, 8), layout.cu_seqlens, 3, False)


def test_opcheck() -> None:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    torch.library.opcheck(torch.ops.minilm_fast.pool_sequences.default, (torch.randn(7, 6), starts, 0, True))
