"""Large CPU tensors from kept blocks. In processes of their own: an allocator is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minilm_fast.ops._dispatch import EXTENSION_ERROR

pytestmark = pytest.mark.skipif(
    EXTENSION_ERROR is not None or sys.platform != "linux", reason="needs Linux and the compiled extension"
)

START = """
import random
import threading
import torch
from minilm_fast import _C
before = torch.full((3_000_000,), 7.0)
assert _C.use_block_allocator()
assert _C.use_block_allocator()
MB = 1 << 20
"""


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_held_follows_what_was_in_use() -> None:
    _run(
        """
rng = random.Random(0)
for _ in range(60):
    live = [torch.empty(rng.randint(1 * MB, 30 * MB), dtype=torch.uint8) for _ in range(8)]
    used, held, peak = _C.block_statistics()
    assert sum(x.numel() for x in live) <= used <= peak and used <= held
    del live
used, held, peak = _C.block_statistics()
assert used == 0 and 0 < held <= 1.3 * peak, (held, peak)
assert peak < 8 * 32 * MB
"""
    )


def test_a_block_is_used_again_and_never_twice_at_a_time() -> None:
    _run(
        """
first = torch.zeros(10 * MB, dtype=torch.uint8)
place = first.data_ptr()
assert place % (2 * MB) == 0
second = torch.zeros(10 * MB, dtype=torch.uint8)
assert abs(second.data_ptr() - place) >= 10 * MB
del first
third = torch.ones(9 * MB, dtype=torch.uint8)
assert third.data_ptr() == place
small = torch.ones(3 * MB, dtype=torch.uint8)
assert second.sum() == 0 and third.sum() == third.numel() and small.sum() == small.numel()
"""
    )


def test_tensors_from_before_small_ones_and_other_threads() -> None:
    _run(
        """
assert before.mean() == 7
small = [torch.full((100,), float(i)) for i in range(1000)]
assert all((x == i).all() for i, x in enumerate(small))
found = []

def work(seed):
    rng = random.Random(seed)
    for _ in range(200):
        x = torch.full((rng.randint(300_000, 900_000),), float(seed))
        if not bool((x == seed).all()):
            found.append(seed)

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not found
del before, small
assert _C.block_statistics()[0] == 0
"""
    )


def test_products_in_bf16_and_a_backward_pass() -> None:
    """oneDNN asks the allocator for raw memory."""
    _run(
        """
layer = torch.nn.Linear(384, 1536)
for rows in (2000, 3000, 2500):
    x = torch.randn(rows, 384, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    expected = layer.weight.detach().bfloat16().float().sum(0)
    assert torch.allclose(x.grad[-1], expected, atol=0.1)
"""
    )


def test_too_much_is_an_error_that_leaves_the_process_usable() -> None:
    _run(
        """
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError as error:
    assert "not enough memory" in str(error), error
else:
    raise AssertionError("no error")
assert torch.ones(5 * MB, dtype=torch.uint8).sum() == 5 * MB
"""
    )
