"""The distillation loss of a relation, forward and backward (minilm_fast/ops/relation_kl.py).

Tiles of both score matrices are computed side by side, over the columns that a tile of rows sees, as in attention.py.
Forward keeps a running maximum and sum of each side and the sum of ``exp(t - maximum) (t - s)``; the log-sum-exps go
out in fp64, because one that is rounded to fp32 shifts all of a row's probabilities. The gradient of ``a`` comes from a
kernel that owns rows, that of ``b`` from one that owns columns; where they are one tensor, the second adds the first's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from minilm_fast.kernels.common import (
    LN2,
    LOG2E,
    capability,
    check,
    check_rows,
    check_sequences,
    load_rows,
    precision,
    rows_that_see,
    store_rows,
    tile_of,
    visible_columns,
    visible_prefix,
)
from minilm_fast.kernels.exponential import exp2, one_in

Optional = torch.Tensor | None
LEAST_SIZE, MOST_SIZE = 8, 128
REDUCTIONS = ("batch_mean", "token_mean", "sum")


class Tiles(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles(size: int, dtype: torch.dtype) -> Tiles:
    """By the larger head size, rounded up to a power of two, and the wider type of the two sides."""
    if dtype == torch.float32:
        return Tiles(32, 32, 8 if size >= 64 else 4, 1)
    return Tiles(64, 64, 8 if size == 128 else 4, 2)


@triton.jit
def _exponent(lse, place, inside):
    """A log-sum-exp in powers of two as the sum of two fp32 numbers; infinite outside, where the exponential is 0."""
    whole = tl.load(lse + place, mask=inside, other=float("inf")) * 1.4426950408889634
    high = whole.to(tl.float32)
    low = tl.where(inside, (whole - high.to(tl.float64)).to(tl.float32), 0.0)
    return high, low


@triton.jit
def _relation_kl_forward(
    teacher_a,
    teacher_b,
    student_a,
    student_b,
    cu_seqlens,
    segments,
    weights,
    divergence,
    lse_teacher,
    lse_student,
    ta_token,
    ta_head,
    tb_token,
    tb_head,
    sa_token,
    sa_head,
    sb_token,
    sb_head,
    tokens,
    teacher_scale,
    student_scale,
    TEACHER: tl.constexpr,
    TEACHER_PADDED: tl.constexpr,
    STUDENT: tl.constexpr,
    STUDENT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr,
    SHARE: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    source = tl.load(segments + 3 * sequence)
    target = tl.load(segments + 3 * sequence + 1)
    row_first = tl.program_id(0) * ROWS
    if row_first >= length:
        return
    row = row_first + tl.arange(0, ROWS)
    inside, prefix, most, least = visible_columns(row, length, source, target)
    # Rows beyond the end see one column, so that no NaN comes up.
    prefix = tl.where(inside, prefix, 1)
    ta = load_rows(teacher_a + head * ta_head, first + row, ta_token, inside, TEACHER, TEACHER_PADDED)
    sa = load_rows(student_a + head * sa_head, first + row, sa_token, inside, STUDENT, STUDENT_PADDED)
    t_maximum = tl.full([ROWS], float("-inf"), tl.float32)
    s_maximum = tl.full([ROWS], float("-inf"), tl.float32)
    t_total = tl.zeros([ROWS], tl.float32)
    s_total = tl.zeros([ROWS], tl.float32)
    excess = tl.zeros([ROWS], tl.float32)
    if tl.minimum(row_first + ROWS, length) > source + target:
        own = inside & (row >= source + target)
        tb_own = load_rows(teacher_b + head * tb_head, first + row, tb_token, own, TEACHER, TEACHER_PADDED)
        sb_own = load_rows(student_b + head * sb_head, first + row, sb_token, own, STUDENT, STUDENT_PADDED)
        t_own = tl.sum(ta.to(tl.float32) * tb_own.to(tl.float32), 1) * teacher_scale
        s_own = tl.sum(sa.to(tl.float32) * sb_own.to(tl.float32), 1) * student_scale
        t_maximum = tl.where(own, t_own, t_maximum)
        s_maximum = tl.where(own, s_own, s_maximum)
        t_total = tl.where(own, 1.0, t_total)
        s_total = tl.where(own, 1.0, s_total)
        excess = tl.where(own, t_own - s_own, excess)

    full_end = least // COLUMNS * COLUMNS
    for phase in tl.static_range(2):
        # Phase 0: every row sees every column.
        begin = 0 if phase == 0 else full_end
        end = full_end if phase == 0 else most
        for column_first in range(begin, end, COLUMNS):
            column = column_first + tl.arange(0, COLUMNS)
            exists = column < length
            tb = load_rows(teacher_b + head * tb_head, first + column, tb_token, exists, TEACHER, TEACHER_PADDED)
            sb = load_rows(student_b + head * sb_head, first + column, sb_token, exists, STUDENT, STUDENT_PADDED)
            t = tl.dot(ta, tl.trans(tb), input_precision=TEACHER_PRECISION) * teacher_scale
            s = tl.dot(sa, tl.trans(sb), input_precision=STUDENT_PRECISION) * student_scale
            difference = t - s
            if phase == 1:
                visible = column[None, :] < prefix[:, None]
                t = tl.where(visible, t, float("-inf"))
                s = tl.where(visible, s, float("-inf"))
            t_now = tl.maximum(t_maximum, tl.max(t, 1))
            s_now = tl.maximum(s_maximum, tl.max(s, 1))
            p = exp2(t - t_now[:, None], SHARE)
            correction = tl.exp2(t_maximum - t_now)
            t_total = t_total * correction + tl.sum(p, 1)
            excess = excess * correction + tl.sum(p * difference, 1)
            s_total = s_total * tl.exp2(s_maximum - s_now) + tl.sum(exp2(s - s_now[:, None], SHARE), 1)
            t_maximum = t_now
            s_maximum = s_now
    place = head.to(tl.int64) * tokens + first + row
    t_log = tl.log2(t_total)
    s_log = tl.log2(s_total)
    kl = (excess / t_total + (s_maximum - t_maximum) + (s_log - t_log)) * LN2
    tl.store(divergence + place, kl * tl.load(weights + sequence), mask=inside)
    tl.store(lse_teacher + place, (t_maximum.to(tl.float64) + t_log.to(tl.float64)) * 0.6931471805599453, mask=inside)
    tl.store(lse_student + place, (s_maximum.to(tl.float64) + s_log.to(tl.float64)) * 0.6931471805599453, mask=inside)


@triton.jit
def _relation_kl_backward_rows(
    grad,
    teacher_a,
    teacher_b,
    student_a,
    student_b,
    cu_seqlens,
    segments,
    weights,
    lse_teacher,
    lse_student,
    a_grad,
    ta_token,
    ta_head,
    tb_token,
    tb_head,
    sa_token,
    sa_head,
    sb_token,
    sb_head,
    tokens,
    teacher_scale,
    student_scale,
    unit,
    TEACHER: tl.constexpr,
    TEACHER_PADDED: tl.constexpr,
    STUDENT: tl.constexpr,
    STUDENT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr,
    SHARE: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    sequence = tl.program_id(2)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    source = tl.load(segments + 3 * sequence)
    target = tl.load(segments + 3 * sequence + 1)
    row_first = tl.program_id(0) * ROWS
    if row_first >= length:
        return
    row = row_first + tl.arange(0, ROWS)
    inside, prefix, most, least = visible_columns(row, length, source, target)
    ta = load_rows(teacher_a + head * ta_head, first + row, ta_token, inside, TEACHER, TEACHER_PADDED)
    sa = load_rows(student_a + head * sa_head, first + row, sa_token, inside, STUDENT, STUDENT_PADDED)
    place = head.to(tl.int64) * tokens + first + row
    t_high, t_low = _exponent(lse_teacher, place, inside)
    s_high, s_low = _exponent(lse_student, place, inside)
    acc = tl.zeros([ROWS, STUDENT_PADDED], tl.float32)
    if tl.minimum(row_first + ROWS, length) > source + target:
        own = inside & (row >= source + target)
        tb_own = load_rows(teacher_b + head * tb_head, first + row, tb_token, own, TEACHER, TEACHER_PADDED)
        sb_own = load_rows(student_b + head * sb_head, first + row, sb_token, own, STUDENT, STUDENT_PADDED)
        t_own = tl.sum(ta.to(tl.float32) * tb_own.to(tl.float32), 1) * teacher_scale
        s_own = tl.sum(sa.to(tl.float32) * sb_own.to(tl.float32), 1) * student_scale
        d_own = tl.exp2(s_own - s_high - s_low) - tl.exp2(t_own - t_high - t_low)
        acc = tl.where(own, d_own * unit, 0.0)[:, None] * sb_own.to(tl.float32)

    full_end = least // COLUMNS * COLUMNS
    for phase in tl.static_range(2):
        begin = 0 if phase == 0 else full_end
        end = full_end if phase == 0 else most
        for column_first in range(begin, end, COLUMNS):
            column = column_first + tl.arange(0, COLUMNS)
            exists = column < length
            tb = load_rows(teacher_b + head * tb_head, first + column, tb_token, exists, TEACHER, TEACHER_PADDED)
            sb = load_rows(student_b + head * sb_head, first + column, sb_token, exists, STUDENT, STUDENT_PADDED)
            t = tl.dot(ta, tl.trans(tb), input_precision=TEACHER_PRECISION) * teacher_scale
            s = tl.dot(sa, tl.trans(sb), input_precision=STUDENT_PRECISION) * student_scale
            d = exp2(s - s_high[:, None] - s_low[:, None], SHARE) - exp2(t - t_high[:, None] - t_low[:, None], SHARE)
            if phase == 1:
                d = tl.where(column[None, :] < prefix[:, None], d, 0.0)
            acc = tl.dot((d * unit).to(sb.dtype), sb, acc, input_precision=STUDENT_PRECISION)
    factor = tl.load(grad) * tl.load(weights + sequence) * (student_scale * LN2) / unit
    store_rows(a_grad + head * STUDENT, first + row, heads * STUDENT, inside, acc * factor, STUDENT, STUDENT_PADDED)


@triton.jit
def _relation_kl_backward_columns(
    grad,
    teacher_a,
    teacher_b,
    student_a,
    student_b,
    cu_seqlens,
    segments,
    weights,
    lse_teacher,
    lse_student,
    a_grad,
    b_grad,
    ta_token,
    ta_head,
    tb_token,
    tb_head,
    sa_token,
    sa_head,
    sb_token,
    sb_head,
    tokens,
    teacher_scale,
    student_scale,
    unit,
    TEACHER: tl.constexpr,
    TEACHER_PADDED: tl.constexpr,
    STUDENT: tl.constexpr,
    STUDENT_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr,
    SHARE: tl.constexpr,
):
    """The gradient of b, to which ``a_grad`` is added unless it is None. Tiles are transposed, ``[columns, rows]``."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    sequence = tl.program_id(2)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    source = tl.load(segments + 3 * sequence)
    target = tl.load(segments + 3 * sequence + 1)
    column_first = tl.program_id(0) * COLUMNS
    if column_first >= length:
        return
    column = column_first + tl.arange(0, COLUMNS)
    inside = column < length
    tb = load_rows(teacher_b + head * tb_head, first + column, tb_token, inside, TEACHER, TEACHER_PADDED)
    sb = load_rows(student_b + head * sb_head, first + column, sb_token, inside, STUDENT, STUDENT_PADDED)
    statistics = head.to(tl.int64) * tokens + first
    acc = tl.zeros([COLUMNS, STUDENT_PADDED], tl.float32)
    if tl.minimum(column_first + COLUMNS, length) > source + target:
        own = inside & (column >= source + target)
        ta_own = load_rows(teacher_a + head * ta_head, first + column, ta_token, own, TEACHER, TEACHER_PADDED)
        sa_own = load_rows(student_a + head * sa_head, first + column, sa_token, own, STUDENT, STUDENT_PADDED)
        t_high, t_low = _exponent(lse_teacher, statistics + column, own)
        s_high, s_low = _exponent(lse_student, statistics + column, own)
        t_own = tl.sum(ta_own.to(tl.float32) * tb.to(tl.float32), 1) * teacher_scale
        s_own = tl.sum(sa_own.to(tl.float32) * sb.to(tl.float32), 1) * student_scale
        d_own = tl.exp2(s_own - s_high - s_low) - tl.exp2(t_own - t_high - t_low)
        acc = (d_own * unit)[:, None] * sa_own.to(tl.float32)

    for phase in tl.static_range(2):
        a, a_end, b, b_end, c, c_end = rows_that_see(
            column_first, column_first + COLUMNS, length - length, source, target, length, phase == 1
        )
        count = tl.cdiv(a_end - a, ROWS) + tl.cdiv(b_end - b, ROWS) + tl.cdiv(c_end - c, ROWS)
        for tile in range(0, count):
            start, stop = tile_of(tile, a, a_end, b, b_end, c, c_end, ROWS)
            row = start + tl.arange(0, ROWS)
            asks = row < stop
            ta = load_rows(teacher_a + head * ta_head, first + row, ta_token, asks, TEACHER, TEACHER_PADDED)
            sa = load_rows(student_a + head * sa_head, first + row, sa_token, asks, STUDENT, STUDENT_PADDED)
            t_high, t_low = _exponent(lse_teacher, statistics + row, asks)
            s_high, s_low = _exponent(lse_student, statistics + row, asks)
            t = tl.dot(tb, tl.trans(ta), input_precision=TEACHER_PRECISION) * teacher_scale
            s = tl.dot(sb, tl.trans(sa), input_precision=STUDENT_PRECISION) * student_scale
            d = exp2(s - s_high[None, :] - s_low[None, :], SHARE) - exp2(t - t_high[None, :] - t_low[None, :], SHARE)
            if phase == 1:
                d = tl.where(column[:, None] < visible_prefix(row, source, target)[None, :], d, 0.0)
            acc = tl.dot((d * unit).to(sa.dtype), sa, acc, input_precision=STUDENT_PRECISION)
    acc *= tl.load(grad) * tl.load(weights + sequence) * (student_scale * LN2) / unit
    if a_grad is not None:
        acc += load_rows(a_grad + head * STUDENT, first + column, heads * STUDENT, inside, STUDENT, STUDENT_PADDED)
    store_rows(b_grad + head * STUDENT, first + column, heads * STUDENT, inside, acc, STUDENT, STUDENT_PADDED)


