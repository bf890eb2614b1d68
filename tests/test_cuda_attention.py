"""The CUDA kernel of attention, emulated on a CPU, against its specification."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import BATCHES, SEED, Batch, batch
from emulated_cuda import operators, poisoned_results, running_backwards
from torch._subclasses.fake_tensor import FakeTensorMode

from minilm_fast import backend, ops
from minilm_fast.errors import UserError
from minilm_fast.ops import SequenceLayout, _cuda, _dispatch, _triton, reference
from minilm_fast.ops.dropout import dropout_factors


def _run(case: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_results():
        return operators().attention(*case.arguments())


def _check(case: Batch) -> None:
    out, lse = _run(case)
    case.check(out, lse)
    with running_backwards():
        again = _run(case)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES.keys())
def test_batches(make: Callable[[], Batch]) -> None:
    _check(make())


def test_dropped_elements() -> None:
    """Bitwise those of the specification."""
    layout = SequenceLayout.from_counts([130, 0], [0, 0], [70, 2])
    case = batch(layout, 128, torch.float16, dropout=0.4)
    case.operands[0] = torch.zeros_like(case.operands[0])
    factors = dropout_factors(0.4, SEED, layout.total, 200, 2)
    visible = layout.dense_mask()[0, :200, :200]
    for start in (0, 128):
        v = torch.zeros(layout.total, 2, 128, dtype=torch.float16)
        width = min(128, 200 - start)
        v[start : start + width] = torch.eye(width, 128, dtype=torch.float16)[:, None]
        case.operands[2] = v
        out = _run(case)[0][:200, :, :width].transpose(0, 1)
        kept = (factors[:, :200, start : start + width] != 0) & visible[:, start : start + width]
        assert torch.equal(out != 0, kept)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0])
@pytest.mark.parametrize("bias", [None, 3])
def test_scales_of_any_sign(scale: float, bias: int | None) -> None:
    """With a large scale the maxima are raised again and again, and most exponents are far below the smallest."""
    _check(batch(SequenceLayout.pseudo_masked([130, 20], [9, 9]), 32, torch.float16, scale=scale, bias=bias))


def test_maxima_that_keep_growing() -> None:
    """By less and by more than what a maximum may lag behind; the last columns count most."""
    case = batch(SequenceLayout.bidirectional([330]), 64, torch.float16, scale=1.0)
    growth = torch.linspace(-4, 40, 330).half()
    case.operands[0] = torch.zeros_like(case.operands[0]).index_fill_(2, torch.tensor([0]), 1.0)
    case.operands[1] = case.operands[0].clone()
    case.operands[1][:, :, 0] = growth[:, None]
    _check(case)


def test_neighbours_change_nothing() -> None:
    """What is not a number in one sequence stays there, and in the rows that see it everything is NaN."""
    case = batch(SequenceLayout.from_counts([70, 66, 3], [5, 0, 0], [5, 0, 0]), 32, torch.bfloat16)
    out, lse = _run(case)
    for place in (1, 2):
        spoilt = batch(case.layout, 32, torch.bfloat16)
        spoilt.operands[place] = spoilt.operands[place].clone()
        spoilt.operands[place][100] = float("nan")
        found, found_lse = _run(spoilt)
        sequence = torch.zeros(case.layout.total, dtype=torch.bool)
        sequence[80:146] = True
        assert torch.equal(found[~sequence], out[~sequence]) and found[sequence].isnan().all()
        assert torch.equal(found_lse[:, ~sequence], lse[:, ~sequence])
        assert found_lse[:, sequence].isnan().all() == (place == 1)


def test_a_sequence_alone_gives_the_same() -> None:
    """Bitwise."""
    case = batch(SequenceLayout.from_counts([70, 66], [5, 7], [5, 0]), 32, torch.float16)
    out, lse = _run(case)
    alone = batch(SequenceLayout.from_counts([66], [7], [0]), 32, torch.float16)
    alone.operands = [x[80:] for x in case.operands]
    found, found_lse = _run(alone)
    assert torch.equal(found, out[80:]) and torch.equal(found_lse, lse[:, 80:])


def test_projection_is_the_same() -> None:
    """A fused projection, its queries apart or not, bitwise; also where rows are not aligned and are copied."""
    case = batch(SequenceLayout.pseudo_masked([20], [9]), 64, torch.float16, bias=5)
    tail = case.arguments()[3:]
    out, lse = _run(case)
    whole = torch.stack(case.operands, 1)
    odd = torch.full((*whole.shape[:3], 65), float("nan"), dtype=torch.float16)
    odd[..., 1:] = whole
    for projection in (whole, odd[..., 1:]):
        for arguments in ((projection, None), (projection[:, 1:], case.operands[0])):
            found = operators().projected_attention(*arguments, *tail)
            assert torch.equal(found[0], out) and torch.equal(found[1], lse)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int]) -> None:
    out, lse = _run(batch(SequenceLayout.bidirectional(lengths), 32, torch.float16))
    assert out.shape == (0, 2, 32) and lse.shape == (2, 0)


def test_triton_differentiates_what_it_leaves() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    case = batch(SequenceLayout.from_counts([33, 5], [7, 9], [7, 0]), 32, torch.float16, bias=4)
    case.operands = [x.contiguous() for x in case.operands]
    grad = torch.randn(case.operands[0].shape, generator=torch.Generator().manual_seed(3)).half()
    arguments = case.arguments()
    found = torch.ops.minilm_fast.triton_attention_backward(
        grad, *arguments[:3], *_run(case), *arguments[3:], bias_gradient=True
    )
    leaves = [x.double().requires_grad_() for x in (*case.operands, case.relative_bias)]
    out, _ = reference.attention(
        *(*leaves[:3], case.layout), scale=case.scale, relative_bias=leaves[3], position_ids=case.position_ids
    )
    for ours, exact in zip(found, torch.autograd.grad(out, leaves, grad.double()), strict=True):
        assert (ours.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize(
    ("usable", "chosen"),
    [({"triton", "cuda"}, "triton"), ({"cuda"}, "cuda"), (set(), "reference")],
)
def test_triton_comes_first(usable: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(name: str, *_: object) -> str | None:
        return None if name in usable | {"reference"} else "not here"

    monkeypatch.setattr(_dispatch, "unusable", unusable)
    monkeypatch.setattr(_dispatch, "_warn_once", lambda *_: None)
    with FakeTensorMode():
        q = torch.empty(3, 2, 32, dtype=torch.float16, device="cuda")
    for operator in ("attention", "projected_attention"):
        assert _dispatch.select(operator, q) == chosen
    assert _dispatch.select("decode_attention", q) == ("cuda" if "cuda" in usable else chosen)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((3, 2, 32), torch.float32, "float32, not fp16 or bf16"),
        ((3, 2, 129), torch.float16, "head size 129 is above 128"),
    ],
)
def test_what_it_cannot_do_has_a_reason(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "unusable", lambda *_: None)
    q = torch.zeros(shape, dtype=dtype)
    with backend("cuda"), pytest.raises(UserError, match=f"backend 'cuda' cannot run attention: .*{reason}"):
        ops.attention(q, q, q, SequenceLayout.causal([3]))


def test_padded_gradients_know_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of their own, in the backward pass, is made with the same reasons."""
    asked: list[dict[str, str | None]] = []
    module = sys.modules["minilm_fast.ops.padded_attention"]

    def select(*tensors: object, refusals: dict[str, str | None]) -> str:
        asked.append(refusals)
        return "reference"

    monkeypatch.setattr(module, "select", select)
    q = torch.randn(1, 3, 2, 48, requires_grad=True)
    ops.padded_attention(q, q, q).sum().backward()
    assert asked[-1]["triton"] is None and "float32, not fp16" in str(asked[-1]["cuda"])


