"""One AdamW update in a single pass over memory.

With ``m, v`` the running means of the gradient and its square (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, as
transformers 2.x implemented it)::

    m     <- beta1 m + (1 - beta1) g
    v     <- beta2 v + (1 - beta2) g^2
    param <- (param - step_size m / (sqrt(v) + eps)) * decay
"""

from __future__ import annotations

import torch

from minilm_fast.ops import _cuda, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define

_op = define(
    "adamw(Tensor(a!) param, Tensor grad, Tensor(b!) mean, Tensor(c!) square, float step_size, float beta1, "
    "float beta2, float eps, float decay) -> ()",
    reference=reference.adamw,
    fake=lambda *_: None,
)


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """Updates ``param``, ``mean`` and ``square`` in place (module docstring).

    Args:
        param, grad, mean, square: of one shape; the C++ kernel takes contiguous fp32.
        step_size: learning rate with the bias corrections.
        decay: factor on the updated parameter, ``1 - learning rate * weight decay``.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    settings = {"step_size": step_size, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    adamw_of_many([param], [grad], [mean], [square], **settings)


def adamw_of_many(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    *,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """:func:`adamw` of several parameters on one device; on a GPU in a few launches for all of them.

    Args:
        params, grads, means, squares: as many of each.
        step_size, beta1, beta2, eps, decay: as there.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    if not params:
        return
    settings = (step_size, beta1, beta2, eps, decay)
    chosen = select("adamw", *params, *grads, *means, *squares)
    if chosen == "cuda":
        _cuda.adamw(params, grads, means, squares, *settings)
        return
    for tensors in zip(params, grads, means, squares, strict=True):
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        (_op if plain and chosen == "cpu" else reference.adamw)(*tensors, *settings)
