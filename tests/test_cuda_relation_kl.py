"""The CUDA kernels of the distillation loss, emulated on a CPU, against their specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_cuda import operators, poisoned_results, running_backwards
from relation_cases import COUNTS, DTYPES, KINDS, Relation, relation

from minilm_fast import backend, ops
from minilm_fast.errors import UserError
from minilm_fast.ops import SequenceLayout, _dispatch


def _run(case: Relation) -> tuple[torch.Tensor, ...]:
    with poisoned_results():
        return case.run(operators().relation_kl, operators().relation_kl_backward)


def _check(case: Relation) -> tuple[torch.Tensor, ...]:
    found = _run(case)
    case.check(found)
    with running_backwards():
        assert all(map(torch.equal, _run(case), found))
    return found


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, counts: tuple[list[int], ...]) -> None:
    _check(relation(SequenceLayout.from_counts(*counts), (64, 32), torch.bfloat16, kind))


@pytest.mark.parametrize(
    "sizes", [(8, 8), (16, 8), (16, 16), (32, 16), (24, 40), (64, 32), (48, 64), (64, 64), (128, 32), (32, 128)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_head_sizes(kind: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    _check(relation(SequenceLayout.bidirectional([70, 1]), sizes, dtype, kind, heads=1))


@pytest.mark.parametrize("kind", ["symmetric teacher", "symmetric student"])
def test_one_side_is_symmetric(kind: str) -> None:
    _check(relation(SequenceLayout.bidirectional([130, 5]), (32, 16), torch.float16, kind))


@pytest.mark.parametrize("reduction", ["batch_mean", "token_mean", "sum"])
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_reductions(kind: str, reduction: str) -> None:
    """More sequences than a warp has lanes, some of them empty."""
    lengths = [i % 3 * 2 for i in range(70)]
    _check(relation(SequenceLayout.bidirectional(lengths), (16, 8), torch.bfloat16, kind, reduction=reduction))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.5])
@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("side", ["teacher_scale", "student_scale"])
def test_scales_of_any_sign(side: str, kind: str, scale: float) -> None:
    """Negative, the log-sum-exps of a symmetric relation may be far below zero."""
    _check(relation(SequenceLayout.bidirectional([140, 7]), (16, 16), torch.float16, kind, **{side: scale}))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_overflow(kind: str) -> None:
    """The first scores of a row are by more than 2^128 smaller than others, so it is done again."""
    case = relation(SequenceLayout.bidirectional([90, 150]), (16, 16), torch.bfloat16, kind)
    for x in {id(x): x for x in case.operands}.values():
        x[80:90] *= 16
        x[200:210] *= 16
    case.options = {"teacher_scale": 1.0, "student_scale": 1.0}
    loss, *lse, a = _run(case)[:4]
    exact = case.specified(torch.float64)
    assert max(x.max() - x.min() for x in exact[1:3]) > 400
    for mine, right in zip((loss, *lse), exact[:3], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-3)
    assert (a - exact[3]).norm() < 1e-2 * exact[3].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_exponential_does_not_serve_all(dtype: torch.dtype) -> None:
    """Of a symmetric relation: log-sum-exps of some rows are near to one another, of others too far apart."""
    case = relation(SequenceLayout.bidirectional([300]), (32, 32), dtype, "symmetric", heads=1)
    for x in (case.operands[0], case.operands[2]):
        x[60:120] *= 3.5
        x[200:290:7] *= 4.5
    exact = _check(case)[1]
    steps = exact[0] / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert steps.max() - steps[0] > 60 and (steps - steps[0]).abs()[120:190].max() < 45


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exps_below_zero(dtype: torch.dtype) -> None:
    """Of a symmetric relation whose scores all are; rows that are not there have scores of zero."""
    layout = SequenceLayout.bidirectional([70, 9])
    case = relation(layout, (16, 16), dtype, "symmetric", teacher_scale=-2.0, student_scale=-3.0)
    for x in (case.operands[0], case.operands[2]):
        x.copy_(1.5 + x / 16)
    assert max(x.max() for x in _check(case)[1:3]) < -30


@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
def test_equal_sides(kind: str) -> None:
    layout = SequenceLayout.from_counts([70, 1, 90], [0, 0, 9], [0, 0, 9])
    case = relation(layout, (32, 32), torch.float16, kind)
    a, b = case.operands[:2]
    case.operands = [a, b, a.clone() if kind == "distinct" else a, b]
    if kind == "symmetric":
        case.operands[2:] = [case.operands[2].clone()] * 2
    loss, teacher, student, *gradients = _run(case)
    assert loss == 0 and torch.equal(teacher, student)
    assert max(x.abs().max().item() for x in gradients) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_alone_gives_the_same(kind: str) -> None:
    """Bitwise, for the log-sum-exps and, in a sum, for the gradients; what is not a number elsewhere stays there."""
    case = relation(SequenceLayout.from_counts([70, 66], [5, 70], [5, 3]), (64, 32), torch.float16, kind)
    case.options = {"reduction": "sum"}
    alone = relation(SequenceLayout.from_counts([66], [70], [3]), (64, 32), torch.float16, kind)
    parts = {id(x): x[80:] for x in case.operands}
    alone.operands, alone.options = [parts[id(x)] for x in case.operands], case.options
    expected = _run(alone)
    for spoilt in (False, True):
        if spoilt:
            case.operands[2][33] = float("nan")
        found = _run(case)
        assert all(torch.equal(x[:, 80:], y) for x, y in zip(found[1:3], expected[1:3], strict=True))
        assert all(torch.equal(x[80:], y) for x, y in zip(found[3:], expected[3:], strict=True))
        assert found[0].isnan().item() == spoilt
        assert found[3][:80].isnan().any().item() == spoilt


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_rows_are_copied(kind: str) -> None:
    case = relation(SequenceLayout.pseudo_masked([20], [9]), (16, 24), torch.bfloat16, kind)
    expected = _run(case)
    moved = {}
    for x in case.operands:
        odd = torch.full((*x.shape[:2], x.shape[2] + 1), float("nan"), dtype=x.dtype)
        odd[..., 1:] = x
        moved[id(x)] = odd[..., 1:]
    case.operands = [moved[id(x)] for x in case.operands]
    assert all(map(torch.equal, _run(case), expected))


@pytest.mark.parametrize("kind", ["distinct", "symmetric"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int], kind: str) -> None:
    loss, *rest = _run(relation(SequenceLayout.bidirectional(lengths), (16, 16), torch.float16, kind))
    assert loss == 0 and loss.dtype == torch.float32 and all(x.numel() == 0 for x in rest)


@pytest.mark.parametrize(("usable", "chosen"), [({"triton", "cuda"}, "triton"), ({"cuda"}, "cuda")])
def test_triton_comes_first(usable: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(name: str, *_: object) -> str | None:
        return None if name in usable | {"reference"} else "not here"

    monkeypatch.setattr(_dispatch, "unusable", unusable)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(3, 2, 32, dtype=torch.float16, device="cuda")
    assert _dispatch.select("relation_kl", x) == chosen


@pytest.mark.parametrize(
    ("shape", "dtypes", "reason"),
    [
        ((3, 2, 32), (torch.float32, torch.float32), "float32 and torch.float32, not both fp16 or bf16"),
        ((3, 2, 32), (torch.float16, torch.bfloat16), "float16 and torch.bfloat16, not both fp16 or bf16"),
        ((3, 2, 12), (torch.float16, torch.float16), "head size 12 is not a multiple of 8"),
        ((3, 2, 136), (torch.float16, torch.float16), "head size 136 is not a multiple of 8 between 8 and 128"),
    ],
)
def test_what_it_cannot_do_has_a_reason(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "unusable", lambda *_: None)
    teacher, student = (torch.zeros(shape, dtype=dtype) for dtype in dtypes)
    with backend("cuda"), pytest.raises(UserError, match=f"backend 'cuda' cannot run relation_kl: .*{reason}"):
        ops.relation_kl(teacher, teacher, student, student, SequenceLayout.bidirectional([3]))


X = torch.zeros(3, 2, 16, dtype=torch.float16)
CU, SEGMENTS = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[1, 2, 0]], dtype=torch.int32)
BAD = [
    ({"student_a": X.float()}, "student_a must be"),
    ({"student_a": X[0]}, "student_a must be"),
    ({"student_a": X[..., :12]}, "multiple of 8"),
    ({"student_b": X[:2]}, "student_b must have the shape"),
    ({"teacher_a": X.bfloat16()}, "teacher_a must be"),
    ({"teacher_a": X[:, :1]}, "teacher_a must have the shape"),
    ({"teacher_b": X[..., :8]}, "teacher_b must have the shape"),
    ({"cu": CU.long()}, "cu_seqlens must be"),
    ({"cu": CU[:1]}, "cu_seqlens must have the shape"),
    ({"segments": SEGMENTS[:, :2]}, "segments must have the shape"),
    ({"longest": -1}, "batch is too large"),
    ({"reduction": "mean"}, "reduction must be"),
]


def _arguments() -> dict[str, Any]:
    return {
        **{"teacher_a": X, "teacher_b": X, "student_a": X, "student_b": X},
        **{"cu": CU, "segments": SEGMENTS, "longest": 3, "teacher_scale": 1.0, "student_scale": 1.0},
        "reduction": "sum",
    }


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"relation_kl: .*{message}"):
        operators().relation_kl(*(_arguments() | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *BAD,
        ({"grad": torch.zeros(1)}, "grad must have the shape"),
        ({"lse_teacher": torch.zeros(2, 3)}, "lse_teacher must be"),
        ({"lse_student": torch.zeros(3, 2, dtype=torch.float64)}, "lse_student must have the shape"),
    ],
)
def test_bad_arguments_of_the_backward_pass(changes: dict[str, Any], message: str) -> None:
    tensors = list(_arguments().items())
    lse = torch.zeros(2, 3, dtype=torch.float64)
    arguments = {"grad": torch.tensor(1.0), **dict(tensors[:4]), "lse_teacher": lse, "lse_student": lse}
    with pytest.raises(RuntimeError, match=f"relation_kl: .*{message}"):
        operators().relation_kl_backward(*(arguments | dict(tensors[4:]) | changes).values())
