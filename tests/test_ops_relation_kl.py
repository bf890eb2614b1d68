"""The distillation loss: the reference against published figures, the C++ kernel against the reference."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_accurate, instruction_set, threads
from safetensors.torch import load_file

from minilm_fast import ops
from minilm_fast.ops import SequenceLayout, reference

GOLDENS = Path(__file__).parent / "goldens" / "distillation"
GOLDEN = json.loads((GOLDENS / "distillation.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}


class Encoder:
    """A plain BERT encoder over one padded batch that keeps each layer's query, key and value of the real tokens."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        self.state = {name: x.to(dtype).requires_grad_() for name, x in state.items()}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config["layer_norm_eps"])

    def projections(self, mask: torch.Tensor) -> list[list[torch.Tensor]]:
        """Packed query, key and value ``[tokens, hidden]`` of each layer."""
        ids, types = (torch.tensor(GOLDEN[name]) for name in ("input_ids", "token_type_ids"))
        tables = [self.state[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        x = tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][types]
        x = self._norm("embeddings.LayerNorm", x)
        found = []
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            qkv = [self._linear(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")]
            found.append([part[mask] for part in qkv])
            heads = [part.unflatten(-1, (self.config["num_attention_heads"], -1)).transpose(1, 2) for part in qkv]
            context = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
            x = self._norm(
                f"{layer}.attention.output.LayerNorm", x + self._linear(f"{layer}.attention.output.dense", context)
            )
            wide = F.gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(f"{layer}.output.LayerNorm", x + self._linear(f"{layer}.output.dense", wide))
        return found


def _golden_loss(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, Encoder]:
    mask = torch.tensor(GOLDEN["attention_mask"]).bool()
    layout = SequenceLayout.bidirectional(mask.sum(1).tolist())
    student = Encoder(GOLDENS / "student", dtype)
    parts = [
        [x.unflatten(-1, (case["relation_heads"], -1)) for x in encoder.projections(mask)[case[f"{side}_layer"] - 1]]
        for side, encoder in (("teacher", Encoder(GOLDENS / "teacher", dtype)), ("student", student))
    ]
    loss = torch.zeros((), dtype=dtype)
    for (a, b), weight in case["relations"]:
        pairs = (side[i - 1] for side in parts for i in (a, b))
        loss = loss + weight * ops.relation_kl(*pairs, layout)
    return loss, student


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_goldens(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    loss, student = _golden_loss(case, dtype)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance, abs=0)
    loss.backward()
    grad_tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for parameter, expected in load_file(GOLDENS / f"grads_{name}.safetensors").items():
        error = (student.state[parameter].grad.double() - expected).norm()
        # The key's bias shifts whole rows of query-key scores: its gradient is zero but for rounding.
        assert error <= grad_tolerance * max(expected.norm().item(), 1e-2), parameter
    for parameter, expected in case["grad_norms"].items():
        grad = student.state[parameter].grad
        norm = 0.0 if grad is None else grad.double().norm().item()
        assert norm == pytest.approx(expected, rel=grad_tolerance, abs=grad_tolerance * 1e-2), parameter


COUNTS = {
    "bidirectional": ([64, 1, 0, 33], [0] * 4, [0] * 4),
    "causal": ([0] * 4, [40, 0, 1, 23], [0] * 4),
    "seq2seq": ([30, 0, 17], [12, 7, 1], [0] * 3),
    "pseudo-masked": ([30, 0, 2], [13, 20, 1], [13, 20, 1]),
    "only pseudo, more pseudo than target, fewer": ([0, 3, 5], [0, 2, 20], [9, 8, 3]),
    "several blocks": ([280, 5], [20, 140], [0, 140]),
    "rows cut in pieces": ([481], [0], [0]),
    "no sequence": ([], [], []),
    "no token": ([0], [0], [0]),
}
# Those that have a kernel of their own.
ISAS = [isa for isa in kernel_checks.ISAS if isa not in ("avx512vnni", "avx512bf16")]
KINDS = ("distinct", "symmetric", "symmetric student")
# Enough that the kernel works on heads as a whole, and so few that it cuts their rows.
MANY, FEW = 34, 2

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Results = tuple[torch.Tensor, ...]


def _inputs(
    tokens: int, heads: int, sizes: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], kind: str, seed: int = 0
) -> Inputs:
    """Teacher and student as views of fused projections: last dimension contiguous, the others not."""
    generator = torch.Generator().manual_seed(seed + 1000 * tokens + sum(sizes))
    ta, tb, sa, sb = (
        x
        for size, dtype in zip(sizes, dtypes, strict=True)
        for x in torch.randn(tokens, 2, heads, size, generator=generator).to(dtype).unbind(1)
    )
    if kind == "distinct":
        return ta, tb, sa, sb
    return ta, ta if kind == "symmetric" else tb, sa, sa


def _run(function: Callable[..., torch.Tensor], inputs: Inputs, *arguments: Any, **options: Any) -> Results:
    """Loss and the student's gradients; the tensor that comes twice is one leaf."""
    ta, tb, sa, sb = inputs
    a = sa.detach().requires_grad_()
    b = a if sb is sa else sb.detach().requires_grad_()
    loss = function(ta, tb, a, b, *arguments, **options)
    leaves = [a] if b is a else [a, b]
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(1.7, dtype=loss.dtype))


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    found = {id(x): x.to(dtype) for x in inputs}
    ta, tb, sa, sb = (found[id(x)] for x in inputs)
    return ta, tb, sa, sb


def _reference(*inputs: Any, **options: Any) -> torch.Tensor:
    return reference.relation_kl(*inputs, **options)[0]


def _composed(
    *inputs: torch.Tensor, layout: SequenceLayout, teacher_scale: float, student_scale: float, reduction: str
) -> torch.Tensor:
    """What a PyTorch user would write: products in the dtype of the operands, softmax in fp32 (as autocast does)."""
    ta, tb, sa, sb = inputs
    heads, lengths = sa.shape[1], layout.segments.sum(1).tolist()
    filled = sum(length > 0 for length in lengths)
    losses = [(sa.float().sum() + sb.float().sum()) * 0]
    for mask, start, length in zip(layout.dense_mask(), layout.cu_seqlens.tolist(), lengths, strict=False):
        rows, hidden = slice(start, start + length), ~mask[:length, :length]
        log_p, log_q = (
            (a[rows].transpose(0, 1) @ b[rows].permute(1, 2, 0) * scale)
            .float()
            .masked_fill(hidden, -1e4)
            .log_softmax(-1)
            for a, b, scale in ((ta, tb, teacher_scale), (sa, sb, student_scale))
        )
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        weights = {"sum": 1, "token_mean": heads * layout.total, "batch_mean": heads * length * filled}
        losses.append(total / max(weights[reduction], 1))
    return torch.stack(losses).sum()


def _check(inputs: Inputs, layout: SequenceLayout, **options: Any) -> None:
    options = {"teacher_scale": inputs[0].shape[2] ** -0.5, "student_scale": inputs[2].shape[2] ** -0.5} | options
    ours = _run(ops.relation_kl, inputs, layout, **options)
    exact = _run(_reference, _cast(inputs, torch.float64), layout, **options)
    eager = _run(_composed, inputs, layout=layout, **({"reduction": "batch_mean"} | options))
    # A gradient sums differences of probabilities, each of which is rounded; the shortest sequence's weigh most.
    lengths = [length for length in layout.segments.sum(1).tolist() if length > 0]
    weight = 1 / (min(lengths) * len(lengths) * inputs[2].shape[1]) if lengths else 0.0
    cancelled = kernel_checks.EPSILON * weight * abs(options["student_scale"]) / 4
    for i, (mine, theirs, right) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_accurate(mine, theirs, right, cancelled if i > 0 else 0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_masks(isa: str, dtype: torch.dtype, kind: str, counts: tuple[list[int], ...]) -> None:
    layout = SequenceLayout.from_counts(*counts)
    with instruction_set(isa):
        for heads in (FEW, MANY) if layout.total < 150 else (FEW,):
            _check(_inputs(layout.total, heads, (24, 16), (dtype, dtype), kind), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (8, 8), (16, 8), (32, 16), (31, 33), (64, 32), (128, 64), (3, 128), (257, 130)]
)
def test_head_sizes(isa: str, dtype: torch.dtype, kind: str, sizes: tuple[int, int]) -> None:
    layout = SequenceLayout.bidirectional([19, 0, 70, 1])
    with instruction_set(isa):
        _check(_inputs(layout.total, MANY // 2, sizes, (dtype, dtype), kind), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [FEW, MANY])
def test_one_gradient_of_a_relation_that_is_symmetric_in_the_student(isa: str, heads: int) -> None:
    layout = SequenceLayout.from_counts([40, 0, 300], [0, 7, 9], [0, 0, 0])
    with instruction_set(isa):
        _check(_inputs(layout.total, heads, (16, 8), (torch.float32, torch.float32), "symmetric student"), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_dtype_for_each_side(isa: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layout = SequenceLayout.bidirectional([40, 7])
    with instruction_set(isa):
        _check(_inputs(layout.total, FEW, (16, 8), dtypes, "distinct"), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.5])
def test_scales_of_any_sign(isa: str, kind: str, dtype: torch.dtype, scale: float) -> None:
    layout = SequenceLayout.bidirectional([40, 7])
    with instruction_set(isa):
        inputs = _inputs(layout.total, MANY, (16, 8), (dtype, dtype), kind)
        _check(inputs, layout, teacher_scale=scale)
        _check(inputs, layout, student_scale=scale)


@pytest.mark.parametrize("reduction", ["batch_mean", "token_mean", "sum"])
def test_reductions(reduction: str) -> None:
    layout = SequenceLayout.bidirectional([5, 0, 20, 1])
    inputs = _inputs(layout.total, FEW, (16, 8), (torch.float32, torch.float32), "distinct")
    _check(inputs, layout, reduction=reduction)
    parts = [slice(0, 5), slice(5, 25), slice(25, 26)]
    sums = [
        ops.relation_kl(
            *(x[part] for x in inputs), SequenceLayout.bidirectional([part.stop - part.start]), reduction="sum"
        )
        for part in parts
    ]
    expected = {
        "sum": sum(sums),
        "token_mean": sum(sums) / (FEW * 26),
        "batch_mean": (sums[0] / 5 + sums[1] / 20 + sums[2]) / (FEW * 3),
    }
    torch.testing.assert_close(ops.relation_kl(*inputs, layout, reduction=reduction), expected[reduction])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 4.0, 9.0])
def test_what_the_backward_pass_is_given(isa: str, dtype: torch.dtype, kind: str, factor: float) -> None:
    """The log-sum-exp of every row, whatever the size of the scores: a factor of 9 makes some of them 400."""
    lengths = [16, 33, 64, 97]
    layout, inputs = (
        SequenceLayout.bidirectional(lengths),
        [x * factor for x in _inputs(sum(lengths), MANY, (17, 6), (dtype, dtype), "distinct")],
    )
    pairs = [inputs[:2], inputs[2:]] if kind == "distinct" else [[inputs[0], None], [inputs[2], None]]
    with instruction_set(isa):
        found = torch.ops.minilm_fast.relation_kl(
            *pairs[0], *pairs[1], layout.cu_seqlens, layout.segments, layout.max_seqlen, 0.3, 0.4, "sum"
        )
    for (a, b), scale, lse in zip(pairs, (0.3, 0.4), found[1:], strict=True):
        rows = [x.double().split(lengths) for x in (a, a if b is None else b)]
        exact = torch.cat(
            [torch.einsum("ihd,jhd->hij", x, y).mul(scale).logsumexp(-1) for x, y in zip(*rows, strict=True)], 1
        )
        torch.testing.assert_close(lse, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_scores_far_apart(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Every teacher row sees one column only, the student others: neither NaN nor infinity, and the right slope."""
    layout = SequenceLayout.bidirectional([50])
    ta, tb, sa, sb = _inputs(50, MANY, (16, 16), (dtype, dtype), kind)
    ta, sa = ta * 40, sa * 30
    inputs = (ta, ta if kind == "symmetric" else tb, sa, sa if kind == "symmetric" else sb)
    with instruction_set(isa):
        ours = _run(ops.relation_kl, inputs, layout, teacher_scale=1.0, student_scale=1.0)
        exact = _run(_reference, _cast(inputs, torch.float64), layout, teacher_scale=1.0, student_scale=1.0)
    assert ours[0].item() > 100
    for mine, right in zip(ours, exact, strict=True):
        # Scores of some 1e4 are known to 1e-3 in fp32.
        tolerance = 2e-3 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine.double(), right, rtol=2e-2, atol=tolerance * right.abs().max().item())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_zero_when_equal(isa: str, dtype: torch.dtype, kind: str) -> None:
    layout = SequenceLayout.from_counts([70, 1, 20], [0, 0, 9], [0, 0, 9])
    ta, tb, _, _ = _inputs(layout.total, MANY, (16, 1), (dtype, dtype), kind)
    with instruction_set(isa):
        loss, *grads = _run(ops.relation_kl, (ta, tb, ta.clone() if kind == "distinct" else ta, tb), layout)
    assert loss == 0
    # Each is a sum of differences of equal products, of which one may be rounded and the other not.
    assert [grad.abs().max().item() for grad in grads] == pytest.approx([0.0] * len(grads), abs=1e-8)


@given(
    counts=st.lists(st.tuples(*[st.integers(0, 14)] * 3), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kind=st.sampled_from(KINDS),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_any_layout(
    counts: list[tuple[int, int, int]],
    sizes: tuple[int, int],
    kind: str,
    isa: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Not negative, as the reference has it, and the same in whatever order the sequences are packed."""
    layout = SequenceLayout.from_counts(*zip(*counts, strict=True))
    inputs = _inputs(layout.total, FEW, sizes, (dtype, dtype), kind, seed)
    with instruction_set(isa):
        loss, *grads = _run(ops.relation_kl, inputs, layout)
        exact = _run(_reference, _cast(inputs, torch.float64), layout, **_default_scales(sizes))
        assert loss >= -1e-6
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, right in zip(grads, exact[1:], strict=True):
            assert not right.numel() or (mine - right).abs().max() <= tolerance * (right.abs().max() + 1e-3)
        starts = layout.cu_seqlens.tolist()
        order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in reversed(range(len(counts)))])
        backward = SequenceLayout.from_counts(*zip(*reversed(counts), strict=True))
        moved = {id(x): x[order] for x in inputs}
        turned, *turned_grads = _run(ops.relation_kl, tuple(moved[id(x)] for x in inputs), backward)
        torch.testing.assert_close(turned, loss)
        for mine, other in zip(grads, turned_grads, strict=True):
            assert torch.equal(mine[order], other)


def _default_scales(sizes: tuple[int, int]) -> dict[str, float]:
    return {"teacher_scale": sizes[0] ** -0.5, "student_scale": sizes[1] ** -0.5}


@given(st.integers(0, 1000), st.sampled_from(ISAS), st.floats(-3, 3))
@settings(deadline=None, max_examples=20)
def test_a_constant_added_to_a_row_changes_nothing(seed: int, isa: str, constant: float) -> None:
    """The last dimension of every b is one, so a row's last number adds to all its scores."""
    layout = SequenceLayout.seq2seq([20, 3], [5, 30])
    inputs = _inputs(layout.total, FEW, (9, 5), (torch.float32, torch.float32), "distinct", seed)
    for b in (inputs[1], inputs[3]):
        b[..., -1] = 1.0
    with instruction_set(isa):
        before = _run(ops.relation_kl, inputs, layout)
        for a in (inputs[0], inputs[2]):
            a[3::4, :, -1] += constant
        after = _run(ops.relation_kl, inputs, layout)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [FEW, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_threads(isa: str, dtype: torch.dtype, heads: int, kind: str) -> None:
    layout = SequenceLayout.from_counts([300, 5, 17], [0, 0, 14], [0, 0, 4])
    inputs = _inputs(layout.total, heads, (32, 16), (dtype, dtype), kind)
    with instruction_set(isa):
        with threads(1):
            alone = _run(ops.relation_kl, inputs, layout)
        for number in (2, 5):
            with threads(number):
                shared = _run(ops.relation_kl, inputs, layout)
            assert all(torch.equal(x, y) for x, y in zip(alone, shared, strict=True))


def test_gradcheck() -> None:
    """Of the specification in fp64; the C++ gradients are held to it by the other tests."""
    layout = SequenceLayout.pseudo_masked([3, 0], [2, 1])
    ta, tb, sa, sb = _inputs(layout.total, 2, (3, 2), (torch.float64, torch.float64), "distinct")

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.relation_kl(ta, tb, a, b, layout)

    leaves = [x.clone().requires_grad_() for x in (sa, sb)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradcheck(lambda a: loss(a, a), leaves[:1])


def test_the_teacher_gets_no_gradient() -> None:
    layout = SequenceLayout.bidirectional([5])
    for backend in (None, "reference"):
        leaves = [x.clone().requires_grad_() for x in _inputs(5, 2, (4, 4), (torch.float32, torch.float32), "distinct")]
        with ops.backend(backend):
            ops.relation_kl(*leaves, layout).backward()
        assert leaves[0].grad is None and leaves[1].grad is None
        assert leaves[2].grad is not None and leaves[3].grad is not None


def test_autocast() -> None:
    """The projections of an autocast region come in bf16 and are taken as they are."""
    layout = SequenceLayout.bidirectional([9, 4])
    x, weight = torch.randn(13, 16), torch.randn(32, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = F.linear(x, weight).view(13, 2, 2, 8).unbind(1)
        loss = ops.relation_kl(*torch.randn(13, 2, 2, 8).unbind(1), a, b, layout)
    assert a.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None and bool(weight.grad.any())


def test_backends() -> None:
    layout = SequenceLayout.bidirectional([9])
    inputs = _inputs(9, 2, (4, 4), (torch.float32, torch.float32), "distinct")
    ours = _run(ops.relation_kl, inputs, layout)
    with ops.backend("reference"):
        torch.testing.assert_close(_run(ops.relation_kl, inputs, layout), ours)
    with ops.backend("cpu"):
        torch.testing.assert_close(_run(ops.relation_kl, inputs, layout), ours)
        with pytest.raises(RuntimeError, match="teacher_a must be"):
            ops.relation_kl(*_cast(inputs, torch.float64), layout)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_as_a_registered_kernel(kind: str) -> None:
    """What runs under the operator's name where nothing could be compiled."""
    module = importlib.import_module("minilm_fast.ops.relation_kl")
    ta, tb, sa, sb = _inputs(15, 2, (8, 4), (torch.float32, torch.float32), kind)
    inputs = [ta, None if tb is ta else tb, sa, None if sb is sa else sb]
    rest = _arguments()[4:]
    loss, *lse = torch.ops.minilm_fast.relation_kl(*inputs, *rest)
    torch.testing.assert_close((loss, *lse), module._reference(*inputs, *rest), rtol=1e-6, atol=1e-6)
    arguments = [torch.tensor(0.7), *inputs, *lse, *rest]
    torch.testing.assert_close(
        torch.ops.minilm_fast.relation_kl_backward(*arguments), module._reference_backward(*arguments)
    )


def _arguments(**changes: Any) -> list[Any]:
    layout = SequenceLayout.pseudo_masked([5, 2], [3, 1])
    ta, tb, sa, sb = _inputs(layout.total, 2, (8, 4), (torch.float32, torch.float32), "distinct")
    arguments: dict[str, Any] = {
        "teacher_a": ta,
        "teacher_b": tb,
        "student_a": sa,
        "student_b": sb,
        "cu_seqlens": layout.cu_seqlens,
        "segments": layout.segments,
        "max_seqlen": layout.max_seqlen,
        "teacher_scale": 0.3,
        "student_scale": 0.5,
        "reduction": "batch_mean",
    }
    return list((arguments | changes).values())


def test_opcheck() -> None:
    op = torch.ops.minilm_fast.relation_kl.default
    torch.library.opcheck(op, _arguments())
    student = torch.randn(15, 2, 4)
    torch.library.opcheck(
        op, _arguments(student_a=student.clone().requires_grad_(), student_b=student.requires_grad_())
    )
    torch.library.opcheck(op, _arguments(teacher_b=None, student_a=student.requires_grad_(), student_b=None))
    arguments = _arguments()
    _, *lse = op(*arguments)
    backward = torch.ops.minilm_fast.relation_kl_backward.default
    torch.library.opcheck(backward, [torch.tensor(2.0), *arguments[:4], *lse, *arguments[4:]])
    torch.library.opcheck(backward, [torch.tensor(2.0), *arguments[:3], None, *lse, *arguments[4:]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_a": torch.zeros(15, 16)}, "teacher_a must be"),
        ({"teacher_a": torch.zeros(15, 2, 8, dtype=torch.float64)}, "teacher_a must be"),
        ({"teacher_a": torch.zeros(15, 3, 8), "teacher_b": None}, "teacher_a must have the shape"),
        ({"teacher_b": torch.zeros(15, 2, 9)}, "teacher_b must have the shape"),
        ({"student_a": torch.zeros(15, 2, 0), "student_b": None}, "student_a must be"),
        ({"student_b": torch.zeros(15, 2, 4, dtype=torch.bfloat16)}, "student_b must be"),
        ({"student_b": torch.zeros(15, 4, 2).transpose(1, 2)}, "last dimension of student_b"),
        ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, "cu_seqlens must have the shape"),
        ({"cu_seqlens": torch.tensor([0, 11, 14], dtype=torch.int32)}, "cu_seqlens must go from 0 to the 15"),
        ({"segments": torch.tensor([[5, 3, 2], [2, 1, 1]], dtype=torch.int32)}, r"segments\[0\] adds up to 10"),
        ({"segments": torch.tensor([[5, 3, 3], [2, 3, -1]], dtype=torch.int32)}, r"segments\[1\] holds a negative"),
        ({"max_seqlen": 10}, "max_seqlen is 10"),
        ({"reduction": "mean"}, "reduction must be"),
    ],
)
def test_bad_arguments_of_the_operator(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"relation_kl: .*{message}"):
        torch.ops.minilm_fast.relation_kl(*_arguments(**changes))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(15, 2, 8), (15, 2, 7), (15, 2, 4), (15, 2, 4)], {}, "teacher_a and teacher_b"),
        ([(15, 2, 8), (15, 2, 8), (15, 8), (15, 8)], {}, "student_a and student_b"),
        ([(15, 2, 8), (15, 2, 8), (15, 3, 4), (15, 3, 4)], {}, "numbers of tokens and heads"),
        ([(14, 2, 8), (14, 2, 8), (14, 2, 4), (14, 2, 4)], {}, "14 tokens, the layout 15"),
        ([(15, 2, 8), (15, 2, 8), (15, 2, 4), (15, 2, 4)], {"reduction": "mean"}, "'mean'"),
    ],
)
def test_bad_arguments(shapes: list[tuple[int, ...]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"relation_kl: .*{message}"):
        ops.relation_kl(*(torch.zeros(shape) for shape in shapes), SequenceLayout.bidirectional([15]), **options)
    with pytest.raises(ValueError, match="must ask"):
        ops.relation_kl(*[torch.zeros(15, 2, 8)] * 4, SequenceLayout.bidirectional([15]).with_queries([3]))
