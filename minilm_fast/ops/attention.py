"""Multi-head self-attention over packed sequences, the mask given as data.

For head ``h`` and row ``i`` of a sequence, with ``M_i`` the set of columns the row sees (see
:class:`~minilm_fast.ops.layout.SequenceLayout`)::

    s_ij = scale * <q_i, k_j> + relative_bias[h, clamp(p_j - p_i)]
    lse_i = log sum_{j in M_i} exp(s_ij)
    out_i = sum_{j in M_i} f_ij exp(s_ij - lse_i) v_j

``f_ij`` is the dropout factor of row ``i`` of ``q`` and column ``j`` of its sequence in stream ``h`` (see
:mod:`minilm_fast.ops.dropout`), 1 without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from minilm_fast.ops import _cuda, _triton, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import LIBRARY, define, define_triton
from minilm_fast.ops.layout import SequenceLayout

_LAYOUT = (
    "Tensor cu_seqlens, Tensor segments, Tensor? cu_queries, SymInt max_seqlen, float scale, Tensor? relative_bias, "
    "Tensor? position_ids, float dropout, Tensor? seed"
)
_BIAS = 5
"""Place of ``relative_bias`` among the arguments of the layout."""


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    segments: torch.Tensor,
    cu_queries: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    relative_bias: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = SequenceLayout(cu_seqlens, segments, max_seqlen, k.shape[0], cu_queries, q.shape[0])
    return reference.attention(
        q,
        k,
        v,
        layout,
        scale=scale,
        relative_bias=relative_bias,
        position_ids=position_ids,
        dropout=dropout,
        seed=seed,
    )


def _split(projection: torch.Tensor, queries: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *own, k, v = projection.unbind(1)
    return own[0] if queries is None else queries, k, v


def _reference_projected(
    projection: torch.Tensor, queries: torch.Tensor | None, *layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _reference(*_split(projection, queries), *layout)


def _reference_gradients(
    grad_out: torch.Tensor,
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    layout: list[Any],
    bias_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """Of the inputs, then of the relative bias: empty if it is not asked for."""

    def forward(*leaves: torch.Tensor) -> torch.Tensor:
        bias = leaves[-1] if bias_gradient else layout[_BIAS]
        return run(*leaves[: len(inputs)], *layout[:_BIAS], bias, *layout[_BIAS + 1 :])[0]

    leaves = (*inputs, layout[_BIAS]) if bias_gradient else tuple(inputs)
    gradients = torch.func.vjp(forward, *leaves)[1](grad_out)
    return gradients if bias_gradient else (*gradients, grad_out.new_empty(0, dtype=torch.float32))


def _reference_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *layout, bias_gradient = rest
    return _reference_gradients(grad_out, _reference, (q, k, v), layout, bias_gradient)


def _reference_projected_backward(
    grad_out: torch.Tensor,
    projection: torch.Tensor,
    queries: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *layout, bias_gradient = rest
    if queries is not None:
        return _reference_gradients(grad_out, _reference_projected, (projection, queries), layout, bias_gradient)

    def run(projection: torch.Tensor, *layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _reference_projected(projection, None, *layout)

    gradient, bias = _reference_gradients(grad_out, run, (projection,), layout, bias_gradient)
    return gradient, projection.new_empty(0), bias


def _fake(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_projected(
    projection: torch.Tensor, queries: torch.Tensor | None, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(_split(projection, queries)[0])


def _fake_bias(grad_out: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor:
    *_, bias, _, _, _, bias_gradient = rest
    return grad_out.new_empty(bias.shape if bias_gradient else (0,), dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), _fake_bias(grad_out, rest)


def _fake_projected_backward(
    grad_out: torch.Tensor, projection: torch.Tensor, queries: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    own = projection.new_empty((0,) if queries is None else queries.shape)
    return projection.new_empty(projection.shape), own, _fake_bias(grad_out, rest)


_SCHEMA = f"attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LAYOUT}, "
    "bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
_PROJECTED_SCHEMA = f"projected_attention(Tensor projection, Tensor? queries, {_LAYOUT}) -> (Tensor, Tensor)"
_PROJECTED_BACKWARD_SCHEMA = (
    f"projected_attention_backward(Tensor grad_out, Tensor projection, Tensor? queries, Tensor out, Tensor lse, "
    f"{_LAYOUT}, bool bias_gradient) -> (Tensor, Tensor, Tensor)"
)
_op = define(_SCHEMA, reference=_reference, fake=_fake)
_backward_op = define(_BACKWARD_SCHEMA, reference=_reference_backward, fake=_fake_backward)
_projected_op = define(_PROJECTED_SCHEMA, reference=_reference_projected, fake=_fake_projected)
_projected_backward_op = define(
    _PROJECTED_BACKWARD_SCHEMA, reference=_reference_projected_backward, fake=_fake_projected_backward
)
_triton_op, _triton_backward_op, _triton_projected_op, _triton_projected_backward_op = (
    define_triton(schema, kernels="attention", fake=fake)
    for schema, fake in (
        (_SCHEMA, _fake),
        (_BACKWARD_SCHEMA, _fake_backward),
        (_PROJECTED_SCHEMA, _fake_projected),
        (_PROJECTED_BACKWARD_SCHEMA, _fake_projected_backward),
    )
)
_FAR_BIAS = {_backward_op: _triton_backward_op, _projected_backward_op: _triton_projected_backward_op}
"""What differentiates a bias of more distances than the CUDA kernels take, which leave what Triton's want."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keeps all arguments and results: tensors where autograd watches over them, numbers beside."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs), *output)


