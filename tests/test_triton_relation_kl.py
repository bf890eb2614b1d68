"""The Triton kernels of the distillation loss against their specification, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_checks import DEVICE, assert_accurate, triton_backend

from minilm_fast import ops
from minilm_fast.errors import UserError
from minilm_fast.ops import SequenceLayout, _triton, reference

COUNTS = {
    "bidirectional": ([40, 1, 0, 16], [0] * 4, [0] * 4),
    "causal": ([0] * 3, [40, 0, 3], [0] * 3),
    "seq2seq": ([20, 0, 17], [12, 7, 1], [0] * 3),
    "pseudo-masked": ([20, 0], [13, 9], [13, 9]),
    "only pseudo, more pseudo than target, fewer": ([0, 3, 5], [0, 2, 20], [5, 8, 3]),
    "no token": ([0], [0], [0]),
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
FLOATS = (torch.float32, torch.float32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens make full, partial and empty tiles."""
    module = _triton.kernels("relation_kl")
    monkeypatch.setattr(module, "tiles", lambda *_: module.Tiles(16, 16, 4, 1))


def _inputs(tokens: int, sizes: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> Inputs:
    """Teacher and student as views of fused projections: last dimension contiguous, the others not."""
    generator = torch.Generator().manual_seed(1000 * tokens + sum(sizes))
    ta, tb, sa, sb = (
        x
        for size, dtype in zip(sizes, dtypes, strict=True)
        for x in torch.randn(tokens, 2, 2, size, generator=generator).to(DEVICE, dtype).unbind(1)
    )
    if kind == "distinct":
        return ta, tb, sa, sb
    return ta, ta if kind == "symmetric" else tb, sa, sa


def _run(function: Callable[..., torch.Tensor], inputs: Inputs, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    """Loss and the student's gradients; the tensor that comes twice is one leaf."""
    ta, tb, sa, sb = inputs
    a = sa.detach().requires_grad_()
    b = a if sb is sa else sb.detach().requires_grad_()
    loss = function(ta, tb, a, b, *arguments, **options)
    upstream = torch.tensor(1.7, dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, [a] if b is a else [a, b], upstream)]


def _check(inputs: Inputs, layout: SequenceLayout, **options: Any) -> None:
    layout = layout.to(DEVICE)
    scales = {f"{side}_scale": x.shape[2] ** -0.5 for side, x in zip(("teacher", "student"), inputs[1:3], strict=True)}
    found = {id(x): x.double() for x in inputs}
    exact = tuple(found[id(x)] for x in inputs)
    with triton_backend():
        ours = _run(ops.relation_kl, inputs, layout, **options)

    def specification(*inputs: Any, **options: Any) -> torch.Tensor:
        return reference.relation_kl(*inputs, **options)[0]

    eager, right = (_run(specification, x, layout, **(scales | options)) for x in (inputs, exact))
    # Eager multiplies the fp32 differences of probabilities where the kernel rounds them to the type of the student.
    rounding = 0.0 if inputs[2].dtype == torch.float32 else torch.finfo(inputs[2].dtype).eps
    for place, results in enumerate(zip(ours, eager, right, strict=True)):
        size = results[2].abs().max().item() if results[2].numel() else 0.0
        assert_accurate(*results, size * rounding if place else 2e-7)


@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_masks(kind: str, counts: tuple[list[int], ...]) -> None:
    layout = SequenceLayout.from_counts(*counts)
    _check(_inputs(layout.total, (24, 16), FLOATS, kind), layout)


@pytest.mark.parametrize("sizes", [(8, 8), (12, 33), (128, 32)])
def test_head_sizes(sizes: tuple[int, int]) -> None:
    layout = SequenceLayout.bidirectional([19, 1])
    _check(_inputs(layout.total, sizes, FLOATS, "symmetric student"), layout)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_types(dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    layout = SequenceLayout.bidirectional([35, 7])
    _check(_inputs(layout.total, (16, 8), dtypes, kind), layout)


@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_polynomials(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One exponential in two, and the same accuracy is asked for."""
    shares = _triton.kernels("exponential").ONE_IN
    for operator in ("relation_kl", "relation_kl_backward"):
        monkeypatch.setitem(shares, (operator, 64), 2)
    layout = SequenceLayout.bidirectional([40, 1, 17])
    _check(_inputs(layout.total, (64, 32), (dtype, dtype), kind), layout)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"reduction": "token_mean"}, {"student_scale": -0.7}])
def test_options(options: dict[str, Any]) -> None:
    layout = SequenceLayout.pseudo_masked([17, 3], [4, 0])
    _check(_inputs(layout.total, (16, 8), FLOATS, "distinct"), layout, **options)


def test_one_relation_twice_is_zero() -> None:
    layout = SequenceLayout.bidirectional([20, 3]).to(DEVICE)
    _, _, a, b = _inputs(23, (16, 16), FLOATS, "distinct")
    with triton_backend():
        loss, *gradients = _run(ops.relation_kl, (a, b, a, b), layout)
    assert abs(loss.item()) < 1e-6 and all(g.abs().max() < 1e-7 for g in gradients)


def test_opcheck() -> None:
    layout = SequenceLayout.bidirectional([5, 2]).to(DEVICE)
    ta, tb, sa, sb = _inputs(7, (16, 8), FLOATS, "distinct")
    options = (layout.cu_seqlens, layout.segments, layout.max_seqlen, 0.3, 0.4, "batch_mean")
    leaves = [x.detach().requires_grad_() for x in (sa, sb)]
    with triton_backend():
        torch.library.opcheck(torch.ops.minilm_fast.triton_relation_kl.default, (ta, tb, *leaves, *options))


def test_reasons() -> None:
    layout = SequenceLayout.bidirectional([3]).to(DEVICE)
    for size in (7, 129):
        x = torch.zeros(3, 2, size, device=DEVICE)
        with triton_backend(), pytest.raises(UserError, match=f"head size {size} is not between 8 and 128"):
            ops.relation_kl(x, x, x, x, layout)
