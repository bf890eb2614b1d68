"""The distillation loss of one self-attention relation, over packed sequences.

With ``M_i`` the set of columns that row ``i`` sees (:class:`~minilm_fast.ops.layout.SequenceLayout`), for each head::

    t_ij = teacher_scale * <ta_i, tb_j>      p_ij = exp(t_ij) / sum_{j' in M_i} exp(t_ij')
    s_ij = student_scale * <sa_i, sb_j>      q_ij = exp(s_ij) / sum_{j' in M_i} exp(s_ij')
    KL_i = sum_{j in M_i} p_ij (log p_ij - log q_ij)

The loss is the weighted sum of ``KL_i`` over rows and heads, with the weight ``w`` of a row's sequence::

    batch_mean   w = 1 / (heads * length * number of sequences that are not empty)
    token_mean   w = 1 / (heads * tokens)
    sum          w = 1

Its gradient with respect to the student's scores is ``w (q_ij - p_ij)``. Neither ``t`` nor ``s`` is ever stored: the
forward pass keeps the log-sum-exp of each row (in fp64: rounded to fp32 it would shift all of the row's
probabilities), the backward pass computes the scores again, a tile at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from minilm_fast.ops import _cuda, _triton, reference
from minilm_fast.ops._dispatch import forced_backend, select
from minilm_fast.ops._library import LIBRARY, define, define_triton
from minilm_fast.ops.layout import SequenceLayout

REDUCTIONS = ("batch_mean", "token_mean", "sum")
Optional = torch.Tensor | None


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"relation_kl: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _reference(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_reduction(reduction)
    return reference.relation_kl(
        teacher_a,
        teacher_a if teacher_b is None else teacher_b,
        student_a,
        student_a if student_b is None else student_b,
        SequenceLayout(cu_seqlens, segments, max_seqlen, student_a.shape[0]),
        teacher_scale=teacher_scale,
        student_scale=student_scale,
        reduction=reduction,
    )


def _reference_backward(
    grad: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: Optional,
    student_a: torch.Tensor,
    student_b: Optional,
    lse_teacher: torch.Tensor,
    lse_student: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaves = [student_a.detach().requires_grad_()]
        if student_b is not None:
            leaves.append(student_b.detach().requires_grad_())
        loss = _reference(teacher_a, teacher_b, leaves[0], leaves[1] if student_b is not None else None, *arguments)[0]
    grads = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
    dense = [g.contiguous() for g in grads]
    return dense[0], dense[1] if student_b is not None else student_a.new_empty(0)


def _fake(
    teacher_a: torch.Tensor, teacher_b: Optional, student_a: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def statistics() -> torch.Tensor:
        return student_a.new_empty((student_a.shape[1], student_a.shape[0]), dtype=torch.float64)

    return student_a.new_empty((), dtype=torch.float32), statistics(), statistics()


def _fake_backward(
    grad: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: Optional,
    student_a: torch.Tensor,
    student_b: Optional,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    return student_a.new_empty(student_a.shape), student_a.new_empty((0,) if student_b is None else student_b.shape)


_LAYOUT = "Tensor cu_seqlens, Tensor segments, SymInt max_seqlen"
_OPTIONS = f"{_LAYOUT}, float teacher_scale, float student_scale, str reduction"
_INPUTS = "Tensor teacher_a, Tensor? teacher_b, Tensor student_a, Tensor? student_b"

# A missing b is the a of its side. The backward pass then has one gradient for both, and an empty second one.
_SCHEMA = f"relation_kl({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"relation_kl_backward(Tensor grad, {_INPUTS}, Tensor lse_teacher, Tensor lse_student, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
_op = define(_SCHEMA, reference=_reference, fake=_fake)
_backward_op = define(_BACKWARD_SCHEMA, reference=_reference_backward, fake=_fake_backward)
_triton_op = define_triton(_SCHEMA, kernels="relation_kl", fake=_fake)
_triton_backward_op = define_triton(_BACKWARD_SCHEMA, kernels="relation_kl", fake=_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, (cu_seqlens, segments, *options) = inputs[:4], inputs[4:]
    ctx.options = options
    ctx.save_for_backward(*tensors, *output[1:], cu_seqlens, segments)
    ctx.mark_non_differentiable(*output[1:])


def _backward(operator: Any, ctx: Any, grad: torch.Tensor, *_: object) -> tuple[Optional, ...]:
    student_b = ctx.saved_tensors[3]
    grad_a, grad_b = operator(grad, *ctx.saved_tensors, *ctx.options)
    return None, None, grad_a, None if student_b is None else grad_b, *[None] * 6


for _name, _operator in (("relation_kl", _backward_op), ("triton_relation_kl", _triton_backward_op)):
    torch.library.register_autograd(
        f"minilm_fast::{_name}", partial(_backward, _operator), setup_context=_setup_context, lib=LIBRARY
    )


def relation_kl(
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    layout: SequenceLayout,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    reduction: str = "batch_mean",
) -> torch.Tensor:
    """KL divergence of the student's self-attention relation from the teacher's (module docstring).

    MiniLM (arXiv 2002.10957, section 3): attention transfer is ``a = q, b = k``, the value relation ``a = b = v``.
    MiniLMv2 (arXiv 2012.15828, section 3): ``a = b`` for q, k and v, after the heads were concatenated and split
    again into relation heads: ``x.view(tokens, relation_heads, -1)``.

    Args:
        teacher_a, teacher_b: ``[tokens, heads, teacher_head_dim]``, one shape. They get no gradient, even where
            they require one.
        student_a, student_b: ``[tokens, heads, student_head_dim]``, one shape. The two head sizes may differ.
            Pass one tensor twice (the same object, on both sides) for a symmetric relation: half of the scores then
            need not be computed.
            fp32 or bf16 (on a GPU fp16 too), one dtype for each side; with fp64 on either side the reference runs in
            fp64. The last dimension is contiguous, the others may be strided, so views of a fused projection need no
            copy.
        layout: lengths and mask of the batch; the mask holds for both sides.
        teacher_scale, student_scale: factors of the scores, ``head_dim ** -0.5`` if None.
        reduction: ``"batch_mean"``: each sequence's mean over heads and rows, averaged over the sequences that are
            not empty; ``"token_mean"``: mean over heads and all rows; ``"sum"``.

    Returns:
        The loss, a scalar in fp32 (fp64 from the reference in fp64); zero for a batch without tokens. It can be
        differentiated once, with respect to the student's tensors.

    Raises:
        ValueError: shapes do not fit one another or the layout, or the reduction is unknown.
    """
    _check_shapes(teacher_a, teacher_b, student_a, student_b, layout)
    _check_reduction(reduction)
    teacher_scale = teacher_a.shape[-1] ** -0.5 if teacher_scale is None else teacher_scale
    student_scale = student_a.shape[-1] ** -0.5 if student_scale is None else student_scale
    tensors = (teacher_a, teacher_b, student_a, student_b)
    in_double = forced_backend() is None and any(x.dtype == torch.float64 for x in tensors)
    # The teacher's requires_grad asks for nothing, so it has no say in the choice.
    refusals = _triton.refuse_relation(teacher_a, student_a) | _cuda.refuse_relation(teacher_a, student_a)
    chosen = "reference" if in_double else select("relation_kl", student_a, student_b, refusals=refusals)
    if chosen == "reference":
        return reference.relation_kl(
            *tensors, layout, teacher_scale=teacher_scale, student_scale=student_scale, reduction=reduction
        )[0]
    return (_triton_op if chosen == "triton" else _op)(
        teacher_a,
        None if teacher_b is teacher_a else teacher_b,
        student_a,
        None if student_b is student_a else student_b,
        layout.cu_seqlens,
        layout.segments,
        layout.max_seqlen,
        teacher_scale,
        student_scale,
        reduction,
    )[0]


def _check_shapes(
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    student_a: torch.Tensor,
    student_b: torch.Tensor,
    layout: SequenceLayout,
) -> None:
    for side, a, b in (("teacher", teacher_a, teacher_b), ("student", student_a, student_b)):
        if a.dim() != 3 or a.shape != b.shape or a.shape[2] < 1:
            raise ValueError(
                f"relation_kl: {side}_a and {side}_b must be one shape [tokens, heads, head_dim], got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
    if teacher_a.shape[:2] != student_a.shape[:2]:
        raise ValueError(
            "relation_kl: teacher and student must have the same numbers of tokens and heads, got "
            f"{tuple(teacher_a.shape[:2])} and {tuple(student_a.shape[:2])}"
        )
    if layout.cu_queries is not None:
        raise ValueError("relation_kl: every row of the layout must ask, without with_queries")
    if student_a.shape[0] != layout.total:
        raise ValueError(f"relation_kl: the tensors have {student_a.shape[0]} tokens, the layout {layout.total}")
