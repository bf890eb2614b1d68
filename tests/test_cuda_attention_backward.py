"""The CUDA kernels of attention's backward pass, emulated on a CPU, against its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import BATCHES, Batch, batch
from emulated_cuda import operators, poisoned_results, running_backwards

from minilm_fast.ops import SequenceLayout


def _run(case: Batch, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """With the gradient of the bias, if there is one."""
    arguments = case.arguments()
    wanted = case.relative_bias is not None
    with poisoned_results():
        results = operators().attention(*arguments)
        found = operators().attention_backward(grad, *arguments[:3], *results, *arguments[3:], wanted)
    assert found[3].numel() == (case.relative_bias.numel() if wanted else 0)
    return found if wanted else found[:3]


def _check(case: Batch) -> None:
    grad = case.gradient()
    found = _run(case, grad)
    case.check_gradients(grad, *found)
    with running_backwards():
        assert all(map(torch.equal, _run(case, grad), found))


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES.keys())
def test_batches(make: Callable[[], Batch]) -> None:
    _check(make())


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
            wanted = operators().projected_attention_backward(grad, *given, *results, *arguments[3:], True)
            assert all(map(torch.equal, wanted, (together, own, found[3])))
            assert own.numel() == (0 if queries is None else queries.numel())
    assert all(map(torch.equal, _run(case, expanded), _run(case, expanded.contiguous())))


@pytest.mark.parametrize("limit", [0, 1, 60, 1024])
def test_distances(limit: int) -> None:
    """Positions in order, as a model has them; with the last limit none is clamped."""
    case = batch(SequenceLayout.pseudo_masked([90], [20]), 32, torch.float16, bias=limit)
    case.position_ids = torch.cat([torch.arange(110), torch.arange(90, 110)]).int()
    _check(case)


def test_gradients_of_very_different_sizes() -> None:
    """Fixed point serves the rows with small ones too, where they have distances of their own."""
    case = batch(SequenceLayout.bidirectional([64, 64]), 32, torch.float16, bias=400)
    case.position_ids = torch.cat([torch.arange(64), 3 * torch.arange(64)]).int()
    grad = case.gradient()
    grad[:64] *= 2.0**-12
    case.check_gradients(grad, *_run(case, grad))
    small, exact = (batch(SequenceLayout.bidirectional([64]), 32, torch.float16, bias=400) for _ in range(2))
    for part in (small, exact):
        part.operands, part.relative_bias = [x[:64] for x in case.operands], case.relative_bias
        part.position_ids = case.position_ids[:64]
    alone = _run(small, grad[:64])[3]
    # Distances that are no multiples of 3 are those of the first sequence only.
    places = torch.arange(801) % 3 != 1
    assert (alone - _run(case, grad)[3])[:, places].norm() < 1e-4 * alone[:, places].norm()


def test_no_numbers_in_the_gradient_of_the_bias() -> None:
    """It is that of all sequences."""
    for place in range(4):
        case = batch(SequenceLayout.bidirectional([20, 40]), 32, torch.float16, bias=3)
        grad = case.gradient()
        case.operands = [x.clone() for x in case.operands]
        (*case.operands, grad)[place][50] = float("inf" if place == 3 else "nan")
        assert _run(case, grad)[3].isnan().all()


@pytest.mark.parametrize("bias", [None, 4])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int], bias: int | None) -> None:
    case = batch(SequenceLayout.bidirectional(lengths), 32, torch.float16, bias=bias)
    *found, last = _run(case, case.gradient())
    assert all(x.shape == (0, 2, 32) for x in found)
    assert torch.equal(last, torch.zeros(2, 9)) if bias else last.shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_out": torch.zeros(3, 2, 64).half()}, "grad_out must have the shape"),
        ({"grad_out": torch.zeros(3, 2, 32)}, "grad_out must be"),
        ({"out": torch.zeros(2, 2, 32).half()}, "out must have the shape"),
        ({"lse": torch.zeros(2, 2)}, "lse must have the shape"),
        ({"lse": torch.zeros(2, 3).half()}, "lse must be"),
        ({"q": torch.zeros(3, 2, 32)}, "q must be"),
        ({"bias_gradient": True}, "there is no relative_bias"),
        (
            {"bias_gradient": True, "bias": torch.zeros(2, 2051), "positions": torch.zeros(3, dtype=torch.int32)},
            "relative_bias up to the distance 1024, got one up to 1025",
        ),
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
