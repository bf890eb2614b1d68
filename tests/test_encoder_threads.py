"""The fused layers on several threads: the same bits as on one, whoever calls and however many threads there are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_checks import ISAS, instruction_set, threads
from test_ops_encoder import EPS, FORMATS, make

from minilm_fast import ops

# Few rows, of which threads share the columns; more, of which each takes some; and groups of whole sequences.
LENGTHS = ([16], [17], [40], [3, 0, 5, 2], [2] * 20, [33, 1, 70], [100], [5] * 60, [300], [120] * 12)
# Hidden size, heads, inner size: heads of two panels, of one, of half a panel; columns that are no whole panels.
SHAPES = ((384, 12, 1536), (96, 6, 200), (64, 8, 160), (72, 3, 100))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    with threads(torch.get_num_threads()):
        yield


def rows(total: int, hidden: int) -> torch.Tensor:
    return torch.randn(total, hidden, generator=torch.Generator().manual_seed(total))


def run(layers: list[ops.EncoderLayer], lengths: list[int], hidden: int, heads: int) -> torch.Tensor:
    layout = ops.SequenceLayout.bidirectional(lengths)
    return ops.encoder_layers(rows(layout.total, hidden), layers, layout, heads, EPS)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(format: str, shape: tuple[int, int, int]) -> None:
    hidden, heads, inner = shape
    layers, _, _ = make(format, 2, hidden, inner)
    for lengths in LENGTHS:
        with threads(1):
            alone = run(layers, lengths, hidden, heads)
        for count in (2, 3, 5):
            with threads(count):
                assert torch.equal(run(layers, lengths, hidden, heads), alone), (lengths, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set(isa: str, format: str) -> None:
    layers, _, _ = make(format, 2, 96, 200)
    for lengths in ([9], [20, 3], [90]):
        with instruction_set(isa):
            with threads(1):
                alone = run(layers, lengths, 96, 6)
            with threads(3):
                assert torch.equal(run(layers, lengths, 96, 6), alone)


@pytest.mark.parametrize("format", FORMATS)
def test_one_token(format: str) -> None:
    layers, _, _ = make(format, 1, 384, 1536)
    with threads(1):
        alone = run(layers, [1], 384, 12)
    with threads(2):
        assert torch.equal(run(layers, [1], 384, 12), alone)


def test_masks_and_relative_bias() -> None:
    layers, _, _ = make("bf16", 2, 96, 200)
    layout = ops.SequenceLayout.pseudo_masked([8, 5], [5, 4])
    x = rows(layout.total, 96)
    bias = torch.randn(6, 21, generator=torch.Generator().manual_seed(3))
    at = torch.cat([torch.arange(18), torch.arange(13)]).int()
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(ops.encoder_layers(x, layers, layout, 6, EPS, relative_bias=bias, position_ids=at))
    assert torch.equal(*found)


def test_several_callers() -> None:
    """Each caller brings its own threads, so there are more threads than cores."""
    layers, _, _ = make("bf16", 3, 96, 200)
    cases = ([16], [70], [5, 3], [250])
    with threads(1):
        alone = [run(layers, lengths, 96, 6) for lengths in cases]

    def call(case: int) -> bool:
        torch.set_num_threads(3)
        return all(torch.equal(run(layers, cases[case], 96, 6), alone[case]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


SCRIPT = """
import os, sys
import torch
from test_encoder_threads import run
from test_ops_encoder import make

layers, _, _ = make("bf16", 2, 96, 200)
torch.set_num_threads(1)
alone = [run(layers, lengths, 96, 6) for lengths in ([16], [70])]
torch.set_num_threads(4)
def same():
    return all(torch.equal(run(layers, lengths, 96, 6), out) for lengths, out in zip(([16], [70]), alone))
assert same()
if "fork" in sys.argv:
    child = os.fork()
    if not child:
        os._exit(0 if same() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same()
"""


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["fork"], {}), ([], {"OMP_THREAD_LIMIT": "2"}), ([], {"OMP_THREAD_LIMIT": "1"}), ([], {"OMP_NUM_THREADS": "1"})],
    ids=str,
)
def test_forks_and_fewer_threads_than_asked_for(arguments: list[str], environment: dict[str, str]) -> None:
    """A forked child has none of its parent's threads; OpenMP may give fewer than were set."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env={**os.environ, "PYTHONPATH": paths, **environment},
        check=True, timeout=60,
    )  # fmt: skip
