"""The Triton kernels of the label-smoothed cross-entropy against their specification, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_checks import DEVICE, DTYPES, assert_accurate, triton_backend

from minilm_fast import ops
from minilm_fast.ops import _triton, reference

ROWS = 21


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows and words make several chunks and blocks."""
    module = _triton.kernels("loss")
    monkeypatch.setattr(module, "_chunk", lambda _: 8)
    monkeypatch.setattr(module, "_block", lambda _: 64)


def _operands(vocabulary: int, channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    hidden, weight = (torch.randn(n, channels, generator=generator).to(dtype) for n in (ROWS, vocabulary))
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (ROWS,), generator=generator)
    labels[::5] = 0
    return [x.to(DEVICE) for x in (hidden, weight, bias, labels)]


def _run(function: Callable[..., torch.Tensor], operands: list[torch.Tensor], smoothing: float) -> list[torch.Tensor]:
    """The loss and the gradients of hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in operands[:3]]
    loss = function(*leaves, operands[3], smoothing)
    upstream = torch.linspace(-1, 2, ROWS, dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [3, 150])
def test_against_the_specification(dtype: torch.dtype, smoothing: float, vocabulary: int) -> None:
    operands = _operands(vocabulary, 12, dtype)
    with triton_backend():
        ours = _run(ops.label_smoothed_cross_entropy, operands, smoothing)
    wide = [x.double() if x.is_floating_point() else x for x in operands]
    eager, exact = (_run(reference.label_smoothed_cross_entropy, x, smoothing) for x in (operands, wide))
    # Eager multiplies fp32 gradients of the logits where these are rounded to the type of the operands.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for place, results in enumerate(zip(ours, eager, exact, strict=True)):
        assert_accurate(*results, results[2].abs().max().item() * rounding if place else 0.0)


def test_large_logits() -> None:
    """Far from 0 on either side, and a loss that is all but 0."""
    operands = _operands(70, 12, torch.float32)
    operands[2] += torch.linspace(-900, 900, 70, device=DEVICE)
    operands[3][:] = 69
    with triton_backend():
        loss, *gradients = _run(ops.label_smoothed_cross_entropy, operands, 0.0)
    assert loss.abs().max() < 1e-3 and all(g.isfinite().all() for g in gradients)


def test_what_is_asked_for() -> None:
    operands = _operands(30, 12, torch.float32)
    with triton_backend():
        whole = _run(ops.label_smoothed_cross_entropy, operands, 0.1)
        for place in range(3):
            leaves = [x.detach().requires_grad_(i == place) for i, x in enumerate(operands[:3])]
            loss = ops.label_smoothed_cross_entropy(*leaves, operands[3], 0.1)
            (gradient,) = torch.autograd.grad(loss, leaves[place], torch.linspace(-1, 2, ROWS, device=DEVICE))
            assert torch.equal(gradient, whole[1 + place])


def test_labels_out_of_range_show() -> None:
    operands = _operands(30, 12, torch.float32)
    operands[3][1], operands[3][2] = -1, 30
    with triton_backend():
        loss = ops.label_smoothed_cross_entropy(*operands, 0.1)
    assert loss.isnan().nonzero().flatten().tolist() == [1, 2]


def test_no_rows_and_opcheck() -> None:
    hidden, weight, bias, labels = _operands(30, 12, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with triton_backend():
        loss = ops.label_smoothed_cross_entropy(hidden[:0], weight, bias, labels[:0], 0.1)
        assert loss.shape == (0,)
        gradients = torch.autograd.grad(loss.sum(), [weight, bias])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
        op = torch.ops.minilm_fast.triton_label_smoothed_cross_entropy.default
        torch.library.opcheck(op, (*leaves, labels, 0.1))


X, BIAS, LABELS = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE).long()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), X, BIAS, LABELS, 0.1), "hidden must be fp16"),
        ((X, X[:, :7], BIAS, LABELS, 0.1), "weight must have the shape"),
        ((X, X, BIAS[:3], LABELS, 0.1), "bias must have the shape"),
        ((X, X, BIAS, LABELS.int(), 0.1), "labels must be int64"),
        ((X, X, BIAS, LABELS[:3], 0.1), "labels must have the shape"),
        ((X, X[:2], BIAS[:2], LABELS, 0.1), "weight has too few rows"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with triton_backend(), pytest.raises(RuntimeError, match=f"label_smoothed_cross_entropy: .*{message}"):
        torch.ops.minilm_fast.triton_label_smoothed_cross_entropy(*arguments)
