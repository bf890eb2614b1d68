"""The operators in pure PyTorch: their specification, and the fallback where nothing is compiled.

Written for clarity: they pad, build masks and loop where the kernels do not. They accept fp64 (the yardstick of
the tests) and, but for the in-place caches, can be differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from minilm_fast.ops.dropout import dropout_factors
from minilm_fast.ops.layout import SequenceLayout

FORBIDDEN = -10000.0
# Room for the rounding of a log-probability above 0, per remaining step, so that the early exit stays exact.
ROUNDING = 1e-6


def _accumulate(x: torch.Tensor) -> torch.Tensor:
    """To the accumulator type: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _pad(x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """``[tokens, ...]`` to ``[batch, max_seqlen, ...]``, zeros beyond each length."""
    padded = x.new_zeros(layout.segments.shape[0], layout.max_seqlen, *x.shape[1:])
    return padded.index_put(_padded_index(layout), x)


def _padded_index(layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = layout.segments.sum(1).long()
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    token = torch.arange(layout.total, device=lengths.device) - layout.cu_seqlens.long()[sequence]
    return sequence, token


def distance_bias(relative_bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Looks up ``relative_bias [H, 2R+1]`` at ``key - query``, clamped: ``[..., queries, keys]`` -> ``[H, ...]``."""
    limit = relative_bias.shape[1] // 2
    distance = key[..., None, :].long() - query[..., :, None].long()
    return relative_bias[:, distance.clamp(-limit, limit) + limit]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    scale: float,
    relative_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of :func:`minilm_fast.ops.attention`; same arguments and results."""
    dtype, heads = q.dtype, q.shape[1]
    if layout.total_queries == 0:
        return torch.zeros_like(q), _accumulate(q.new_zeros(heads, 0))
    asking = layout.query_index()
    index = tuple(i[asking] for i in _padded_index(layout))
    padded = q.new_zeros(layout.segments.shape[0], layout.max_seqlen, *q.shape[1:])
    queries = _accumulate(padded.index_put(index, q)).transpose(1, 2)
    keys, values = (_pad(_accumulate(x), layout).transpose(1, 2) for x in (k, v))
    scores = queries @ keys.transpose(-1, -2) * scale
    if relative_bias is not None and position_ids is not None:
        positions = _pad(position_ids, layout)
        scores = scores + distance_bias(relative_bias.to(scores.dtype), positions, positions).transpose(0, 1)
    scores = scores.masked_fill(~layout.dense_mask()[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # A row beyond the length sees nothing; a finite value keeps NaN out of it and out of its gradient.
    valid = torch.isfinite(lse)[..., None]
    probabilities = torch.where(valid, scores - torch.where(valid, lse[..., None], 0.0), float("-inf")).exp()
    if dropout > 0 and seed is not None:
        factors = dropout_factors(dropout, seed, q.shape[0], layout.max_seqlen, heads, q.device).transpose(0, 1)
        rows = factors.new_zeros(*padded.shape[:3], layout.max_seqlen).index_put(index, factors)
        probabilities = probabilities * rows.transpose(1, 2)
    out = (probabilities @ values).transpose(1, 2)[index]
    return out.to(dtype), lse.transpose(1, 2)[index].transpose(0, 1).contiguous()


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    source_k: torch.Tensor,
    source_v: torch.Tensor,
    source_lengths: torch.Tensor,
    history_k: torch.Tensor,
    history_v: torch.Tensor,
    ancestry: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    rows: int,
    scale: float,
    relative_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.decode_attention`; same arguments and result."""
    examples, beams = ancestry.shape[:2]
    heads, size = q.shape[1:]
    shape = (examples, beams, rows, heads, size)
    qs, ks, vs = (x.reshape(shape) for x in (q, k, v))
    out = torch.empty_like(qs)
    for e in range(examples):
        slot, step = int(slots[e]), int(steps[e])
        length = int(source_lengths[slot])
        history_k[slot, step] = ks[e, :, 0].to(history_k.dtype)
        history_v[slot, step] = vs[e, :, 0].to(history_v.dtype)
        past = torch.arange(step, device=q.device)
        for b in range(beams):
            beam = ancestry[e, b, :step].long()
            own_k, own_v = ks[e, b], vs[e, b]
            keys = torch.cat([source_k[slot, :, :, :length].permute(2, 0, 1), history_k[slot, past, beam], own_k])
            values = torch.cat([source_v[slot, :, :length].transpose(0, 1), history_v[slot, past, beam], own_v])
            scores = torch.einsum("rhd,khd->hrk", _accumulate(qs[e, b]), _accumulate(keys)) * scale
            position = torch.arange(length + step + rows, device=q.device)
            if relative_bias is not None:
                query = position[length + step :]
                scores = scores + distance_bias(relative_bias.to(scores.dtype), query, position)
            hidden = torch.zeros(rows, position.numel(), dtype=torch.bool, device=q.device)
            hidden[0, length + step + 1 :] = True
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[e, b] = torch.einsum("hrk,khd->rhd", weights, _accumulate(values)).to(out.dtype)
    return out.reshape(q.shape)


def store_source(
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    source_counts: torch.Tensor,
    slots: torch.Tensor,
    source_k: torch.Tensor,
    source_v: torch.Tensor,
    source_lengths: torch.Tensor,
) -> None:
    """Specification of :func:`minilm_fast.ops.store_source`; same arguments."""
    for start, count, slot in zip(cu_seqlens.tolist(), source_counts.tolist(), slots.tolist(), strict=False):
        source_k[slot, :, :, :count] = k[start : start + count].permute(1, 2, 0)
        source_v[slot, :, :count] = v[start : start + count].transpose(0, 1)
        source_lengths[slot] = count


def relation_kl(
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    layout: SequenceLayout,
    *,
    teacher_scale: float,
    student_scale: float,
    reduction: str = "batch_mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Specification of :func:`minilm_fast.ops.relation_kl`.

    Same arguments; returns ``(loss, lse_teacher, lse_student)``, the latter fp64 ``[heads, tokens]``. Computed in fp64
    if one of the tensors is, else in fp32.
    """
    tensors = (teacher_a.detach(), teacher_b.detach(), student_a, student_b)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    ta, tb, sa, sb = (x.to(dtype) for x in tensors)
    heads = student_a.shape[1]
    if layout.total == 0 or heads == 0:
        empty = sa.new_zeros(heads, layout.total, dtype=torch.float64)
        return sa.sum() + sb.sum(), empty, empty.clone()
    mask = layout.dense_mask()[:, None]
    valid = mask.any(-1)
    # A row beyond the length must see something: the gradient of its log-sum-exp would be NaN.
    sees = mask | ~valid[..., None]
    sides = ((ta, tb, teacher_scale), (sa, sb, student_scale))
    scores = [_pad(a, layout).transpose(1, 2) @ _pad(b, layout).permute(0, 2, 3, 1) * scale for a, b, scale in sides]
    lse = [s.masked_fill(~sees, float("-inf")).logsumexp(-1) for s in scores]
    log_p, log_q = (s - n[..., None] for s, n in zip(scores, lse, strict=True))
    divergence = torch.where(mask, log_p.masked_fill(~mask, float("-inf")).exp() * (log_p - log_q), 0.0).sum(-1)
    sums = torch.where(valid, divergence, 0.0).sum((1, 2))
    loss = (sums * _sequence_weights(layout, heads, reduction, dtype)).sum()
    sequence, token = _padded_index(layout)
    packed = [n.detach().double().transpose(1, 2)[sequence, token].transpose(0, 1).contiguous() for n in lse]
    return loss, packed[0], packed[1]


def _sequence_weights(layout: SequenceLayout, heads: int, reduction: str, dtype: torch.dtype) -> torch.Tensor:
    """The factor ``[batch]`` of a sequence's summed divergence in the loss."""
    lengths = layout.segments.sum(1).to(dtype)
    if reduction == "sum":
        return torch.ones_like(lengths)
    if reduction == "token_mean":
        return torch.full_like(lengths, 1.0 / (heads * layout.total))
    return 1.0 / (heads * lengths.clamp(min=1) * (lengths > 0).sum())


def _quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row: integers in [-127, 127] (as floats) and the scale of each row."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127.0
    quantized = torch.round(x / torch.where(scale > 0, scale, 1.0)).clamp(-127, 127)
    return quantized, scale


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, format: str, activation: str
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.linear`, from the weight ``[N, K]`` before packing."""
    wide, w = _accumulate(x), weight.to(_accumulate(x).dtype)
    if format == "int8":
        (qx, sx), (qw, sw) = _quantize_rows(wide), _quantize_rows(w)
        # Products of int8 summed over K < 2^38 terms are exact in fp64.
        y = ((qx.double() @ qw.double().t()).to(wide.dtype) * sx) * sw.t()
    elif format in ("bf16", "fp16"):
        rounded = torch.bfloat16 if format == "bf16" else torch.float16
        y = wide.to(rounded).to(wide.dtype) @ w.to(rounded).to(wide.dtype).t()
    else:
        y = wide @ w.t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)


def encoder_layers(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    layout: SequenceLayout,
    heads: int,
    format: str,
    eps: float,
    relative_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.encoder_layers`, from the weights before packing."""

    def between(y: torch.Tensor) -> torch.Tensor:
        return y if format == "fp32" else y.bfloat16().to(x.dtype)

    scale = (x.shape[1] // heads) ** -0.5
    for i in range(len(weights) // 4):
        projection, attention_output, intermediate, output = weights[4 * i : 4 * i + 4]
        v = vectors[8 * i : 8 * i + 8]
        query, key, value = (
            between(linear(x, projection, v[0], format, "none")).view(x.shape[0], 3, heads, -1).unbind(1)
        )
        context, _ = attention(
            query, key, value, layout, scale=scale, relative_bias=relative_bias, position_ids=position_ids
        )
        y = linear(between(context.flatten(1)), attention_output, v[1], format, "none")
        x = add_layer_norm(y, x, v[2], v[3], eps)
        y = linear(between(linear(x, intermediate, v[4], format, "gelu")), output, v[5], format, "none")
        x = add_layer_norm(y, x, v[6], v[7], eps)
    return x


def lm_head_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    format: str,
    k: int,
    banned: torch.Tensor | None = None,
    suppress_id: int = -1,
    suppress: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of :func:`minilm_fast.ops.lm_head_topk`, from the weight ``[V, K]`` before packing."""
    scores = torch.log_softmax(linear(_accumulate(x), weight, bias, format, "none"), dim=-1)
    if banned is not None and banned.numel():
        forbidden = torch.zeros_like(scores[:, :1]).expand(-1, scores.shape[1] + 1).clone()
        index = torch.where(banned < 0, scores.shape[1], banned).long()
        forbidden.scatter_(1, index, FORBIDDEN)
        scores = scores + forbidden[:, :-1]
    if suppress is not None:
        scores = scores.clone()
        scores[suppress, suppress_id] = FORBIDDEN
    values, ids = torch.topk(scores, k, dim=-1)
    return values, ids.int()


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.add_layer_norm`; same arguments and result."""
    wide = _accumulate(x)
    if residual is not None:
        wide = wide + _accumulate(residual)
    normal = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return normal.to(x.dtype)


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.dropout_add_layer_norm`; same arguments and result."""
    total = _accumulate(x)
    if x_bias is not None:
        total = total + x_bias.to(total.dtype)
    if dropout > 0 and seed is not None:
        total = total * dropout_factors(dropout, seed, x.shape[0], x.shape[1], device=x.device)[0]
    if residual is not None:
        total = total + residual
    return F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps).to(x.dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.bias_gelu`; same arguments and result."""
    wide = _accumulate(x)
    return F.gelu(wide if bias is None else wide + bias.to(wide.dtype)).to(x.dtype)


def embed_layer_norm(
    ids: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.embed_layer_norm`; same arguments and result."""
    x = _accumulate(word[ids.long()]) + _accumulate(position[positions.long()])
    if type is not None and types is not None:
        x = x + _accumulate(type[types.long()])
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def step_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.step_norm`; same arguments and result."""
    wide = _accumulate(x)
    return F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(dtype)


def step_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of :func:`minilm_fast.ops.step_linear`, from the weight ``[N, K]`` in its dtype."""
    if norm_weight is None or norm_bias is None:
        rows, normal = x, weight.new_empty((0, weight.shape[1]))
    else:
        rows = normal = step_norm(x, norm_weight, norm_bias, eps, weight.dtype)
    y = _accumulate(rows) @ _accumulate(weight).t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation == "gelu":
        y = F.gelu(y)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return (y if wide else y.to(weight.dtype)), normal


def step_embedding(
    last_ids: torch.Tensor,
    mask_id: int,
    slots: torch.Tensor,
    steps: torch.Tensor,
    source_lengths: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    type: torch.Tensor | None,
    type_id: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.step_embedding`; same arguments and result."""
    ids = last_ids[:, :, None]
    if mask_id >= 0:
        ids = torch.cat([ids, torch.full_like(ids, mask_id)], dim=2)
    first = (source_lengths[slots.long()] + steps)[:, None, None]
    at = (first + torch.arange(ids.shape[2], device=ids.device)).expand(ids.shape).reshape(-1)
    types = torch.full_like(at, type_id)
    return embed_layer_norm(ids.reshape(-1), at, types, word, position, type, weight, bias, eps).to(dtype)


def label_smoothed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.label_smoothed_cross_entropy`; same arguments and result."""
    logits = _accumulate(hidden) @ _accumulate(weight).T + bias
    if smoothing == 0:
        return F.cross_entropy(logits, labels, reduction="none")
    vocabulary = weight.shape[0]
    target = torch.full_like(logits, smoothing / (vocabulary - 2))
    target[:, 0] = 0.0
    target.scatter_(1, labels[:, None], 1 - smoothing)
    target = target.masked_fill((labels == 0)[:, None], 0.0)
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


def ban_repeated_ngrams(tokens: torch.Tensor, lengths: torch.Tensor, n: int, ignored: torch.Tensor) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.ban_repeated_ngrams`; same arguments and result."""
    banned = torch.full_like(tokens, -1)
    skip = set(ignored.tolist())
    for row, length in enumerate(lengths.tolist()):
        sequence = tokens[row, :length].tolist()
        tail = sequence if n == 1 else sequence[length - (n - 1) :]
        if length < n or skip.intersection(tail):
            continue
        followers = (sequence[i + n - 1] for i in range(length - n + 1) if n == 1 or sequence[i : i + n - 1] == tail)
        unique = [f for f in dict.fromkeys(followers) if f not in skip]
        banned[row, : len(unique)] = torch.tensor(unique, dtype=tokens.dtype, device=tokens.device)
    return banned


def _best_candidates(
    candidate_scores: torch.Tensor, candidate_ids: torch.Tensor, scores: torch.Tensor, ended: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, ids and parents of the next hypotheses, ``[E, B]`` each; equal ones in the order of the candidates."""
    width = candidate_scores.shape[2]
    finished = ended.to(candidate_scores.dtype) * FORBIDDEN
    total = candidate_scores + (finished + scores)[:, :, None]
    best, index = torch.sort(total.flatten(1), dim=1, descending=True, stable=True)
    best, index = best[:, :width], index[:, :width]
    return best, candidate_ids.flatten(1).gather(1, index), (index // width).int()


def advance_beams(
    candidate_scores: torch.Tensor,
    candidate_ids: torch.Tensor,
    rows: torch.Tensor | None,
    divisors: torch.Tensor,
    running: torch.Tensor,
    frame: torch.Tensor,
    steps: torch.Tensor,
    scores: torch.Tensor,
    last_ids: torch.Tensor,
    tokens: torch.Tensor,
    ancestry: torch.Tensor,
    best_score: torch.Tensor,
    best_tokens: torch.Tensor,
    best_length: torch.Tensor,
    all_ended: torch.Tensor,
    lengths: torch.Tensor,
    suppress: torch.Tensor,
    trace_scores: torch.Tensor,
    trace_ids: torch.Tensor,
    trace_parents: torch.Tensor,
    sep: int,
    pad: int,
    min_len: int,
    early_exit: bool,
    entering: int,
) -> None:
    """Specification of :func:`minilm_fast.ops.advance_beams`; the fields of state and rules one by one."""
    beams, last_frame = tokens.shape[1], tokens.shape[2] - 1
    at = torch.arange(len(frame), device=frame.device) if rows is None else rows.long()
    first = entering >= 0
    going = torch.ones_like(running[at]) if first else running[at]

    def old(x: torch.Tensor, initial: float) -> torch.Tensor:
        return torch.full_like(x[at], initial) if first else x[at]

    def put(x: torch.Tensor, new: torch.Tensor) -> None:
        x[at] = torch.where(going.view(-1, *[1] * (x.dim() - 1)), new.to(x.dtype), x[at])

    if first:
        chosen, ids = candidate_scores[:, 0], candidate_ids[:, 0]
        parents = torch.zeros_like(ids)
    else:
        ended = (last_ids[at] == sep) & (beams > 1)
        chosen, ids, parents = _best_candidates(candidate_scores, candidate_ids, scores[at], ended)
    # The numbers of a row that stands still may be out of range.
    now, entries = (torch.where(going, x, 0)[:, None, None] for x in (old(frame, 0), old(steps, max(entering, 0))))
    origin = parents.long()[:, :, None]

    def reordered(x: torch.Tensor, count: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
        place = torch.arange(x.shape[2], device=x.device)
        lists = torch.where(place < count, x[at].gather(1, origin.expand_as(x[at])), x[at])
        return lists if last is None else torch.where(place == count, last[:, :, None], lists)

    new_tokens = reordered(tokens, now, ids)
    put(tokens, new_tokens)
    if first:
        ancestry[at, :, :entering] = 0
    else:
        put(ancestry, reordered(ancestry, entries, parents))
    put(scores, chosen)
    put(last_ids, ids)
    now, entries = now[:, 0, 0], entries[:, 0, 0]
    if trace_scores.shape[1]:
        for trace, new in ((trace_scores, chosen), (trace_ids, ids), (trace_parents, parents)):
            trace[at, now.long()] = torch.where(going[:, None], new, trace[at, now.long()])

    ended, before, best = ids == sep, old(all_ended, -1), old(best_score, -torch.inf)
    candidates = (ended | (now == last_frame)[:, None]) & (before < 0)[:, None]
    final = (chosen.double() / divisors[now.long()][:, None]).masked_fill(~candidates, -torch.inf)
    most, winner = final.max(dim=1)
    better = most > best
    best = torch.where(better, most, best)
    put(best_score, best)
    put(best_length, torch.where(better, now + 1, old(best_length, 0)))
    winning = new_tokens.gather(1, winner[:, None, None].expand(-1, 1, last_frame + 1))[:, 0]
    kept = torch.arange(last_frame + 1, device=at.device) <= now[:, None]
    put(best_tokens, torch.where(better[:, None] & kept, winning, best_tokens[at]))
    after = torch.where(ended.all(dim=1) & (before < 0), now, before)
    put(all_ended, after)

    done = now >= last_frame
    if early_exit and beams > 1:
        live = chosen.double().masked_fill(ended, -torch.inf).max(dim=1).values
        bound = live + ROUNDING * (last_frame - now).double()
        # A log-probability is at most 0, so a live score can only fall, while the divisor grows to its last value.
        bound = torch.where(bound < 0, bound / divisors[-1], bound)
        done = done | (after >= 0) | (best >= bound)
    elif early_exit:
        done = done | (ids[:, 0] == sep) | (ids[:, 0] == pad)
    put(frame, now + 1)
    put(steps, torch.where(done, 0, entries if first else entries + 1))
    put(lengths, (now + 1)[:, None].expand_as(ids))
    put(suppress, (now + 2 <= min_len)[:, None].expand_as(ids))
    put(running, ~done)


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """Specification of :func:`minilm_fast.ops.adamw`; same arguments and effect."""
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    param.addcdiv_(mean, square.sqrt().add_(eps), value=-step_size).mul_(decay)


def pool_sequences(hidden: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """Specification of :func:`minilm_fast.ops.pool_sequences`, with the offsets in the place of the layout."""
    starts = cu_seqlens.long()
    lengths = starts.diff()
    empty = (lengths == 0)[:, None]
    out = hidden.new_zeros(lengths.numel(), hidden.shape[1])
    if pooling == "cls":
        rows = torch.cat([hidden, out[:1]])[starts[:-1]] if lengths.numel() else out
        out = rows.masked_fill(empty, 0.0)
    else:
        index = torch.arange(lengths.numel(), device=hidden.device)
        index = index.repeat_interleave(lengths, output_size=hidden.shape[0])
        if pooling == "mean":
            out = out.index_add(0, index, hidden) / lengths.clamp(min=1)[:, None]
        else:
            out = out.scatter_reduce(0, index[:, None].expand_as(hidden), hidden, "amax", include_self=False)
    return F.normalize(out, dim=1) if normalize else out
