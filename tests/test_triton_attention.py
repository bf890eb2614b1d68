"""The Triton kernels of attention against their specification, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_checks import DEVICE, DTYPES, EPSILON, assert_accurate, triton_backend

from minilm_fast import ops
from minilm_fast.errors import UserError
from minilm_fast.ops import SequenceLayout, _triton, reference
from minilm_fast.ops.dropout import dropout_factors

COUNTS = {
    "bidirectional": ([40, 1, 0, 16], [0] * 4, [0] * 4),
    "causal": ([0] * 4, [40, 0, 1, 23], [0] * 4),
    "seq2seq": ([20, 0, 17], [12, 7, 1], [0] * 3),
    "pseudo-masked": ([20, 0, 2], [13, 9, 1], [13, 9, 1]),
    "only pseudo, more pseudo than target, fewer": ([0, 3, 5], [0, 2, 20], [5, 8, 3]),
    "several tiles": ([33], [34], [34]),
}
SEED = torch.tensor([2**60 + 2**31 + 11])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens make full, partial and empty tiles."""
    module = _triton.kernels("attention")
    for name in ("forward_tiles", "backward_tiles"):
        monkeypatch.setattr(module, name, lambda *_: module.Tiles(16, 32, 4, 1))


class Case:
    """Random operands of one batch: views of a fused projection, or as many rows of q as ask."""

    def __init__(
        self, layout: SequenceLayout, size: int, dtype: torch.dtype, *, bias: str = "none", dropout: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * layout.total + size)
        heads = 2

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.layout = layout.to(DEVICE)
        self.inputs = list(normal(layout.total, 3, heads, size).to(dtype).unbind(1))
        if layout.cu_queries is not None:
            self.inputs[0] = normal(layout.total_queries, heads, size).to(dtype)
        self.grad = normal(layout.total_queries, heads, size).to(dtype)
        self.options: dict[str, Any] = {"scale": size**-0.5, "dropout": dropout, "seed": SEED, "position_ids": None}
        if bias != "none":
            self.inputs.append(normal(heads, 2 * 9 + 1))
            positions = torch.arange(layout.total, dtype=torch.int32)
            if bias == "scattered":
                positions = torch.randint(-5, 40, (layout.total,), dtype=torch.int32, generator=generator)
            self.options["position_ids"] = positions.to(DEVICE)

    def run(self, attention: Callable[..., Any], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Output, log-sum-exp, and the gradients of q, k, v and the bias."""
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.inputs]
        table = leaves[3] if len(leaves) > 3 else None
        out, lse = attention(*leaves[:3], self.layout, relative_bias=table, **self.options)
        # The specification does not tie what it returns for no rows to its operands.
        gradients = torch.autograd.grad(out + 0 * leaves[0], leaves, self.grad.to(out.dtype), allow_unused=True)
        return [
            *(out.detach(), lse.detach()),
            *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)),
        ]

    def ours(self) -> list[torch.Tensor]:
        with triton_backend():
            return self.run(ops.attention)

    def check(self) -> None:
        exact = self.run(reference.attention, torch.float64)
        for ours, right, allowance in zip(self.ours(), exact, self.roundings(), strict=False):
            assert_accurate(ours, right.to(ours.dtype), right, allowance)

    def roundings(self) -> list[float]:
        """What rounding the operands of each product to their type, and the exponents to fp32, makes of the results."""
        q, k, v, g = (x.double().norm().item() / max(x.numel(), 1) ** 0.5 for x in (*self.inputs[:3], self.grad))
        root, scale = self.grad.shape[2] ** 0.5, abs(self.options["scale"])
        unit = EPSILON * (2 + 3 * scale * q * k * root)
        unit += 0 if self.grad.dtype == torch.float32 else torch.finfo(self.grad.dtype).eps / 2
        terms = 2 * unit * g * v
        return [unit * v, EPSILON * 8, terms * root * scale * k, terms * root * scale * q, 2 * unit * g, terms * root]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_masks(counts: tuple[list[int], ...]) -> None:
    Case(SequenceLayout.from_counts(*counts), 32, torch.float32, dropout=0.1).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "bias"), [(32, "consecutive"), (64, "none"), (128, "scattered")])
def test_head_sizes_bias_and_types(size: int, dtype: torch.dtype, bias: str) -> None:
    layout = SequenceLayout.from_counts([19, 1], [17, 0], [17, 0])
    Case(layout, size, dtype, bias=bias, dropout=0.3).check()


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2), (torch.float16, 4)])
def test_polynomials(dtype: torch.dtype, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used, and the same accuracy is asked for."""
    case = Case(SequenceLayout.pseudo_masked([40, 3], [21, 9]), 32, dtype)
    before = case.ours()
    shares = _triton.kernels("exponential").ONE_IN
    for operator in ("attention", "attention_backward"):
        monkeypatch.setitem(shares, (operator, 32), share)
    assert not torch.equal(case.ours()[1], before[1])
    case.check()


@pytest.mark.parametrize("counts", [[0, 0, 0], [60, 7, 0], [40, 8, 2]])
def test_few_rows_ask(counts: list[int]) -> None:
    layout = SequenceLayout.from_counts([34, 0, 2], [13, 1, 0], [13, 7, 0]).with_queries(counts)
    Case(layout, 32, torch.float32, bias="consecutive", dropout=0.1).check()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    case = Case(SequenceLayout.pseudo_masked([20], [9]), 32, torch.float32)
    case.options["scale"] = scale
    case.check()


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_dropped_elements(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise those of the specification, for every width of a tile."""
    module = _triton.kernels("attention")
    monkeypatch.setattr(module, "forward_tiles", lambda *_: module.Tiles(64, columns, 4, 1))
    layout = SequenceLayout.from_counts([130, 0], [0, 0], [0, 2])
    q = torch.zeros(layout.total, 2, 128, device=DEVICE)
    v = torch.zeros_like(q)
    for start in (0, 2):
        v.zero_()
        for column in range(130):
            v[column, :, column - start if 0 <= column - start < 128 else 0] = float(0 <= column - start < 128)
        with triton_backend():
            out, _ = ops.attention(q, q, v, layout.to(DEVICE), dropout=0.4, seed=SEED)
        factors = dropout_factors(0.4, SEED, layout.total, 130, 2, DEVICE)[:, :130, start : start + 128]
        assert torch.equal(out[:130].transpose(0, 1) == 0, factors == 0)


def test_projection_is_the_same() -> None:
    """A fused projection, its queries apart or not, bitwise; the gradient comes in one tensor."""
    case = Case(SequenceLayout.pseudo_masked([20], [9]), 32, torch.float32, bias="consecutive", dropout=0.1)
    out, _, dq, dk, dv, dbias = case.ours()
    for queries in (None, case.inputs[0].clone().requires_grad_()):
        whole = torch.stack(case.inputs[:3] if queries is None else case.inputs[1:3], 1).requires_grad_()
        table = case.inputs[3].detach().requires_grad_()
        leaves = [whole, table, *([] if queries is None else [queries])]
        with triton_backend():
            found, _ = ops.projected_attention(whole, case.layout, queries=queries, relative_bias=table, **case.options)
            grad, bias, *own = torch.autograd.grad(found, leaves, case.grad)
        assert torch.equal(found, out) and torch.equal(bias, dbias)
        assert all(map(torch.equal, [*own, *grad.unbind(1)], [dq, dk, dv]))


def test_neighbours_change_nothing() -> None:
    """What is not a number in one sequence stays there, but for the bias, whose gradient is that of all."""
    case = Case(SequenceLayout.from_counts([20, 17], [5, 0], [5, 0]), 32, torch.float32, bias="consecutive")
    alone = case.ours()
    case.inputs[1] = case.inputs[1].clone()
    case.inputs[1][-1] = float("nan")
    case.grad[-3] = float("inf")
    spoilt = case.ours()
    for place in (0, 2, 3, 4):
        assert torch.equal(alone[place][:30], spoilt[place][:30]) and spoilt[place][30:].isnan().any()
    assert spoilt[5].isnan().all()


def test_opcheck() -> None:
    case = Case(SequenceLayout.pseudo_masked([5], [3]), 32, torch.float32, bias="consecutive")
    layout, options = case.layout, case.options
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    arguments = (layout.cu_seqlens, layout.segments, None, layout.max_seqlen, options["scale"])
    tail = (leaves[3], options["position_ids"], 0.1, SEED)
    with triton_backend():
        torch.library.opcheck(torch.ops.minilm_fast.triton_attention.default, (*leaves[:3], *arguments, *tail))


def test_larger_heads_have_a_reason() -> None:
    q = torch.zeros(3, 2, 129, device=DEVICE)
    layout = SequenceLayout.causal([3]).to(DEVICE)
    with triton_backend():
        with pytest.raises(UserError, match="head size 129 is above 128"):
            ops.attention(q, q, q, layout)
        with pytest.raises(UserError, match=r"float64, not fp16, bf16 or fp32"):
            ops.attention(*[torch.zeros(3, 2, 32, device=DEVICE).double()] * 3, layout)


Q = torch.zeros(3, 2, 32, device=DEVICE)
CU, SEGMENTS = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[1, 2, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[:, :, :31]}, "head size of q"),
        ({"q": Q[0]}, "q must be"),
        ({"k": Q[:2]}, "v must have the shape"),
        ({"v": Q.bfloat16()}, "v must be torch.float32 as q"),
        ({"k": Q.transpose(1, 2).contiguous().transpose(1, 2)}, "last dimension of k"),
        ({"cu": CU.long()}, "cu_seqlens must be int32"),
        ({"segments": SEGMENTS[:, :2]}, "segments must have the shape"),
        ({"bias": torch.zeros(2, 5)}, "relative_bias and position_ids go together"),
        ({"bias": torch.zeros(2, 4), "positions": CU}, "position_ids must have the shape"),
        ({"dropout": 0.1}, "dropout needs a seed"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        **dict.fromkeys("qkv", Q),
        **{"cu": CU, "segments": SEGMENTS, "queries": None, "longest": 3, "scale": 1.0},
        **{"bias": None, "positions": None, "dropout": 0.0, "seed": None},
    }
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (arguments | changes).values()]
    with triton_backend(), pytest.raises(RuntimeError, match=f"attention: .*{message}"):
        torch.ops.minilm_fast.triton_attention(*moved)
