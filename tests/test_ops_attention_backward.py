"""The gradients of the packed attention: C++ against its specification, and the specification against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, EPSILON, ISAS, assert_accurate, instruction_set, threads

from minilm_fast import ops
from minilm_fast.ops import SequenceLayout, reference
from minilm_fast.ops.attention import _reference_backward, _reference_projected_backward
from minilm_fast.ops.dropout import dropout_factors

COUNTS = {
    "bidirectional": ([64, 1, 0, 33], [0] * 4, [0] * 4),
    "causal": ([0] * 4, [60, 0, 1, 23], [0] * 4),
    "seq2seq": ([30, 0, 17], [12, 7, 1], [0] * 3),
    "pseudo-masked": ([30, 0, 2], [13, 20, 1], [13, 20, 1]),
    "only pseudo, more pseudo than target, fewer": ([0, 3, 5], [0, 2, 20], [9, 8, 3]),
    "several key blocks": ([130, 5, 0], [40, 140, 260], [0, 140, 0]),
    "no sequence": ([], [], []),
    "no token": ([0], [0], [0]),
}
SEED = torch.tensor([2**60 + 11])


class Case:
    """Random operands of one batch: views of a fused projection, or as many rows of q as ask."""

    def __init__(
        self,
        layout: SequenceLayout,
        size: int,
        dtype: torch.dtype,
        *,
        heads: int = 2,
        bias: str = "none",
        dropout: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * layout.total + size)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.layout = layout
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
            self.options["position_ids"] = positions

    def gradients(self, attention: Callable[..., Any], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Of q, k, v and the bias; the operands brought to another dtype first."""
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.inputs]
        table = leaves[3] if len(leaves) > 3 else None
        out, _ = attention(*leaves[:3], self.layout, relative_bias=table, **self.options)
        if out.numel():
            out.backward(self.grad.to(out.dtype))
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    def eager(self) -> list[torch.Tensor]:
        """What a PyTorch user would write, in the dtype of q."""
        return self.gradients(_composed)

    def check(self, isa: str) -> None:
        with instruction_set(isa):
            found = self.gradients(ops.attention)
        exact = self.gradients(reference.attention, torch.float64)
        for results in zip(found, self.eager(), exact, self.cancelled(), strict=False):
            assert_accurate(*results)

    def cancelled(self) -> list[float]:
        """Roundings of what goes into the gradients: <grad_out_i, v_j> minus its mean over j, of which little is left
        where a row sees few keys, and the exponent of the probabilities, which comes from the rounded log-sum-exp.
        """
        q, k, v, grad = (x.double().norm().item() / max(x.numel(), 1) ** 0.5 for x in (*self.inputs[:3], self.grad))
        root, scale = self.grad.shape[2] ** 0.5, abs(self.options["scale"])
        unit = EPSILON * (2 + 3 * scale * q * k * root)
        terms = (unit + (torch.finfo(self.grad.dtype).eps / 2 if self.grad.dtype == torch.bfloat16 else 0)) * grad * v
        return [terms * root * scale * k, terms * root * scale * q, unit * grad, terms * root]


def _composed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    scale: float,
    relative_bias: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    starts = layout.cu_seqlens.tolist()
    asking = layout.cu_seqlens if layout.cu_queries is None else layout.cu_queries
    factors = dropout_factors(dropout, seed, q.shape[0], layout.max_seqlen, q.shape[1])
    parts = [q.new_zeros(0, *q.shape[1:])]
    for i, mask in enumerate(layout.dense_mask()):
        begin, end = starts[i], starts[i + 1]
        first, last = int(asking[i]), int(asking[i + 1])
        length, count = end - begin, last - first
        queries, keys, values = (x.transpose(0, 1) for x in (q[first:last], k[begin:end], v[begin:end]))
        scores = queries @ keys.transpose(1, 2) * scale
        if relative_bias is not None and position_ids is not None:
            bias = reference.distance_bias(relative_bias, position_ids[end - count : end], position_ids[begin:end])
            scores = scores + bias.to(scores.dtype)
        scores = scores.masked_fill(~mask[length - count : length, :length], float("-inf"))
        kept = scores.softmax(-1) * factors[:, first:last, :length].to(q.dtype)
        parts.append((kept @ values).transpose(0, 1))
    return torch.cat(parts) + 0 * (k.sum() + v.sum()), None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_masks(isa: str, dtype: torch.dtype, counts: tuple[list[int], ...]) -> None:
    Case(SequenceLayout.from_counts(*counts), 32, dtype, dropout=0.1).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 32, 33, 64, 128])
@pytest.mark.parametrize(("bias", "dropout"), [("none", 0.0), ("consecutive", 0.5), ("scattered", 0.0)])
def test_head_sizes_and_bias(isa: str, dtype: torch.dtype, size: int, bias: str, dropout: float) -> None:
    layout = SequenceLayout.from_counts([19, 0, 70, 1], [9, 11, 0, 0], [9, 11, 0, 0])
    Case(layout, size, dtype, bias=bias, dropout=dropout).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [60, 7, 0, 131], [66, 8, 2, 0]])
