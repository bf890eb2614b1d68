"""The emulated CUDA kernels in every order of threads and copies that the model knows: the bits stay the same.

A race shows in one of them: a warp that reads what another has not written yet, or writes what another still reads,
does so when one of the two runs first, or when a copy is carried out early.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import decode_steps
import pytest
import torch
from attention_cases import batch
from decode_steps import Shape
from emulated_cuda import operators, poisoned_results, schedule
from operator_calls import decoding_calls
from relation_cases import relation

from minilm_fast.ops import SequenceLayout

Call = tuple[str, list[Any]]
KINDS = ("backwards", "far", "early")
SCHEDULES = [dict(zip(KINDS, chosen, strict=True)) for chosen in itertools.product((False, True), repeat=3)]


def _attention(size: int, bias: int | None) -> Iterable[Call]:
    """Several tiles of rows and columns, full ones and others; a length of its own for each stage to end at."""
    layout = SequenceLayout.from_counts([200, 3], [70, 1], [70, 1])
    case = batch(layout, size, torch.bfloat16, bias=bias, heads=1, dropout=0.2)
    arguments = list(case.arguments())
    yield "attention", arguments
    results = operators().attention(*arguments)
    yield "attention_backward", [case.gradient(), *arguments[:3], *results, *arguments[3:], bias is not None]


def _relation_kl(sizes: tuple[int, int], kind: str) -> Iterable[Call]:
    """A sequence that all rows see whole, whose last rows are far from the others, and one that they do not."""
    layout = SequenceLayout.from_counts([300, 60], [0, 40], [0, 40])
    case = relation(layout, sizes, torch.bfloat16, kind, heads=1)
    for x in {id(x): x for x in case.operands}.values():
        x[270:300] *= 16
    arguments = case.arguments()
    yield "relation_kl", arguments
    _, *lse = operators().relation_kl(*arguments)
    yield "relation_kl_backward", [torch.tensor(1.7), *arguments[:4], *lse, *arguments[4:]]


def _decode_attention(size: int, dtype: torch.dtype) -> Iterable[Call]:
    shape = Shape(lengths=(400, 33), steps=(210, 1), beams=3, heads=1, size=size, source=400, history=211)
    yield "decode_attention", list(decode_steps.arguments(shape, dtype, dtype).values())


def _vocabulary(dtype: torch.dtype) -> Iterable[Call]:
    torch.manual_seed(0)
    bias, format = torch.randn(300), {torch.float32: 0, torch.bfloat16: 1}[dtype]
    # The last step lies in the last, or in the first stage, which the sums take the place of.
    for features in (384, 448):
        weight = torch.randn(300, features).to(dtype)
        yield "lm_head_topk", [torch.randn(70, features), weight, bias, 300, format, 5, None, -1, None]


def _step_linear(rows: int) -> Iterable[Call]:
    torch.manual_seed(0)
    bias, residual = torch.randn(200), torch.randn(rows, 200).bfloat16()
    # As above, for every number of stages.
    for features in (640, 768, 896):
        x, weight = torch.randn(rows, features), torch.randn(200, features).bfloat16()
        norm = list(torch.randn(2, features))
        yield "step_linear", [x, weight, bias, residual, *norm, 1e-5, 1, True, rows > 10]
        yield "step_linear", [x.bfloat16(), weight, bias, residual, None, None, 0.0, 0, True, rows > 10]


def _small() -> Iterable[Call]:
    torch.manual_seed(0)
    # A weight packed for a CPU is no weight for a GPU.
    yield from (call for call in decoding_calls("cpu") if call[0] != "lm_head_topk")


CASES: dict[str, Callable[[], Iterable[Call]]] = {
    **{f"attention {size}": lambda size=size: _attention(size, None) for size in (32, 64, 128)},
    "attention 32 with a bias": lambda: _attention(32, 9),
    **{f"relation_kl, {kind}": lambda kind=kind: _relation_kl((64, 32), kind) for kind in ("distinct", "symmetric")},
    "relation_kl 16": lambda: _relation_kl((16, 8), "symmetric student"),
    "relation_kl 128": lambda: _relation_kl((128, 64), "symmetric"),
    "decode_attention 32": lambda: _decode_attention(32, torch.bfloat16),
    "decode_attention 128": lambda: _decode_attention(128, torch.float32),
    "lm_head_topk bf16": lambda: _vocabulary(torch.bfloat16),
    "lm_head_topk fp32": lambda: _vocabulary(torch.float32),
    "step_linear, few rows": lambda: _step_linear(5),
    "step_linear, more rows": lambda: _step_linear(70),
    "small calls": _small,
}


def _results(name: str, arguments: list[Any]) -> list[torch.Tensor]:
    """What an operator returns and its tensors afterwards."""
    own = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    with poisoned_results():
        found = getattr(operators(), name)(*own)
    found = found if isinstance(found, (list, tuple)) else [found]
    return [x for x in [*found, *own] if isinstance(x, torch.Tensor)]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8) if x.numel() else x


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_schedule_gives_the_same_bits(case: Callable[[], Iterable[Call]]) -> None:
    for name, arguments in case():
        expected = _results(name, arguments)
        for chosen in SCHEDULES[1:]:
            with schedule(**chosen):
                found = _results(name, arguments)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(_bits(mine), _bits(theirs)), (name, chosen)