def test_a_gradient_of_a_far_bias_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "unusable", lambda *_: None)
    monkeypatch.setattr(_triton, "unusable", lambda *_: "there is no triton")
    layout = SequenceLayout.causal([3])
    with FakeTensorMode(allow_non_fake_inputs=True), backend("cuda"):
        q = torch.empty(3, 2, 32, dtype=torch.float16, device="cuda", requires_grad=True)
        bias = torch.empty(2, 2051, device="cuda", requires_grad=True)
        options = {"relative_bias": bias, "position_ids": torch.empty(3, dtype=torch.int32, device="cuda")}
        with torch.no_grad():
            ops.attention(q, q, q, layout, **options)
        with pytest.raises(UserError, match="beyond the distance 1024 is Triton's, and there is no triton"):
            ops.attention(q, q, q, layout, **options)


Q = torch.zeros(3, 2, 32, dtype=torch.float16)
CU, SEGMENTS = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[1, 2, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q.float()}, "q must be"),
        ({"q": Q[:, :, :31]}, "head size of q must be 32, 64 or 128"),
        ({"q": Q[0]}, "q must be"),
        ({"k": Q[:2]}, "v must have the shape"),
        ({"v": Q.bfloat16()}, "v must be"),
        ({"cu": CU.long()}, "cu_seqlens must be"),
        ({"cu": CU[:1]}, "cu_seqlens must have the shape"),
        ({"segments": SEGMENTS[:, :2]}, "segments must have the shape"),
        ({"queries": CU[:1]}, "cu_queries must have the shape"),
        ({"longest": -1}, "batch is too large"),
        ({"bias": torch.zeros(2, 5)}, "relative_bias and position_ids go together"),
        ({"bias": torch.zeros(2, 4), "positions": SEGMENTS[0]}, "relative_bias must have an odd number"),
        ({"bias": torch.zeros(2, 5), "positions": CU}, "position_ids must have the shape"),
        ({"dropout": 0.1}, "dropout needs a seed"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dropout": 0.1, "seed": torch.tensor([-1])}, "seed must not be negative"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        **dict.fromkeys("qkv", Q),
        **{"cu": CU, "segments": SEGMENTS, "queries": None, "longest": 3, "scale": 1.0},
        **{"bias": None, "positions": None, "dropout": 0.0, "seed": None},
    }
    with pytest.raises(RuntimeError, match=f"attention: .*{message}"):
        operators().attention(*(arguments | changes).values())


def test_a_bad_projection() -> None:
    with pytest.raises(RuntimeError, match=r"projected_attention: projection must be \[tokens, 3"):
        operators().projected_attention(Q, None, CU, SEGMENTS, None, 3, 1.0, None, None, 0.0, None)