def test_few_rows_ask(isa: str, dtype: torch.dtype, counts: list[int]) -> None:
    layout = SequenceLayout.from_counts([60, 0, 2, 140], [3, 1, 0, 0], [3, 7, 0, 0]).with_queries(counts)
    Case(layout, 24, dtype, bias="consecutive", dropout=0.1).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scales_of_any_sign(isa: str, dtype: torch.dtype, scale: float) -> None:
    case = Case(SequenceLayout.pseudo_masked([20], [9]), 16, dtype)
    case.options["scale"] = scale
    case.check(isa)


@given(
    st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from(ISAS),
    st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_any_counts(counts: list[tuple[int, int, int]], size: int, isa: str, dtype: torch.dtype) -> None:
    layout = SequenceLayout.from_counts(*zip(*counts, strict=True))
    Case(layout, size, dtype, bias="consecutive", dropout=0.1).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_change_nothing(isa: str, dtype: torch.dtype) -> None:
    """Bitwise; and what is not a number in one sequence stays there."""
    counts = ([300, 5, 17, 200], [30, 0, 4, 0], [30, 0, 4, 0])
    case = Case(SequenceLayout.from_counts(*counts), 32, dtype, heads=3, bias="consecutive", dropout=0.1)
    with instruction_set(isa):
        with threads(1):
            alone = case.gradients(ops.attention)
        for number in (2, 5):
            with threads(number):
                assert all(map(torch.equal, alone, case.gradients(ops.attention)))
        case.inputs[1] = case.inputs[1].clone()
        case.inputs[1][-1] = float("nan")
        case.grad[-3] = float("inf")
        spoilt = case.gradients(ops.attention)
    rows = slice(0, 360 + 5 + 25)
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(alone[:3], spoilt[:3], strict=True))
    assert all(b[390:].isnan().any() for b in spoilt[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    """Operands, output and its gradient may be views; a gradient may be expanded."""
    case = Case(SequenceLayout.seq2seq([20, 9], [9, 0]), 16, dtype)
    q, k, v = case.inputs
    whole = case.gradients(ops.attention)
    case.inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    case.grad = case.grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, whole, case.gradients(ops.attention)))
    case.grad = torch.ones(1, dtype=dtype).expand(case.grad.shape)
    expanded = case.gradients(ops.attention)
    case.grad = case.grad.contiguous()
    assert all(map(torch.equal, expanded, case.gradients(ops.attention)))


def test_only_what_is_asked_for() -> None:
    """A gradient for some of the operands only; none for lse and none where the output is not used."""
    case = Case(SequenceLayout.seq2seq([20], [9]), 16, torch.float32, bias="consecutive")
    whole = case.gradients(ops.attention)
    for asked in range(4):
        leaves = [x.detach().requires_grad_(i == asked) for i, x in enumerate(case.inputs)]
        out, lse = ops.attention(*leaves[:3], case.layout, relative_bias=leaves[3], **case.options)
        assert out.requires_grad and not lse.requires_grad
        out.backward(case.grad)
        assert [x.grad is not None for x in leaves] == [i == asked for i in range(4)]
        assert torch.equal(leaves[asked].grad, whole[asked])


