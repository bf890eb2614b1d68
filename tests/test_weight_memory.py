"""Where packed weights lie: side by side, each as long as something holds it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("minilm_fast._C", reason="the extension is not built")

from minilm_fast import ops

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")


def resident() -> int:
    """Bytes of memory that the process holds."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_weights_outlive_their_neighbours() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(n, k) for n, k in ((3, 5), (130, 64), (7, 300), (64, 64))]
    packed = [ops.pack_weight(w, "fp32") for w in weights]
    assert all(p.data.data_ptr() % 64 == 0 for p in packed)
    x = [torch.randn(2, w.shape[1]) for w in weights]
    expected = [ops.linear(a, p) for a, p in zip(x, packed, strict=True)]
    for i in (1, 3):
        packed[i] = ops.pack_weight(torch.full_like(weights[i], 7.0), "fp32")
    gc.collect()
    for _ in range(50):
        ops.pack_weight(torch.full((33, 33), 9.0), "fp32")
    for i in (0, 2):
        assert torch.equal(ops.linear(x[i], packed[i]), expected[i])


@LINUX
def test_a_weight_larger_than_a_region_is_given_back() -> None:
    rows = torch.ones(4200, 4200)
    before = resident()
    packed = ops.pack_weight(rows, "fp32")
    assert resident() - before > 60 << 20
    assert ops.linear(torch.ones(1, 4200), packed).eq(4200).all()
    del packed
    gc.collect()
    assert resident() - before < 20 << 20
