"""The C++ attention against its specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, ISAS, assert_accurate, instruction_set, threads

from minilm_fast import ops
from minilm_fast.ops import SequenceLayout, reference
from minilm_fast.ops.dropout import dropout_factors

COUNTS = {
    "bidirectional": ([64, 1, 0, 33], [0] * 4, [0] * 4),
    "causal": ([0] * 4, [40, 0, 1, 23], [0] * 4),
    "seq2seq": ([30, 0, 17], [12, 7, 1], [0] * 3),
    "pseudo-masked": ([30, 0, 2], [13, 20, 1], [13, 20, 1]),
    "only pseudo, more pseudo than target, fewer": ([0, 3, 5], [0, 2, 20], [9, 8, 3]),
    "several key blocks": ([530, 5], [40, 540], [0, 540]),
    "no sequence": ([], [], []),
    "no token": ([0], [0], [0]),
}


def _inputs(
    layout: SequenceLayout, heads: int, size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a fused projection: last dimension contiguous, the others not."""
    generator = torch.Generator().manual_seed(seed + 1000 * layout.total + size)
    q, k, v = torch.randn(layout.total, 3, heads, size, generator=generator).to(dtype).unbind(1)
    return q, k, v


def _check(layout: SequenceLayout, size: int, dtype: torch.dtype, bias: str = "none") -> None:
    heads = 2
    q, k, v = _inputs(layout, heads, size, dtype)
    table = positions = None
    if bias != "none":
        table = torch.randn(heads, 2 * 9 + 1)
        positions = torch.arange(layout.total, dtype=torch.int32)
        if bias == "scattered":
            positions = torch.randint(-5, 40, (layout.total,), dtype=torch.int32)
    scale = size**-0.5
    out, lse = ops.attention(q, k, v, layout, relative_bias=table, position_ids=positions)
    options = {"scale": scale, "position_ids": positions}
    eager = reference.attention(q, k, v, layout, relative_bias=table, **options)
    double = None if table is None else table.double()
    exact = reference.attention(*(x.double() for x in (q, k, v)), layout, relative_bias=double, **options)
    assert lse.dtype == torch.float32
    assert_accurate(out, eager[0], exact[0])
    assert_accurate(lse, eager[1], exact[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_masks(isa: str, dtype: torch.dtype, counts: tuple[list[int], ...]) -> None:
    with instruction_set(isa):
        _check(SequenceLayout.from_counts(*counts), 32, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 31, 32, 33, 64, 100, 128])
@pytest.mark.parametrize("bias", ["none", "consecutive", "scattered"])
def test_head_sizes_and_bias(isa: str, dtype: torch.dtype, size: int, bias: str) -> None:
    with instruction_set(isa):
        _check(SequenceLayout.from_counts([19, 0, 70, 1], [9, 11, 0, 0], [9, 11, 0, 0]), size, dtype, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_few_rows_ask(isa: str, dtype: torch.dtype, dropout: float) -> None:
    layout = SequenceLayout.from_counts([530, 0, 9, 4], [3, 0, 0, 30], [3, 7, 0, 30]).with_queries([140, 7, 0, 31])
    _, k, v = _inputs(layout, 2, 33, dtype)
    q = torch.randn(layout.total_queries, 2, 33).to(dtype)
    options = {"scale": 33**-0.5, "dropout": dropout, "seed": torch.tensor([5])}
    with instruction_set(isa):
        results = [ops.attention(q, k, v, layout, **options)]
        with threads(4):
            results.append(ops.attention(q, k, v, layout, **options))
    eager = reference.attention(q, k, v, layout, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), layout, **options)
    for out, lse in results:
        assert torch.equal(out, results[0][0])
        assert_accurate(out, eager[0], exact[0])
        assert_accurate(lse, eager[1], exact[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999])
def test_drops_what_the_specification_drops(isa: str, dtype: torch.dtype, dropout: float) -> None:
    """With equal scores and one-hot values an output is the row's factors, divided by the number of keys it sees."""
    layout = SequenceLayout.from_counts([70, 2], [29, 2], [29, 2]).with_queries([110, 5])
    seed = torch.tensor([2**61 + 7 * 2**32 + 5])
    keys = torch.zeros(layout.total, 3, 128, dtype=dtype)
    values = torch.zeros_like(keys)
    within = torch.arange(layout.total) - layout.cu_seqlens[:-1].repeat_interleave(layout.cu_seqlens.diff())
    values[torch.arange(layout.total), :, within] = 1
    with instruction_set(isa):
        out, _ = ops.attention(keys[:115], keys, values, layout, dropout=dropout, seed=seed)
    factors = dropout_factors(dropout, seed, 115, 128, 3).transpose(0, 1)
    mask = torch.cat([d[n - c : n] for d, n, c in zip(layout.dense_mask(), (128, 6), (110, 5), strict=True)])
    seen = torch.zeros(115, 128, dtype=torch.bool)
    seen[:, : mask.shape[1]] = mask
    expected = torch.where(seen, 1 / seen.sum(1, keepdim=True), 0.0)[:, None] * factors
    assert torch.equal(out != 0, expected != 0)
    torch.testing.assert_close(out, expected.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_scales_of_any_sign(isa: str) -> None:
    layout = SequenceLayout.seq2seq([20], [9])
    q, k, v = _inputs(layout, 2, 16, torch.float32)
    with instruction_set(isa):
        for scale in (-0.7, 0.0, 3.0):
            out, lse = ops.attention(q, k, v, layout, scale=scale)
            exact = reference.attention(q.double(), k.double(), v.double(), layout, scale=scale)
            torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(isa: str, dtype: torch.dtype) -> None:
    """One key takes everything: the others' weights vanish without turning into NaN or denormal numbers."""
    layout = SequenceLayout.bidirectional([50])
    q, k, v = (x.clone() for x in _inputs(layout, 1, 16, dtype))
    k[7] = 200.0
    q.fill_(50.0)
    with instruction_set(isa):
        out, lse = ops.attention(q, k, v, layout, scale=1.0)
    assert torch.equal(out, v[7].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 200.0 * 50 * 16))


@given(
    st.lists(st.tuples(*[st.integers(0, 14)] * 3), min_size=1, max_size=4).filter(
        lambda counts: sum(map(sum, counts)) <= 64
    ),
    st.sampled_from(ISAS),
    st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=150)
def test_rows_see_what_the_dense_mask_says(counts: list[tuple[int, int, int]], isa: str, dtype: torch.dtype) -> None:
    """With equal scores and one-hot values a row's output is its row of the mask, divided by its sum."""
    layout = SequenceLayout.from_counts(*zip(*counts, strict=True))
    zeros = torch.zeros(layout.total, 1, 64, dtype=dtype)
    values = torch.eye(64, dtype=dtype)[: layout.total, None]
    with instruction_set(isa):
        out, lse = ops.attention(zeros, zeros, values, layout)
    expected = torch.zeros(layout.total, 64)
    for dense, start, length in zip(
        layout.dense_mask(), layout.cu_seqlens.tolist(), layout.segments.sum(1).tolist(), strict=False
    ):
        expected[start : start + length, start : start + length] = dense[:length, :length].float()
    counted = expected.sum(1, keepdim=True)
    assert torch.equal(out[:, 0] > 0, expected > 0)
    torch.testing.assert_close(out[:, 0], (expected / counted).to(dtype))
    torch.testing.assert_close(lse[0], counted[:, 0].log())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_nothing_else(isa: str, dtype: torch.dtype) -> None:
    """Bitwise: whatever stands beside a sequence, and however many threads share the rows."""
    counts = ([300, 5, 17, 530], [30, 0, 4, 0], [30, 0, 4, 0])
    layout = SequenceLayout.from_counts(*counts)
    q, k, v = _inputs(layout, 3, 32, dtype)
    with instruction_set(isa):
        with threads(1):
            together = ops.attention(q, k, v, layout)
        for number in (2, 5):
            with threads(number):
                shared = ops.attention(q, k, v, layout)
            assert all(torch.equal(a, b) for a, b in zip(together, shared, strict=True))
        starts = layout.cu_seqlens.tolist()
        for i in range(4):
            rows = slice(starts[i], starts[i + 1])
            alone = SequenceLayout.from_counts(*([c[i]] for c in counts))
            out, lse = ops.attention(q[rows], k[rows], v[rows], alone)
            assert torch.equal(out, together[0][rows])
            assert torch.equal(lse, together[1][:, rows])


def _arguments(**changes: object) -> list[object]:
    layout = SequenceLayout.pseudo_masked([5, 2], [3, 1])
    q, k, v = _inputs(layout, 2, 8, torch.float32)
    arguments: dict[str, object] = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": layout.cu_seqlens,
        "segments": layout.segments,
        "cu_queries": None,
        "max_seqlen": layout.max_seqlen,
        "scale": 0.3,
        "relative_bias": torch.randn(2, 9),
        "position_ids": torch.arange(layout.total, dtype=torch.int32),
        "dropout": 0.0,
        "seed": None,
    }
    return list((arguments | changes).values())


