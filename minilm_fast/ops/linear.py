"""Linear layers and the vocabulary projection over a weight that is packed once.

``linear``: ``y = activation(x w^T + b)``, the erf-GELU fused (to 5e-7, or 2e-4 where the
result is bf16). Formats of a packed weight:

* ``fp32``: exact;
* ``bf16``, ``fp16``: weight and activations rounded to it, products summed in fp32; on CUDA the activations that come
  out are rounded to it before they become the dtype of ``x``; fp16 has kernels on CUDA only;
* ``int8``: weights symmetric per output channel (``s_n = max|w_n| / 127``), activations symmetric per row
  (``s_m = max|x_m| / 127``, round half to even), ``y_mn = s_m s_n sum_k qx_mk qw_nk``, the sum exact.

``lm_head_topk``: log-softmax over the vocabulary of ``x w^T + b``, then the ``k`` largest, the logits never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minilm_fast.ops import _cuda, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define

# The extension knows a format by its place in the list.
FORMATS = ("fp32", "bf16", "int8", "fp16")
ACTIVATIONS = ("none", "gelu")


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    format: int,
    activation: int,
) -> torch.Tensor:
    return reference.linear(x, weight, bias, FORMATS[format], ACTIVATIONS[activation])


def _head_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    vocab_size: int,
    format: int,
    k: int,
    banned: torch.Tensor | None,
    suppress_id: int,
    suppress: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.lm_head_topk(x, weight, bias, FORMATS[format], k, banned, suppress_id, suppress)


_pack_op = define(
    "pack_weight(Tensor weight, int format) -> Tensor",
    reference=lambda weight, format: weight.clone(),
    fake=lambda weight, format: weight.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8),
)
_linear_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int out_features, int format, int activation) -> Tensor",
    reference=_linear_reference,
    fake=lambda x, weight, bias, out_features, format, activation: x.new_empty((x.shape[0], out_features)),
)
_head_op = define(
    "lm_head_topk(Tensor x, Tensor weight, Tensor bias, int vocab_size, int format, int k, Tensor? banned, "
    "int suppress_id, Tensor? suppress) -> (Tensor, Tensor)",
    reference=_head_reference,
    fake=lambda x, weight, bias, vocab_size, format, k, *_: (
        x.new_empty((x.shape[0], k), dtype=torch.float32),
        x.new_empty((x.shape[0], k), dtype=torch.int32),
    ),
)


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[out_features, in_features]`` in the form its backend reads.

    Attributes:
        data: what the backend made of it: an opaque uint8 vector, or the weight itself for the reference and, in the
            format's dtype, for CUDA.
        out_features, in_features: shape of the weight.
        format: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"fp16"``.
        backend: the backend that packed it and must run it.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    format: str
    backend: str

    def part(self, start: int, stop: int) -> PackedWeight:
        """The outputs from ``start`` to ``stop`` over the same memory.

        Raises:
            ValueError: the CPU's kernels packed it.
        """
        if self.backend == "cpu":
            raise ValueError("PackedWeight: a weight that was packed for the CPU cannot be taken apart")
        return PackedWeight(self.data[start:stop], stop - start, self.in_features, self.format, self.backend)


def pack_weight(weight: torch.Tensor, format: str = "fp32") -> PackedWeight:
    """Packs a weight for :func:`linear` or :func:`lm_head_topk`.

    Args:
        weight: fp32 or bf16 ``[out_features, in_features]``.
        format: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"fp16"``.

    Raises:
        ValueError: unknown format, or not a matrix.
    """
    if format not in FORMATS:
        raise ValueError(f"pack_weight: unknown format {format!r}: must be one of {', '.join(FORMATS)}")
    if weight.dim() != 2:
        raise ValueError(f"pack_weight: weight must be a matrix, got shape {tuple(weight.shape)}")
    weight = weight.detach()
    backend = select("pack_weight", weight, refusals=_cuda.refuse_format(format))
    if backend == "cuda":
        data = weight.to(_cuda.FORMATS[format]).contiguous()
    elif backend == "reference":
        data = weight.to(_cuda.FORMATS[format]) if format in ("bf16", "fp16") else weight
    else:
        data = _pack_op(weight.contiguous(), FORMATS.index(format))
    return PackedWeight(data, weight.shape[0], weight.shape[1], format, backend)


def _check(operator: str, x: torch.Tensor, weight: PackedWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"{operator}: x must be [rows, {weight.in_features}] for this weight, got {tuple(x.shape)}")


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """``activation(x w^T + bias)`` with a packed weight (module docstring).

    Args:
        x: fp32 or bf16 ``[rows, in_features]``.
        weight: from :func:`pack_weight`.
        bias: fp32 ``[out_features]`` or None; on CUDA, with no activation, it may have the dtype of the weight.
        activation: ``"none"`` or ``"gelu"`` (erf).

    Returns:
        ``[rows, out_features]`` in the dtype of ``x``. A row's result does not depend on the other rows.

    Raises:
        ValueError: shapes do not fit, or the activation is unknown.
    """
    _check("linear", x, weight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: unknown activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if weight.backend == "cuda":
        return _cuda.linear(x, weight.data, bias, activation)
    if weight.backend == "reference":
        return reference.linear(x, weight.data, bias, weight.format, activation)
    return _linear_op(
        x,
        weight.data,
        bias,
        weight.out_features,
        FORMATS.index(weight.format),
        ACTIVATIONS.index(activation),
    )


def _head_backend(x: torch.Tensor, weight: PackedWeight, k: int) -> str:
    """Of a weight that was packed for CUDA: whether the kernel takes it, or the reference."""
    reason = None
    if k > _cuda.MOST_CANDIDATES:
        reason = f"k is {k}, above {_cuda.MOST_CANDIDATES}"
    elif weight.in_features * weight.data.element_size() % 16:
        reason = f"rows of {weight.in_features} numbers are no multiple of 16 bytes"
    return select("lm_head_topk", x, weight.data, refusals={"cuda": reason})


def lm_head_topk(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor,
    k: int,
    *,
    banned: torch.Tensor | None = None,
    suppress_id: int = -1,
    suppress: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` most probable next tokens of each row, without writing the logits.

    The log-sum-exp is taken over the unmodified logits. Then -10000 is added to the log-probabilities of the banned
    ids, then that of ``suppress_id`` is set to -10000 in the rows where ``suppress`` holds.

    Args:
        x: fp32 or bf16 ``[rows, in_features]``, the transformed hidden states.
        weight: packed ``[vocabulary, in_features]``.
        bias: fp32 ``[vocabulary]``.
        k: number of candidates, at most the vocabulary's size.
        banned: int32 ``[rows, J]``, -1 for none; an id given twice counts once.
        suppress_id: an id, used with ``suppress``.
        suppress: bool ``[rows]``.

    Returns:
        ``(log-probabilities fp32 [rows, k], ids int32 [rows, k])``, sorted descending.

    Raises:
        ValueError: shapes do not fit or ``k`` is out of range.
    """
    _check("lm_head_topk", x, weight)
    if not 1 <= k <= weight.out_features:
        raise ValueError(f"lm_head_topk: k must be from 1 to the vocabulary's {weight.out_features}, got {k}")
    if weight.backend == "reference" or (weight.backend == "cuda" and _head_backend(x, weight, k) == "reference"):
        return reference.lm_head_topk(x, weight.data, bias, weight.format, k, banned, suppress_id, suppress)
    return _head_op(
        x,
        weight.data,
        bias,
        weight.out_features,
        FORMATS.index(weight.format),
        k,
        banned,
        suppress_id,
        suppress,
    )
