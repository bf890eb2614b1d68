"""Output projection and label-smoothed cross-entropy, without all logits in memory.

For a row ``h`` with label ``y``, ``z = W h + b`` over a vocabulary of ``V`` and smoothing ``s > 0``::

    q_v  = 1 - s if v = y else 0 if v = 0 else s / (V - 2)
    loss = KL(q || softmax(z)) = lse(z) - sum_v q_v z_v + (1 - s) log(1 - s) + s log(s / (V - 2))

and 0 where ``y = 0``, the padding. With ``s = 0`` it is ``lse(z) - z_y``, for label 0 too.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import reference


def label_smoothed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Loss of each row (module docstring).

    Args:
        hidden: fp32 or bf16 ``[rows, channels]``.
        weight: ``[V, channels]``, the output projection; products are taken in the dtype of ``hidden``.
        bias: fp32 ``[V]``.
        labels: int64 ``[rows]``, each in ``[0, V)``.
        smoothing: ``0 <= smoothing < 1``.

    Returns:
        fp32 ``[rows]``.

    Raises:
        ValueError: shapes do not fit, or ``smoothing`` is out of range.
        RuntimeError: a label is out of range.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"label_smoothed_cross_entropy: hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"label_smoothed_cross_entropy: labels {tuple(labels.shape)} or bias {tuple(bias.shape)} do not fit "
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothed_cross_entropy: smoothing must be at least 0 and below 1, got {smoothing}")
    return reference.label_smoothed_cross_entropy(hidden, weight, bias, labels, smoothing)
