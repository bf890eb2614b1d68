"""The CUDA kernels of attention's backward pass, emulated on a CPU, against its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import COUNTS, DTYPES, Batch, batch
from emulated_cuda import operators, poisoned_results, running_backwards

from minilm_fast.ops import SequenceLayout


def _run(case: Batch, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    arguments = case.arguments()
    with poisoned_results():
        results = operators().attention(*arguments)
        return operators().attention_backward(grad, *arguments[:3], *results, *arguments[3:], False)[:3]


def _check(case: Batch) -> None:
    grad = case.gradient()
    found = _run(case, grad)
    case.check_gradients(grad, *found)
    with running_backwards():
        assert all(map(torch.equal, _run(case, grad), found))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(counts: tuple[list[int], ...], dtype: torch.dtype) -> None:
    _check(batch(SequenceLayout.from_counts(*counts), 32, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bias", [None, 9])
def test_head_sizes_and_bias(size: int, dtype: torch.dtype, bias: int | None) -> None:
    _check(batch(SequenceLayout.from_counts([70, 1], [21, 0], [21, 0]), size, dtype, bias=bias, heads=1))


@pytest.mark.parametrize("counts", [[0, 0, 0], [160, 7, 0], [40, 8, 2]])
@pytest.mark.parametrize("bias", [None, 200])
def test_few_rows_ask(counts: list[int], bias: int | None) -> None:
    layout = SequenceLayout.from_counts([134, 0, 2], [13, 1, 0], [13, 7, 0]).with_queries(counts)
    _check(batch(layout, 32, torch.bfloat16, bias=bias))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bias", [None, 9])
def test_dropout(size: int, bias: int | None) -> None:
    """Sequences longer than the 128 columns of one draw."""
    layout = SequenceLayout.from_counts([240, 1], [40, 0], [40, 0])
    _check(batch(layout, size, torch.float16, bias=bias, heads=1, dropout=0.3))
    few = layout.with_queries([70, 1])
    _check(batch(few, size, torch.bfloat16, bias=bias, heads=2, dropout=0.1))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0])
def test_scales_of_any_sign(scale: float) -> None:
    _check(batch(SequenceLayout.pseudo_masked([130, 20], [9, 9]), 32, torch.float16, scale=scale))


def test_neighbours_change_nothing() -> None:
    """What is not a number in one sequence stays there."""
    case = batch(SequenceLayout.from_counts([70, 66, 3], [5, 0, 0], [5, 0, 0]), 32, torch.bfloat16)
    grad = case.gradient()
    found = _run(case, grad)
    sequence = torch.zeros(case.layout.total, dtype=torch.bool)
    sequence[80:146] = True
    for place in range(4):
        spoilt = batch(case.layout, 32, torch.bfloat16)
        changed = grad if place == 3 else spoilt.operands[place]
        changed = changed.clone()
        changed[100] = float("nan")
        if place < 3:
            spoilt.operands[place] = changed
        gradients = _run(spoilt, changed if place == 3 else grad)
        for i, (mine, theirs) in enumerate(zip(gradients, found, strict=True)):
            assert torch.equal(mine[~sequence], theirs[~sequence])
            # That of v does not depend on v.
            assert mine[sequence].isnan().any() == ((place, i) != (2, 2))


def test_a_sequence_alone_gives_the_same() -> None:
    """Bitwise."""
    case = batch(SequenceLayout.from_counts([70, 66], [5, 7], [5, 0]), 32, torch.float16)
    grad = case.gradient()
    found = _run(case, grad)
    alone = batch(SequenceLayout.from_counts([66], [7], [0]), 32, torch.float16)
    alone.operands = [x[80:] for x in case.operands]
    assert all(torch.equal(mine, theirs[80:]) for mine, theirs in zip(_run(alone, grad[80:]), found, strict=True))


def test_projection_is_the_same() -> None:
    """A fused projection, its queries apart or not, bitwise; also where rows are not aligned and are copied."""
    case = batch(SequenceLayout.pseudo_masked([20], [9]), 64, torch.float16, bias=5)
    grad = case.gradient()
    found = _run(case, grad)
    arguments = case.arguments()
    results = operators().attention(*arguments)
    whole = torch.stack(case.operands, 1)
    odd = torch.full((*whole.shape[:3], 65), float("nan"), dtype=torch.float16)
    odd[..., 1:] = whole
    expanded = grad[..., :1].expand_as(grad)
    for projection in (whole, odd[..., 1:]):
        for queries in (None, case.operands[0]):
            given = (projection, None) if queries is None else (projection[:, 1:], queries)
            with poisoned_results():
                together, own, bias = operators().projected_attention_backward(
                    grad, *given, *results, *arguments[3:], False
                )
            gradients = together.unbind(1) if queries is None else (own, *together.unbind(1))
            assert all(map(torch.equal, gradients, found)) and bias.numel() == 0
            assert own.numel() == (0 if queries is None else queries.numel())
    assert all(map(torch.equal, _run(case, expanded), _run(case, expanded.contiguous())))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int]) -> None:
    case = batch(SequenceLayout.bidirectional(lengths), 32, torch.float16)
    assert [x.shape for x in _run(case, case.gradient())] == [(0, 2, 32)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_out": torch.zeros(3, 2, 64).half()}, "grad_out must have the shape"),
        ({"grad_out": torch.zeros(3, 2, 32)}, "grad_out must be"),
        ({"out": torch.zeros(2, 2, 32).half()}, "out must have the shape"),
        ({"lse": torch.zeros(2, 2)}, "lse must have the shape"),
        ({"lse": torch.zeros(2, 3).half()}, "lse must be"),
        ({"q": torch.zeros(3, 2, 32)}, "q must be"),
        ({"bias_gradient": True}, "no gradient of relative_bias"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    layout = SequenceLayout.from_counts([1], [2], [0])
    rows = torch.zeros(3, 2, 32).half()
    arguments: dict[str, Any] = {
        **dict.fromkeys(("grad_out", "q", "k", "v", "out"), rows),
        **{"lse": torch.zeros(2, 3), "cu": layout.cu_seqlens, "segments": layout.segments, "queries": None},
        **{"longest": 3, "scale": 1.0, "bias": None, "positions": None, "dropout": 0.0, "seed": None},
        "bias_gradient": False,
    }
    with pytest.raises(RuntimeError, match=f"attention_backward: .*{message}"):
        operators().attention_backward(*(arguments | changes).values())