@pytest.mark.parametrize("queries", [None, [7, 0, 1]])
def test_the_specification_is_differentiated_right(queries: list[int] | None) -> None:
    layout = SequenceLayout.from_counts([3, 0, 1], [2, 4, 0], [2, 0, 0])
    if queries is not None:
        layout = layout.with_queries(queries)
    case = Case(layout, 3, torch.float32, bias="consecutive", dropout=0.3)
    leaves = [x.double().requires_grad_() for x in case.inputs]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference.attention(q, k, v, layout, relative_bias=bias, **case.options)[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("apart", [False, True])
def test_projection(dtype: torch.dtype, backend: str, apart: bool) -> None:
    """The same results and gradients as the three operands on their own, bit for bit."""
    layout = SequenceLayout.pseudo_masked([20, 3, 0], [9, 0, 4])
    if apart:
        layout = layout.with_queries([11, 0, 8])
    case = Case(layout, 16, dtype, bias="consecutive", dropout=0.1)
    parts = [x.detach() for x in case.inputs[apart:3]]
    projection = torch.stack(parts, dim=1).requires_grad_()
    queries = case.inputs[0].clone().requires_grad_() if apart else None
    table = case.inputs[3].clone().requires_grad_()
    with ops.backend(backend):
        out, lse = ops.projected_attention(projection, layout, queries=queries, relative_bias=table, **case.options)
        out.backward(case.grad)
        expected = ops.attention(*case.inputs[:3], layout, relative_bias=case.inputs[3], **case.options)
        gradients = case.gradients(ops.attention)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    found = [table.grad, *projection.grad.unbind(1)]
    if queries is not None:
        found.insert(1, queries.grad)
    assert all(map(torch.equal, found, [gradients[3], *gradients[:3]]))


def test_shapes_of_a_projection() -> None:
    layout = SequenceLayout.bidirectional([5])
    with pytest.raises(ValueError, match=r"projection must be \[tokens, 3, heads, head_dim\], got \(5, 2, 2, 8\)"):
        ops.projected_attention(torch.zeros(5, 2, 2, 8), layout)
    with pytest.raises(ValueError, match=r"projection must be \[tokens, 2, heads, head_dim\], got \(5, 3, 2, 8\)"):
        ops.projected_attention(torch.zeros(5, 3, 2, 8), layout, queries=torch.zeros(5, 2, 8))
    sequence = [layout.cu_seqlens, layout.segments, None, 5, 0.3, None, None, 0.0, None]
    with pytest.raises(RuntimeError, match="projected_attention: projection must have the shape"):
        torch.ops.minilm_fast.projected_attention(torch.zeros(5, 2, 2, 8), None, *sequence)
    with pytest.raises(RuntimeError, match="attention: q must be"):
        torch.ops.minilm_fast.projected_attention(torch.zeros(5, 3, 2, 8, dtype=torch.float64), None, *sequence)


def _arguments(**changes: object) -> list[object]:
    layout = SequenceLayout.pseudo_masked([5, 2], [3, 1])
    bias, positions = torch.randn(2, 9), torch.arange(layout.total, dtype=torch.int32)
    seed = torch.tensor([3])
    q, k, v, grad_out = torch.randn(4, layout.total, 2, 8).unbind()
    out, lse = ops.attention(
        q, k, v, layout, scale=0.3, relative_bias=bias, position_ids=positions, dropout=0.2, seed=seed
    )
    arguments: dict[str, object] = {
        "grad_out": grad_out,
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "cu_seqlens": layout.cu_seqlens,
        "segments": layout.segments,
        "cu_queries": None,
        "max_seqlen": layout.max_seqlen,
        "scale": 0.3,
        "relative_bias": bias,
        "position_ids": positions,
        "dropout": 0.2,
        "seed": seed,
        "bias_gradient": True,
    }
    return list((arguments | changes).values())


def test_opcheck() -> None:
    op = torch.ops.minilm_fast.attention_backward.default
    torch.library.opcheck(op, _arguments())
    torch.library.opcheck(op, _arguments(relative_bias=None, position_ids=None, bias_gradient=False))
    _, q, k, v, _, _, *rest = _arguments()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.minilm_fast.attention.default, [*leaves, *rest[:-1]])


@pytest.mark.parametrize("apart", [False, True])
def test_opcheck_projection(apart: bool) -> None:
    _, q, k, v, _, _, *layout, _ = _arguments()
    projection = torch.stack([k, v] if apart else [q, k, v], dim=1).requires_grad_()
    queries = q.clone().requires_grad_() if apart else None
    torch.library.opcheck(torch.ops.minilm_fast.projected_attention.default, [projection, queries, *layout])
    out, lse = torch.ops.minilm_fast.projected_attention(projection.detach(), queries, *layout)
    given = [torch.randn_like(q), projection.detach(), None if queries is None else q, out.detach(), lse, *layout, True]
    torch.library.opcheck(torch.ops.minilm_fast.projected_attention_backward.default, given)
    found = torch.ops.minilm_fast.projected_attention_backward(*given)
    for ours, theirs in zip(found, _reference_projected_backward(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_reference_where_nothing_is_compiled() -> None:
    arguments = _arguments()
    found = torch.ops.minilm_fast.attention_backward(*arguments)
    for ours, theirs in zip(found, _reference_backward(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    arguments = _arguments(bias_gradient=False)
    assert torch.ops.minilm_fast.attention_backward(*arguments)[3].shape == _reference_backward(*arguments)[3].shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_out": torch.zeros(15, 2, 9)}, "grad_out must have the shape"),
        ({"grad_out": torch.zeros(15, 2, 8, dtype=torch.bfloat16)}, "grad_out must be"),
        ({"out": torch.zeros(14, 2, 8)}, "out must have the shape"),
        ({"lse": torch.zeros(15, 2)}, "lse must have the shape"),
        ({"lse": torch.zeros(2, 15, dtype=torch.float64)}, "lse must be"),
        ({"relative_bias": None, "position_ids": None}, "there is no relative_bias"),
        ({"q": torch.zeros(15, 2, 129)}, "head size of q"),
        ({"segments": torch.tensor([[5, 3, 2], [2, 1, 1]], dtype=torch.int32)}, r"segments\[0\] adds up to 10"),
        ({"seed": None}, "dropout needs a seed"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"attention_backward: .*{message}"):
        torch.ops.minilm_fast.attention_backward(*_arguments(**changes))
