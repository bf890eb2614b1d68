"""The backward kernels of packed attention, launched by attention.py: each gradient has one kernel that owns it."""

from __future__ import annotations

import triton
import triton.language as tl
from minilm_fast.kernels.common import (
    LOG2E,
    UNSPECIALIZED,
    attended_sequence,
    distance_bias,
    dropout_keep,
    dropout_keep_one,
    load_rows,
    rows_that_see,
    store_rows,
    tile_of,
    visible_columns,
    visible_prefix,
)
from minilm_fast.kernels.exponential import exp2


@triton.jit(do_not_specialize=["queries"])
def attention_delta(
    grad_out, out, delta, grad_token, grad_head, out_token, out_head, queries, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """``<grad_out_i, out_i>`` of each row: what the softmax takes off the gradient of its row."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    g = load_rows(grad_out + head * grad_head, row, grad_token, inside, SIZE, SIZE).to(tl.float32)
    o = load_rows(out + head * out_head, row, out_token, inside, SIZE, SIZE).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * queries + row, tl.sum(g * o, 1), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_rows(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    dq,
    bias_sums,
    fixed_point,
    dq_token,
    cu_seqlens,
    segments,
    cu_queries,
    relative_bias,
    position_ids,
    grad_token,
    grad_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    queries,
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
    """The gradient of q or, where there are ``bias_sums``, that of the bias instead."""
    head = tl.program_id(1)
    first, length, source, target, shift, row_begin = attended_sequence(cu_seqlens, segments, cu_queries)
    row_first = row_begin + tl.program_id(0) * ROWS
    if row_first >= length:
        return
    row = row_first + tl.arange(0, ROWS)
    inside, prefix, most, least = visible_columns(row, length, source, target)
    q_tile = load_rows(q + head * q_head, shift + row, q_token, inside, SIZE, SIZE)
    g_tile = load_rows(grad_out + head * grad_head, shift + row, grad_token, inside, SIZE, SIZE)
    place = head.to(tl.int64) * queries + shift + row
    # The exponent of a row beyond the end is -infinity.
    exponent = tl.load(lse + place, mask=inside, other=float("inf")) * LOG2E
    level = tl.load(delta + place, mask=inside, other=0.0)
    if relative_bias is not None:
        row_position = tl.load(position_ids + first + row, mask=inside, other=0)
    if bias_sums is not None:
        sums = bias_sums + head * (2 * limit + 1)
        units = tl.load(fixed_point)
        nearest = tl.zeros([ROWS], tl.int64)
        farthest = tl.zeros([ROWS], tl.int64)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    if tl.minimum(row_first + ROWS, length) > source + target:
        own = inside & (row >= source + target)
        own_k = load_rows(k + head * k_head, first + row, k_token, own, SIZE, SIZE).to(tl.float32)
        own_v = load_rows(v + head * v_head, first + row, v_token, own, SIZE, SIZE).to(tl.float32)
        score = tl.sum(q_tile.to(tl.float32) * own_k, 1) * (scale * LOG2E)
        if relative_bias is not None:
            score += tl.load(relative_bias + head * (2 * limit + 1) + limit) * LOG2E
        dp = tl.sum(g_tile.to(tl.float32) * own_v, 1)
        if DROPOUT:
            kept = dropout_keep_one(low, high, threshold, head, shift + row, row)
            dp = tl.where(kept, dp * factor, 0.0)
        ds = tl.where(own, tl.exp2(score - exponent) * (dp - level), 0.0)
        if bias_sums is not None:
            tl.atomic_add(sums + limit, tl.sum((ds * units).to(tl.int64), 0), sem="relaxed")
        else:
            acc = ds[:, None] * own_k

    full_end = least // COLUMNS * COLUMNS
    dim = tl.arange(0, SIZE)
    for phase in tl.static_range(2):
        begin = 0 if phase == 0 else full_end
        end = full_end if phase == 0 else most
        for column_first in range(begin, end, COLUMNS):
            column = column_first + tl.arange(0, COLUMNS)
            token = (first + column).to(tl.int64)
            k_place = k + head * k_head + token[None, :] * k_token + dim[:, None]
            v_place = v + head * v_head + token[None, :] * v_token + dim[:, None]
            if phase == 0:
                k_tile = tl.load(k_place)
                v_tile = tl.load(v_place)
            else:
                k_tile = tl.load(k_place, mask=(column < length)[None, :], other=0.0)
                v_tile = tl.load(v_place, mask=(column < length)[None, :], other=0.0)
            scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * (scale * LOG2E)
            if relative_bias is not None:
                position = tl.load(position_ids + first + column, mask=column < length, other=0)
                scores += distance_bias(relative_bias, head, limit, row_position, position)
            p = exp2(scores - exponent[:, None], SHARE)
            if phase == 1:
                p = tl.where(column[None, :] < prefix[:, None], p, 0.0)
            dp = tl.dot(g_tile, v_tile, input_precision=PRECISION)
            if DROPOUT:
                keep = dropout_keep(low, high, threshold, head, shift + row, column_first, COLUMNS)
                dp = tl.where(keep, dp * factor, 0.0)
            ds = p * (dp - level[:, None])
            if bias_sums is not None:
                numbers = (ds * units).to(tl.int64)
                distance = position[None, :] - row_position[:, None]
                nearest += tl.sum(tl.where(distance <= -limit, numbers, 0), 1)
                farthest += tl.sum(tl.where((distance >= limit) & (distance > -limit), numbers, 0), 1)
                between = (distance > -limit) & (distance < limit) & (p > 0.0)
                tl.atomic_add(sums + limit + distance, numbers, mask=between, sem="relaxed")
            else:
                acc = tl.dot(ds.to(k.dtype.element_ty), tl.trans(k_tile), acc, input_precision=PRECISION)
    if bias_sums is not None:
        tl.atomic_add(sums, tl.sum(nearest, 0), sem="relaxed")
        tl.atomic_add(sums + 2 * limit, tl.sum(farthest, 0), sem="relaxed")
    else:
        store_rows(dq + head * SIZE, shift + row, dq_token, inside, acc * scale, SIZE, SIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_columns(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    dk_token,
    dv_token,
    cu_seqlens,
    segments,
    cu_queries,
    relative_bias,
    position_ids,
    grad_token,
    grad_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    queries,
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
    """The gradients of k and v. Tiles are transposed, ``[columns, rows]``, so that probabilities are left operands."""
    head = tl.program_id(1)
    first, length, source, target, shift, row_begin = attended_sequence(cu_seqlens, segments, cu_queries)
    column_first = tl.program_id(0) * COLUMNS
    if column_first >= length:
        return
    column = column_first + tl.arange(0, COLUMNS)
    inside = column < length
    k_tile = load_rows(k + head * k_head, first + column, k_token, inside, SIZE, SIZE)
    v_tile = load_rows(v + head * v_head, first + column, v_token, inside, SIZE, SIZE)
    statistics = head.to(tl.int64) * queries + shift
    if relative_bias is not None:
        position = tl.load(position_ids + first + column, mask=inside, other=0)
    dk_acc = tl.zeros([COLUMNS, SIZE], tl.float32)
    dv_acc = tl.zeros([COLUMNS, SIZE], tl.float32)
    if tl.minimum(column_first + COLUMNS, length) > source + target:
        own = inside & (column >= tl.maximum(source + target, row_begin))
        own_q = load_rows(q + head * q_head, shift + column, q_token, own, SIZE, SIZE).to(tl.float32)
        own_g = load_rows(grad_out + head * grad_head, shift + column, grad_token, own, SIZE, SIZE).to(tl.float32)
        exponent = tl.load(lse + statistics + column, mask=own, other=float("inf")) * LOG2E
        level = tl.load(delta + statistics + column, mask=own, other=0.0)
        score = tl.sum(own_q * k_tile.to(tl.float32), 1) * (scale * LOG2E)
        if relative_bias is not None:
            score += tl.load(relative_bias + head * (2 * limit + 1) + limit) * LOG2E
        p = tl.exp2(score - exponent)
        dp = tl.sum(own_g * v_tile.to(tl.float32), 1)
        dv_acc = p[:, None] * own_g
        if DROPOUT:
            kept = dropout_keep_one(low, high, threshold, head, shift + column, column)
            dp = tl.where(kept, dp * factor, 0.0)
            dv_acc = tl.where(kept[:, None], dv_acc, 0.0)
        dk_acc = (p * (dp - level))[:, None] * own_q

    for phase in tl.static_range(2):
        a, a_end, b, b_end, c, c_end = rows_that_see(
            column_first, column_first + COLUMNS, row_begin, source, target, length, phase == 1
        )
        tiles = tl.cdiv(a_end - a, ROWS) + tl.cdiv(b_end - b, ROWS) + tl.cdiv(c_end - c, ROWS)
        for tile in range(0, tiles):
            start, stop = tile_of(tile, a, a_end, b, b_end, c, c_end, ROWS)
            row = start + tl.arange(0, ROWS)
            asks = row < stop
            q_tile = load_rows(q + head * q_head, shift + row, q_token, asks, SIZE, SIZE)
            g_tile = load_rows(grad_out + head * grad_head, shift + row, grad_token, asks, SIZE, SIZE)
            # The exponent of a row beyond the end of its range is -infinity.
            exponent = tl.load(lse + statistics + row, mask=asks, other=float("inf")) * LOG2E
            level = tl.load(delta + statistics + row, mask=asks, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
            if relative_bias is not None:
                row_position = tl.load(position_ids + first + row, mask=asks, other=0)
                scores += tl.trans(distance_bias(relative_bias, head, limit, row_position, position))
            p = exp2(scores - exponent[None, :], SHARE)
            if phase == 1:
                p = tl.where(column[:, None] < visible_prefix(row, source, target)[None, :], p, 0.0)
            dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
            kept_p = p
            if DROPOUT:
                keep = tl.trans(dropout_keep(low, high, threshold, head, shift + row, column_first, COLUMNS))
                kept_p = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * factor, 0.0)
            dv_acc = tl.dot(kept_p.to(v.dtype.element_ty), g_tile, dv_acc, input_precision=PRECISION)
            ds = p * (dp - level[None, :])
            dk_acc = tl.dot(ds.to(q.dtype.element_ty), q_tile, dk_acc, input_precision=PRECISION)
    if DROPOUT:
        dv_acc *= factor
    store_rows(dk + head * SIZE, first + column, dk_token, inside, dk_acc * scale, SIZE, SIZE)
    store_rows(dv + head * SIZE, first + column, dv_token, inside, dv_acc, SIZE, SIZE)
