"""One vector a sequence from the vectors of its tokens.

``mean``: their sum, in the order of the tokens, by their number; ``cls``: the first one; ``max``: the largest of each
element. A sequence without tokens gives zeros. With ``normalize`` a vector ``v`` becomes ``v / max(|v|, 1e-12)``.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import _cuda, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define
from minilm_fast.ops.layout import SequenceLayout

# The extension knows a pooling by its place in the list.
POOLINGS = ("mean", "cls", "max")


def _reference(hidden: torch.Tensor, cu_seqlens: torch.Tensor, pooling: int, normalize: bool) -> torch.Tensor:
    return reference.pool_sequences(hidden, cu_seqlens, POOLINGS[pooling], normalize)


_op = define(
    "pool_sequences(Tensor hidden, Tensor cu_seqlens, int pooling, bool normalize) -> Tensor",
    reference=_reference,
    fake=lambda hidden, cu_seqlens, *_: hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1])),
)


def pool_sequences(hidden: torch.Tensor, layout: SequenceLayout, pooling: str, normalize: bool) -> torch.Tensor:
    """One vector a sequence (module docstring).

    Args:
        hidden: fp32 ``[layout.total, channels]``.
        layout: where the sequences are.
        pooling: ``"mean"``, ``"cls"`` or ``"max"``.
        normalize: whether vectors are divided by their Euclidean norm.

    Returns:
        fp32 ``[batch, channels]``. A sequence's vector does not depend on the other sequences.

    Raises:
        ValueError: ``hidden`` does not fit the layout, or the pooling is unknown.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pool_sequences: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if hidden.dim() != 2 or hidden.shape[0] != layout.total or hidden.dtype != torch.float32:
        raise ValueError(
            f"pool_sequences: hidden must be fp32 [{layout.total}, channels], got {hidden.dtype} {tuple(hidden.shape)}"
        )
    chosen = select("pool_sequences", hidden)
    if chosen != "cpu":
        run = _cuda.pool_sequences if chosen == "cuda" else reference.pool_sequences
        return run(hidden, layout.cu_seqlens, pooling, normalize)
    return _op(hidden.contiguous(), layout.cu_seqlens, POOLINGS.index(pooling), normalize)