class _Call:
    """The arguments that the kernels have in common, checked."""

    def __init__(
        self,
        op: str,
        teacher_a: torch.Tensor,
        teacher_b: Optional,
        student_a: torch.Tensor,
        student_b: Optional,
        cu_seqlens: torch.Tensor,
        segments: torch.Tensor,
        max_seqlen: int,
        teacher_scale: float,
        student_scale: float,
        reduction: str,
    ) -> None:
        check(reduction in REDUCTIONS, f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.op = op
        self.tensors = (
            teacher_a,
            teacher_a if teacher_b is None else teacher_b,
            student_a,
            student_a if student_b is None else student_b,
        )
        check(student_a.dim() == 3, f"{op}: student_a must be [tokens, heads, head_dim], got {list(student_a.shape)}")
        self.tokens, self.heads, _ = student_a.shape
        for name, x, like in zip(
            ("teacher_a", "teacher_b", "student_a", "student_b"),
            self.tensors,
            (teacher_a, teacher_a, student_a, student_a),
            strict=True,
        ):
            size = like.shape[-1]
            check(LEAST_SIZE <= size <= MOST_SIZE, f"{op}: the head size of {name} must be 8 to 128, got {size}")
            check_rows(op, name, x, torch.Size((self.tokens, self.heads, size)), student_a.device)
            check(x.dtype == like.dtype, f"{op}: {name} must be {like.dtype} as its other side, got {x.dtype}")
        check_sequences(op, self.tokens, student_a.device, cu_seqlens, segments)
        self.batch, self.max_seqlen = segments.shape[0], max_seqlen
        lengths = cu_seqlens.diff()
        weights = torch.ones(self.batch, dtype=torch.float32, device=student_a.device)
        if reduction == "token_mean":
            weights /= max(self.heads * self.tokens, 1)
        elif reduction == "batch_mean":
            weights /= self.heads * lengths.clamp(min=1) * (lengths > 0).sum()
        self.sequences = (cu_seqlens, segments, weights)
        self.strides = tuple(s for x in self.tensors for s in x.stride()[:2])
        # Scores are in units of powers of two.
        self.scales = (teacher_scale * LOG2E.value, student_scale * LOG2E.value)
        self.sizes = (teacher_a.shape[2], student_a.shape[2])

    def launch(self, by_row: bool) -> tuple[tuple[int, int, int], dict[str, Any]]:
        padded = [max(16, triton.next_power_of_2(size)) for size in self.sizes]
        types = (self.tensors[0].dtype, self.tensors[2].dtype)
        widest = max(types, key=lambda dtype: dtype.itemsize)
        chosen = tiles(max(padded), widest)
        share = one_in(self.op, max(padded), widest)
        if by_row and self.op == "relation_kl_backward" and capability() < 90:
            # There the halves would go through shared memory on their way to the next product.
            share = 0
        grid = (triton.cdiv(self.max_seqlen, chosen.rows if by_row else chosen.columns), self.heads, self.batch)
        return grid, {
            "TEACHER": self.sizes[0],
            "TEACHER_PADDED": padded[0],
            "STUDENT": self.sizes[1],
            "STUDENT_PADDED": padded[1],
            "ROWS": chosen.rows,
            "COLUMNS": chosen.columns,
            "TEACHER_PRECISION": precision(types[0]),
            "STUDENT_PRECISION": precision(types[1]),
            "SHARE": share,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }


def relation_kl(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Host function of the operator: the loss, and both log-sum-exps, fp64 ``[heads, tokens]``."""
    call = _Call("relation_kl", *arguments)
    device = call.tensors[0].device
    shape = (call.heads, call.tokens)
    lse = [torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2)]
    divergence = torch.empty(shape, dtype=torch.float32, device=device)
    if divergence.numel():
        grid, options = call.launch(True)
        _relation_kl_forward[grid](
            *call.tensors, *call.sequences, divergence, *lse, *call.strides, call.tokens, *call.scales, **options
        )
    return divergence.sum(dtype=torch.float64).float(), lse[0], lse[1]


def relation_kl_backward(
    grad: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: Optional,
    student_a: torch.Tensor,
    student_b: Optional,
    lse_teacher: torch.Tensor,
    lse_student: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Host function of the operator: the gradients of student_a and, where it is given, student_b (else empty)."""
    op = "relation_kl_backward"
    call = _Call(op, teacher_a, teacher_b, student_a, student_b, *options)
    for name, x in (("lse_teacher", lse_teacher), ("lse_student", lse_student)):
        check(x.dtype == torch.float64 and x.is_contiguous(), f"{op}: {name} must be contiguous and fp64")
        check(x.shape == (call.heads, call.tokens), f"{op}: {name} must have the shape {[call.heads, call.tokens]}")
    symmetric = student_b is None
    a_grad = torch.empty(student_a.shape, dtype=student_a.dtype, device=student_a.device)
    b_grad = a_grad if symmetric else torch.empty_like(a_grad)
    if a_grad.numel():
        rows_grad = torch.empty_like(a_grad, dtype=torch.float32) if symmetric else a_grad
        # Differences of probabilities would leave the normal numbers of fp16; 4096 times them do not.
        unit = 4096.0 if student_a.dtype == torch.float16 else 1.0
        head = (grad, *call.tensors, *call.sequences, lse_teacher, lse_student)
        tail = (*call.strides, call.tokens, *call.scales, unit)
        grid, compiled = call.launch(True)
        _relation_kl_backward_rows[grid](*head, rows_grad, *tail, **compiled)
        grid, compiled = call.launch(False)
        _relation_kl_backward_columns[grid](*head, rows_grad if symmetric else None, b_grad, *tail, **compiled)
    return a_grad, a_grad.new_empty(0) if symmetric else b_grad