def test_opcheck() -> None:
    op = torch.ops.minilm_fast.attention.default
    torch.library.opcheck(op, _arguments())
    torch.library.opcheck(op, _arguments(relative_bias=None, position_ids=None))
    some = {"q": torch.randn(3, 2, 8), "cu_queries": torch.tensor([0, 1, 3], dtype=torch.int32)}
    torch.library.opcheck(op, _arguments(**some, dropout=0.2, seed=torch.tensor([3])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(15, 16)}, "q must be"),
        ({"q": torch.zeros(15, 2, 8, dtype=torch.float64)}, "q must be"),
        ({"q": torch.zeros(15, 2, 129)}, "head size of q"),
        ({"k": torch.zeros(15, 2, 9)}, "k must have the shape"),
        ({"v": torch.zeros(15, 2, 8, dtype=torch.bfloat16)}, "v must be"),
        ({"v": torch.zeros(15, 8, 2).transpose(1, 2)}, "last dimension of v"),
        ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, "cu_seqlens must have the shape"),
        ({"cu_seqlens": torch.tensor([0, 11, 15])}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.tensor([0, 11, 14], dtype=torch.int32)}, "cu_seqlens must go from 0 to the 15"),
        ({"segments": torch.tensor([[5, 3], [2, 1]], dtype=torch.int32)}, "segments must have the shape"),
        ({"segments": torch.tensor([[5, 3, 2], [2, 1, 1]], dtype=torch.int32)}, r"segments\[0\] adds up to 10"),
        ({"segments": torch.tensor([[5, 3, 3], [2, 3, -1]], dtype=torch.int32)}, r"segments\[1\] holds a negative"),
        ({"max_seqlen": 10}, "max_seqlen is 10"),
        ({"position_ids": None}, "go together"),
        ({"cu_queries": torch.tensor([0, 15], dtype=torch.int32)}, "cu_queries must have the shape"),
        ({"cu_queries": torch.tensor([0, 11, 15])}, "cu_queries must be"),
        ({"cu_queries": torch.tensor([0, 3, 5], dtype=torch.int32)}, "cu_queries must go from 0 to the 15 rows"),
        ({"cu_queries": torch.tensor([0, 10, 15], dtype=torch.int32)}, "5 rows of sequence 1 ask, which has 4"),
        ({"cu_queries": torch.tensor([0, 16, 15], dtype=torch.int32)}, "16 rows of sequence 0 ask, which has 11"),
        ({"dropout": 1.0, "seed": torch.tensor([1])}, "dropout must be"),
        ({"dropout": float("nan"), "seed": torch.tensor([1])}, "dropout must be"),
        ({"dropout": 0.1}, "dropout needs a seed"),
        ({"dropout": 0.1, "seed": torch.tensor([1], dtype=torch.int32)}, "seed must be"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, "seed must have the shape"),
        ({"dropout": 0.1, "seed": torch.tensor([-1])}, "seed must not be negative"),
        ({"position_ids": torch.zeros(14, dtype=torch.int32)}, "position_ids must have the shape"),
        ({"relative_bias": torch.zeros(3, 9)}, "relative_bias must have the shape"),
        ({"relative_bias": torch.zeros(2, 8)}, "relative_bias must have an odd number"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"attention: .*{message}"):
        torch.ops.minilm_fast.attention(*_arguments(**changes))