def _far(relative_bias: torch.Tensor | None) -> bool:
    return relative_bias is not None and relative_bias.shape[1] // 2 > _cuda.MOST_BIAS_DISTANCE


def _gradients(ctx: Any, operator: Any, operands: int, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
    """One for each argument of the forward operator, of which the first ``operands`` and the bias can have one."""
    count = len(ctx.numbers)
    if grad_out is None:
        return (None,) * count
    *saved, out, lse = ctx.saved_tensors
    arguments = [n if t is None else t for t, n in zip(saved, ctx.numbers, strict=True)]
    bias_gradient = ctx.needs_input_grad[operands + _BIAS]
    if bias_gradient and grad_out.device.type == "cuda" and _far(arguments[operands + _BIAS]):
        operator = _FAR_BIAS.get(operator, operator)
    *found, bias = operator(grad_out, *arguments[:operands], out, lse, *arguments[operands:], bias_gradient)
    gradients = [g if a is not None else None for g, a in zip(found, arguments, strict=False)]
    gradients += [None] * (count - operands)
    if bias_gradient:
        gradients[operands + _BIAS] = bias
    return tuple(gradients)


def _backward(operator: Any, operands: int, ctx: Any, grad_out: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    return _gradients(ctx, operator, operands, grad_out)


for _name, _operator, _operands in (
    ("attention", _backward_op, 3),
    ("projected_attention", _projected_backward_op, 2),
    ("triton_attention", _triton_backward_op, 3),
    ("triton_projected_attention", _triton_projected_backward_op, 2),
):
    torch.library.register_autograd(
        f"minilm_fast::{_name}", partial(_backward, _operator, _operands), setup_context=_save, lib=LIBRARY
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    scale: float | None = None,
    relative_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention over packed sequences (module docstring; UniLM, arXiv 1905.03197, equations 1-2).

    Args:
        q: ``[layout.total_queries, heads, head_dim]``: the rows that ask, by default all.
        k, v: ``[tokens, heads, head_dim]``. All three are of one dtype, fp32 or bf16 on a GPU fp16 too; the last
            dimension is contiguous, the others may be strided, so views of a fused projection need no copy.
        layout: lengths and mask of the batch.
        scale: factor of the scores, ``head_dim ** -0.5`` if None.
        relative_bias: fp32 ``[heads, 2R + 1]``, added by the distance of the positions, clamped to ``[-R, R]``.
        position_ids: int32 ``[tokens]``, needed with ``relative_bias``.
        dropout: chance of a probability to be dropped, below 1.
        seed: int64 ``[1]`` on the CPU, needed with ``dropout``; the same seed drops the same elements.

    Returns:
        ``(out, lse)``: the shape of ``q`` in its dtype, and fp32 ``[heads, total_queries]``. No gradient flows through
        ``lse``.

    Raises:
        ValueError: shapes do not fit the layout, ``relative_bias`` comes without ``position_ids``, or ``dropout``
            without ``seed``.
    """
    _check(q, k, v, layout, dropout, seed)
    if (relative_bias is None) != (position_ids is None):
        raise ValueError("attention: relative_bias and position_ids go together")
    backend = select("attention", q, k, v, relative_bias, refusals=_refusals(q, relative_bias))
    run = {"reference": _reference, "triton": _triton_op}.get(backend, _op)
    arguments = _arguments(layout, q, scale, relative_bias, position_ids, dropout, seed)
    out, lse = run(*(filled_heads(x, backend) for x in (q, k, v)), *arguments)
    return _cut(out, q), lse.detach()


def projected_attention(
    projection: torch.Tensor,
    layout: SequenceLayout,
    *,
    queries: torch.Tensor | None = None,
    scale: float | None = None,
    relative_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention` of one fused projection, whose gradient comes back in one tensor, without a copy.

    Args:
        projection: ``[tokens, 3, heads, head_dim]``: q, k and v; or ``[tokens, 2, heads, head_dim]``: k and v, with
            ``queries``.
        layout: lengths and mask of the batch.
        queries: ``[layout.total_queries, heads, head_dim]``.

    The other arguments, results and errors are those of :func:`attention`.
    """
    parts = 3 if queries is None else 2
    if projection.dim() != 4 or projection.shape[1] != parts:
        raise ValueError(
            f"projected_attention: projection must be [tokens, {parts}, heads, head_dim], got {tuple(projection.shape)}"
        )
    q, k, v = _split(projection, queries)
    _check(q, k, v, layout, dropout, seed)
    if (relative_bias is None) != (position_ids is None):
        raise ValueError("attention: relative_bias and position_ids go together")
    refusals = _refusals(q, relative_bias)
    backend = select("projected_attention", projection, queries, relative_bias, refusals=refusals)
    run = {"reference": _reference_projected, "triton": _triton_projected_op}.get(backend, _projected_op)
    arguments = _arguments(layout, q, scale, relative_bias, position_ids, dropout, seed)
    if queries is not None:
        queries = filled_heads(queries, backend)
    out, lse = run(filled_heads(projection, backend), queries, *arguments)
    return _cut(out, q), lse.detach()


def filled_heads(x: torch.Tensor, backend: str) -> torch.Tensor:
    """Heads filled up with zeros to a size that the backend has; that changes no score and no sum."""
    size = x.shape[-1]
    missing = _cuda.kernel_head_size(size) - size if backend in ("cuda", "triton") else 0
    return F.pad(x, (0, missing)) if missing else x


def _cut(out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    size = q.shape[-1]
    return out if out.shape[-1] == size else out[..., :size]


def _refusals(q: torch.Tensor, relative_bias: torch.Tensor | None) -> dict[str, str | None]:
    refusals = _triton.refuse_attention(q) | _cuda.refuse_attention(q)
    wanted = relative_bias is not None and relative_bias.requires_grad and torch.is_grad_enabled()
    if wanted and refusals["cuda"] is None and _far(relative_bias):
        reason = _triton.unusable("attention", q.device)
        if reason is not None:
            far = f"the gradient of a relative bias beyond the distance {_cuda.MOST_BIAS_DISTANCE} is Triton's"
            refusals["cuda"] = f"{far}, and {reason}"
    return refusals


def _arguments(
    layout: SequenceLayout,
    q: torch.Tensor,
    scale: float | None,
    relative_bias: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[Any, ...]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sequences = (layout.cu_seqlens, layout.segments, layout.cu_queries, layout.max_seqlen)
    return *sequences, scale, relative_bias, position_ids, dropout, seed


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, dropout: float, seed: torch.Tensor | None
) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"attention: q, k and v must be one shape [tokens, heads, head_dim], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != layout.total_queries:
        raise ValueError(f"attention: q has {q.shape[0]} tokens, the layout {layout.total_queries}")
    if k.shape[0] != layout.total:
        raise ValueError(f"attention: k has {k.shape[0]} tokens, the layout {layout.total}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be at least 0 and below 1, got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError("attention: dropout needs a seed")
