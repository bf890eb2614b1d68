"""One step of beam search for one layer, the source held once for all beams of an example.

The rows of the queries are ordered (example, beam, row). Row 0 of a hypothesis is its last token, row 1 (with
``rows = 2``) the ``[MASK]`` that asks for the next token. Both see the source of their example and the history of
their hypothesis, which is found in place through ``ancestry``; row 0 also sees itself, row 1 row 0 and itself.
Only row 0 leaves its key and value behind. With ``L`` the source's length, source key ``s`` is at position ``s``,
history ``j`` at ``L + j``, row 0 at ``L + steps[e]`` and row 1 one later.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import _cuda, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor source_k, Tensor source_v, Tensor source_lengths, "
    "Tensor(a!) history_k, Tensor(b!) history_v, Tensor ancestry, Tensor slots, Tensor steps, int rows, "
    "float scale, Tensor? relative_bias) -> Tensor"
)
_op = define(f"decode_attention{_ARGUMENTS}", reference=reference.decode_attention, fake=_fake)
_early_op = define(
    f"decode_attention_early{_ARGUMENTS}", reference=reference.decode_attention, fake=_fake, cpu_kernel=False
)
_store_op = define(
    "store_source(Tensor k, Tensor v, Tensor cu_seqlens, Tensor source_counts, Tensor slots, "
    "Tensor(a!) source_k, Tensor(b!) source_v, Tensor(c!) source_lengths) -> ()",
    reference=reference.store_source,
    fake=lambda *_: None,
)


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
    *,
    early: bool = False,
) -> torch.Tensor:
    """Attention of one decoding step (module docstring). Writes row 0's key and value into the history.

    Args:
        q, k, v: ``[E * B * rows, H, D]``, fp32 or bf16; the last dimension contiguous. On CUDA fp16 too, ``D`` 32, 64
            or 128, and the caches of the same dtype.
        source_k: ``[slots, H, D, S]``, keys dimension-major, ``S`` a capacity that is a multiple of 16.
        source_v: ``[slots, H, S, D]``. Beyond a source's length both caches may hold anything.
        source_lengths: int32 ``[slots]``.
        history_k, history_v: ``[slots, T, B, H, D]``, written at ``[slots[e], steps[e], b]``.
        ancestry: int32 ``[E, B, T]``; for ``j < steps[e]`` the beam index under which step ``j`` is stored.
        slots: int32 ``[E]``: which slot of the caches an example uses; no two examples share one.
        steps: int32 ``[E]``: how many history entries it has.
        rows: 1 or 2.
        scale: factor of the scores.
        relative_bias: fp32 ``[H, 2R + 1]`` as for :func:`minilm_fast.ops.attention`.
        early: the CUDA kernel may start before the one before it on the stream has ended, which may write no argument
            but ``q``, ``k`` and ``v`` (see :func:`minilm_fast.ops.step_linear`).

    Returns:
        ``[E * B * rows, H, D]`` in the dtype of ``q``.

    Raises:
        RuntimeError: a shape, dtype or count does not fit; the message names the argument. On CUDA the numbers in
            ``source_lengths``, ``ancestry``, ``slots`` and ``steps`` are not looked at.
    """
    args = (q, k, v, source_k, source_v, source_lengths, history_k, history_v, ancestry, slots, steps)
    if select("decode_attention", q, source_k, refusals=_cuda.refuse_decode(q, source_k)) == "reference":
        return reference.decode_attention(*args, rows, scale, relative_bias)
    return (_early_op if early else _op)(*args, rows, scale, relative_bias)


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
    """Writes the source part of a packed batch into the caches of :func:`decode_attention`.

    Args:
        k, v: ``[tokens, H, D]``.
        cu_seqlens: int32 ``[batch + 1]``.
        source_counts: int32 ``[batch]``: of sequence ``i`` the first ``source_counts[i]`` tokens are stored.
        slots: int32 ``[batch]``: where each goes.
        source_k, source_v, source_lengths: the caches, changed in place.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a source is longer than the capacity.
    """
    args = (k, v, cu_seqlens, source_counts, slots, source_k, source_v, source_lengths)
    if select("store_source", k, refusals=_cuda.refuse_decode(k, source_k)) == "reference":
        reference.store_source(*args)
    else:
        _store_op(*args)
