"""Packed attention, forward and backward (minilm_fast/ops/attention.py; Dao, FlashAttention-2, arXiv 2307.08691).

Every row sees a prefix of its sequence, and a pseudo row itself besides (``visible_prefix``). So a tile of rows visits
the columns up to its longest prefix, without any mask up to its shortest one; what a pseudo row sees of itself is not
worth a tile and is added number by number. The gradients of q come from one kernel, those of k and v from another that
visits the rows which see its columns (both in attention_backward.py): each sum has one owner and one order. Scores are
kept in units of powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from minilm_fast.kernels.attention_backward import (
    attention_backward_columns,
    attention_backward_rows,
    attention_delta,
)
from minilm_fast.kernels.common import (
    LN2,
    LOG2E,
    UNSPECIALIZED,
    Dropout,
    attended_sequence,
    capability,
    check,
    check_rows,
    check_sequences,
    check_vector,
    distance_bias,
    dropout_keep,
    dropout_keep_one,
    load_rows,
    precision,
    store_rows,
    visible_columns,
    with_contiguous_rows,
)
from minilm_fast.kernels.exponential import exp2, one_in

Optional = torch.Tensor | None
HEAD_SIZES = (32, 64, 128)
# Sums of fixed-point numbers do not depend on their order. A unit is the bound of a number over 2^40, and the numbers
# of a row add up to no more than two bounds: 2^22 rows fit.
_FIXED_POINT = 2.0**40


class Tiles(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def forward_tiles(size: int, dtype: torch.dtype, plain: bool) -> Tiles:
    """The largest without spilled registers; ``plain``: neither dropout nor bias, which need more of them."""
    if dtype == torch.float32:
        # Without tensor cores operands live in registers: from head size 64 on a few spill, whatever the tile.
        return Tiles(32, 32, 4 if size == 32 or (size == 64 and capability() < 90) else 8, 2)
    return Tiles(64 if size == 128 else 128, 64, 4 if size == 32 and plain else 8, 3)


def backward_tiles(size: int, dtype: torch.dtype, plain: bool) -> Tiles:
    """See :func:`forward_tiles`."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4 if size == 32 else 8, 1)
    if capability() < 90:
        # There the operands of a product are in registers, not in shared memory.
        return Tiles(64, 64 if plain and size != 64 else 32, 4 if size == 32 else 8, 2)
    return Tiles(64, 64, 4 if size == 32 and plain else 8, 2)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_forward(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    segments,
    cu_queries,
    relative_bias,
    position_ids,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    queries,
    sign,
    scale,
    limit,
    low,
    high,
    threshold,
    factor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARE: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first, length, source, target, shift, row_begin = attended_sequence(cu_seqlens, segments, cu_queries)
    row_first = row_begin + tl.program_id(0) * ROWS
    if row_first >= length:
        return
    row = row_first + tl.arange(0, ROWS)
    inside, prefix, most, least = visible_columns(row, length, source, target)
    # Rows beyond the end see one column, so that no NaN comes up.
    prefix = tl.where(inside, prefix, 1)
    q_tile = load_rows(q + head * q_head, shift + row, q_token, inside, SIZE, SIZE)
    # The maximum is sought before the scale, which is positive here, is applied.
    q_tile = (q_tile.to(tl.float32) * sign).to(q.dtype.element_ty)
    if relative_bias is not None:
        row_position = tl.load(position_ids + first + row, mask=inside, other=0)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    if tl.minimum(row_first + ROWS, length) > source + target:
        own = inside & (row >= source + target)
        own_k = load_rows(k + head * k_head, first + row, k_token, own, SIZE, SIZE).to(tl.float32)
        own_v = load_rows(v + head * v_head, first + row, v_token, own, SIZE, SIZE).to(tl.float32)
        score = tl.sum(q_tile.to(tl.float32) * own_k, 1) * scale
        if relative_bias is not None:
            score += tl.load(relative_bias + head * (2 * limit + 1) + limit) * LOG2E
        maximum = tl.where(own, score, maximum)
        total = tl.where(own, 1.0, total)
        acc = own_v
        if DROPOUT:
            kept = dropout_keep_one(low, high, threshold, head, shift + row, row)
            acc = tl.where(kept[:, None], own_v, 0.0)

    full_end = least // COLUMNS * COLUMNS
    dim = tl.arange(0, SIZE)
    for phase in tl.static_range(2):
        # Phase 0: every row sees every column.
        begin = 0 if phase == 0 else full_end
        end = full_end if phase == 0 else most
        for column_first in range(begin, end, COLUMNS):
            column = column_first + tl.arange(0, COLUMNS)
            token = (first + column).to(tl.int64)
            k_place = k + head * k_head + token[None, :] * k_token + dim[:, None]
            v_place = v + head * v_head + token[:, None] * v_token + dim[None, :]
            if phase == 0:
                k_tile = tl.load(k_place)
                v_tile = tl.load(v_place)
            else:
                k_tile = tl.load(k_place, mask=(column < length)[None, :], other=0.0)
                v_tile = tl.load(v_place, mask=(column < length)[:, None], other=0.0)
            scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
            unit = scale
            if relative_bias is not None:
                position = tl.load(position_ids + first + column, mask=column < length, other=0)
                scores = scores * scale + distance_bias(relative_bias, head, limit, row_position, position)
                unit = 1.0
            if phase == 1:
                scores = tl.where(column[None, :] < prefix[:, None], scores, float("-inf"))
            now = tl.maximum(maximum, tl.max(scores, 1) * unit)
            p = exp2(scores * unit - now[:, None], SHARE)
            correction = tl.exp2(maximum - now)
            total = total * correction + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(dropout_keep(low, high, threshold, head, shift + row, column_first, COLUMNS), p, 0.0)
            acc = tl.dot(p.to(v.dtype.element_ty), v_tile, acc * correction[:, None], input_precision=PRECISION)
            maximum = now
    result = acc / total[:, None]
    if DROPOUT:
        result *= factor
    store_rows(out + head * SIZE, shift + row, heads * SIZE, inside, result, SIZE, SIZE)
    tl.store(lse + head.to(tl.int64) * queries + shift + row, (maximum + tl.log2(total)) * LN2, mask=inside)


class _Call:
    """The arguments that the kernels have in common, checked."""

    def __init__(self, op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> None:
        cu_seqlens, segments, cu_queries, self.max_seqlen, self.scale, bias, position_ids, dropout, seed = options
        check(q.dim() == 3, f"{op}: q must be [tokens, heads, head_dim], got {list(q.shape)}")
        self.queries, self.heads, self.size = q.shape
        check(self.size in HEAD_SIZES, f"{op}: the head size of q must be 32, 64 or 128, got {self.size}")
        for name, x, rows in (("q", q, self.queries), ("k", k, k.shape[0]), ("v", v, k.shape[0])):
            check_rows(op, name, x, torch.Size((rows, self.heads, self.size)), q.device)
            check(x.dtype == q.dtype, f"{op}: {name} must be {q.dtype} as q, got {x.dtype}")
        check_sequences(op, k.shape[0], q.device, cu_seqlens, segments, cu_queries, position_ids)
        check((bias is None) == (position_ids is None), f"{op}: relative_bias and position_ids go together")
        if bias is not None:
            check(bias.dim() == 2 and bias.shape[1] % 2 == 1, f"{op}: relative_bias must be [heads, 2R + 1]")
            check_vector(op, "relative_bias", bias, (self.heads, bias.shape[1]), q.device)
        self.limit = 0 if bias is None else bias.shape[1] // 2
        self.drop = drop = Dropout(op, dropout, seed)
        self.batch = segments.shape[0]
        self.plain = bias is None and drop.threshold == 0
        self.layout = (cu_seqlens, segments, cu_queries, bias, position_ids)
        self.strides = tuple(s for x in (q, k, v) for s in x.stride()[:2])
        self.dropout = (drop.low, drop.high, drop.threshold, drop.factor)
        self.precision = precision(q.dtype)
        self.share = one_in("attention_backward" if op.endswith("backward") else "attention", self.size, q.dtype)

    def grid(self, tile: int) -> tuple[int, int, int]:
        return triton.cdiv(self.max_seqlen, tile), self.heads, self.batch

    def options(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "SIZE": self.size,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "DROPOUT": self.drop.threshold > 0,
            "PRECISION": self.precision,
            "SHARE": self.share,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Host function of the operator: ``out`` of the shape and dtype of q, ``lse [heads, queries]``."""
    call = _Call("attention", q, k, v, *options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((call.heads, call.queries), dtype=torch.float32, device=q.device)
    tiles = forward_tiles(call.size, q.dtype, call.plain)
    if call.queries and call.heads:
        sign, scale = float(call.scale > 0) - float(call.scale < 0), abs(call.scale) or 1.0
        _attention_forward[call.grid(tiles.rows)](
            q,
            k,
            v,
            out,
            lse,
            *call.layout,
            *call.strides,
            call.queries,
            sign,
            scale * LOG2E.value,
            call.limit,
            *call.dropout,
            **call.options(tiles),
        )
    return out, lse


def projected_attention(
    projection: torch.Tensor, queries: Optional, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Host function of the operator, with its arguments; see :func:`attention`."""
    return attention(*_split("projected_attention", projection, queries), *options)


def _split(op: str, projection: torch.Tensor, queries: Optional) -> tuple[torch.Tensor, ...]:
    parts = 3 if queries is None else 2
    check(
        projection.dim() == 4 and projection.shape[1] == parts,
        f"{op}: projection must be [tokens, {parts}, heads, head_dim], got {list(projection.shape)}",
    )
    return projection.unbind(1) if queries is None else (queries, *projection.unbind(1))


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Host function of the operator: the gradients of q, k, v and of the bias (empty if unwanted)."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    bias = _differentiate("attention_backward", (grad_out, out, lse), (q, k, v), gradients, *options)
    return gradients[0], gradients[1], gradients[2], bias


def projected_attention_backward(
    grad_out: torch.Tensor,
    projection: torch.Tensor,
    queries: Optional,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Host function of the operator: the gradients of projection, queries and the bias (empty if unwanted)."""
    op = "projected_attention_backward"
    inputs = _split(op, projection, queries)
    whole = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    own = whole.new_empty(0) if queries is None else whole.new_empty(queries.shape)
    bias = _differentiate(
        op, (grad_out, out, lse), inputs, _split(op, whole, None if queries is None else own), *options
    )
    return whole, own, bias


def _differentiate(
    op: str,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    *options: Any,
) -> torch.Tensor:
    """Writes the gradients of q, k and v, whose heads are packed; returns that of the bias, or an empty tensor."""
    (grad_out, out, lse), (q, k, v), (dq, dk, dv) = results, inputs, gradients
    *options, bias_gradient = options
    call = _Call(op, q, k, v, *options)
    grad_out = with_contiguous_rows(grad_out)
    for name, x in (("grad_out", grad_out), ("out", out)):
        check_rows(op, name, x, q.shape, q.device)
        check(x.dtype == q.dtype, f"{op}: {name} must be {q.dtype} as q, got {x.dtype}")
    check_vector(op, "lse", lse, (call.heads, call.queries), q.device)
    bias = call.layout[3]
    check(bias is not None or not bias_gradient, f"{op}: there is no relative_bias")
    dbias = torch.zeros(bias.shape if bias_gradient else (0,), dtype=torch.float32, device=q.device)
    if not call.queries or not call.heads:
        for gradient in gradients:
            gradient.zero_()
        return dbias
    delta = torch.empty_like(lse)
    attention_delta[(triton.cdiv(call.queries, 64), call.heads)](
        grad_out, out, delta, *grad_out.stride()[:2], *out.stride()[:2], call.queries, call.size, 64, num_warps=4
    )
    tiles = backward_tiles(call.size, q.dtype, call.plain)
    operands = (grad_out, q, k, v, lse, delta)
    strides = (*grad_out.stride()[:2], *call.strides)
    tail = (*call.layout, *strides, call.queries, call.scale, call.limit, *call.dropout)
    by_row = attention_backward_rows[call.grid(tiles.rows)]
    by_column = attention_backward_columns[call.grid(tiles.columns)]
    by_row(*operands, dq, None, None, dq.stride(0), *tail, **call.options(tiles))
    by_column(*operands, dk, dv, dk.stride(0), dv.stride(0), *tail, **call.options(tiles))
    if not bias_gradient:
        return dbias
    units = _units(grad_out, v, call.drop.factor)
    sums = torch.zeros(bias.shape, dtype=torch.int64, device=q.device)
    by_row(*operands, None, sums, units, 0, *tail, **call.options(tiles))
    # Numbers that are none leave no trace in an integer: those of k and q show in lse, the others in the units.
    finite = lse.isfinite().all() & units.isfinite() & (units > 0)
    return torch.where(finite, sums.double() / units.double(), torch.nan).float()


def _units(grad_out: torch.Tensor, v: torch.Tensor, factor: float) -> torch.Tensor:
    """Fixed-point units in 1, fp32 ``[]``; not positive or NaN where an operand is no number.

    No gradient of a score is larger than twice the largest of ``factor * |grad_out_i| |v_j|``.
    """
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad_out, v)]
    return _FIXED_POINT / (2 * factor * norms[0] * norms[1]).clamp(min=1e-20)
