"""The parts of a decoding step around its attention, for few rows: each is one launch on a GPU.

``step_linear``: ``activation(n w^T + bias) + residual`` with ``n = LayerNorm(x)`` or ``x``. The products are summed in
fp32 and nothing is rounded before the result. What a norm follows stays fp32 in memory until that norm.
``step_norm``: that norm alone. ``step_embedding``: ids, positions and the token type of a step's rows looked up, added
and normalised. Statistics of norms are fp32; the activation is the erf-GELU.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import _dispatch, reference
from minilm_fast.ops._compile import constant
from minilm_fast.ops._dispatch import forced_backend, select
from minilm_fast.ops._library import define
from minilm_fast.ops.linear import ACTIVATIONS, PackedWeight

Optional = torch.Tensor | None
Norm = tuple[torch.Tensor, torch.Tensor, float]
"""Weight and bias of a norm, fp32 ``[channels]``, and what is added to the variance."""
_CHUNK = 8
_MOST_NORMALISED = 1024


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    residual: Optional,
    norm_weight: Optional,
    norm_bias: Optional,
    eps: float,
    activation: int,
    wide: bool,
    early: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.step_linear(x, weight, bias, residual, norm_weight, norm_bias, eps, ACTIVATIONS[activation], wide)


_linear_op = define(
    "step_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, int activation, bool wide, bool early) -> (Tensor, Tensor)",
    reference=_linear_reference,
    fake=lambda x, weight, bias, residual, norm_weight, norm_bias, eps, activation, wide, early: (
        weight.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if wide else weight.dtype),
        weight.new_empty((0 if norm_weight is None else x.shape[0], weight.shape[1])),
    ),
    cpu_kernel=False,
)
_norm_op = define(
    "step_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, bool early) -> Tensor",
    reference=lambda x, weight, bias, eps, dtype, early: reference.step_norm(x, weight, bias, eps, dtype),
    fake=lambda x, weight, bias, eps, dtype, early: x.new_empty(x.shape, dtype=dtype),
    cpu_kernel=False,
)
_embedding_op = define(
    "step_embedding(Tensor last_ids, int mask_id, Tensor slots, Tensor steps, Tensor source_lengths, Tensor word, "
    "Tensor position, Tensor? type, int type_id, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    reference=reference.step_embedding,
    fake=lambda last_ids, mask_id, slots, steps, lengths, word, *rest: word.new_empty(
        (last_ids.numel() * (1 if mask_id < 0 else 2), word.shape[1]), dtype=rest[-1]
    ),
    cpu_kernel=False,
)


def _refuse(dtype: torch.dtype, *sizes: int, normalised: int = 0) -> dict[str, str | None]:
    """Why the CUDA kernels take no numbers of a dtype, rows of these sizes, or norms of so many channels."""
    if dtype not in (torch.bfloat16, torch.float16):
        return {"cuda": f"the numbers are {dtype}, not bf16 or fp16"}
    for size in (*sizes, normalised):
        if size % _CHUNK:
            return {"cuda": f"{size} is no multiple of {_CHUNK}"}
    if normalised > _MOST_NORMALISED:
        return {"cuda": f"the {normalised} channels are more than {_MOST_NORMALISED}"}
    return {}


def step_kernels_take(weight: PackedWeight, *, normalised: bool = True) -> bool:
    """Whether the CUDA kernels take a weight (and, with ``normalised``, rows for it that they normalise first)."""
    channels = weight.in_features if normalised else 0
    return (
        weight.backend == "cuda"
        and forced_backend() in (None, "cuda")
        and not _refuse(weight.data.dtype, weight.in_features, weight.out_features, normalised=channels)
        and _dispatch.unusable("cuda", "step_linear", weight.data.device) is None
    )


@constant
def kernels_can_overlap(device: torch.device) -> bool:
    """Whether kernels on a device may start before the one before has ended: ``early`` below."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def step_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: Optional = None,
    *,
    norm: Norm | None = None,
    residual: Optional = None,
    activation: str = "none",
    wide: bool = False,
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``activation(n w^T + bias) + residual`` and ``n``, which is ``LayerNorm(x)`` with ``norm`` and else ``x``.

    Args:
        x: ``[rows, in_features]``, with ``norm`` fp32 and else of the weight's dtype.
        weight: from :func:`minilm_fast.ops.pack_weight` for CUDA or for the reference. On CUDA bf16 or fp16, both sizes
            multiples of 8, and with ``norm`` at most 1024 ``in_features``.
        bias: fp32 ``[out_features]`` or None.
        norm: of the rows of ``x``; or None.
        residual: ``[rows, out_features]`` of the weight's dtype, or None.
        activation: ``"none"`` or ``"gelu"`` (erf).
        wide: the result is fp32, for a norm to come.
        early: the kernel may start, and read the weight, before the one before it on the stream has ended, which must
            not write the weight. For devices on which :func:`kernels_can_overlap`.

    Returns:
        ``([rows, out_features], [rows, in_features])`` of the weight's dtype, the first fp32 if ``wide``. On CUDA a
        row's result does not depend on the other rows or on their number.

    Raises:
        ValueError: the weight was packed for the CPU's kernels, or the activation is unknown.
        RuntimeError: a shape, dtype or stride does not fit; the message names the argument.
    """
    if weight.backend not in ("cuda", "reference"):
        raise ValueError(f"step_linear: weight was packed for the backend {weight.backend}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"step_linear: unknown activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    w, b, eps = norm or (None, None, 0.0)
    refusals = _refuse(
        weight.data.dtype,
        *(weight.in_features, weight.out_features),
        normalised=0 if norm is None else weight.in_features,
    )
    chosen = select("step_linear", x, weight.data, refusals=refusals)
    run = _linear_reference if chosen == "reference" else _linear_op
    out, normal = run(x, weight.data, bias, residual, w, b, eps, ACTIVATIONS.index(activation), wide, early)
    return out, x if norm is None else normal


def step_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    early: bool = False,
) -> torch.Tensor:
    """``LayerNorm(x)`` in another dtype.

    Args:
        x: fp32 ``[rows, channels]``; on CUDA a multiple of 8, at most 1024 channels.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.
        dtype: of the result; on CUDA bf16 or fp16.
        early: as for :func:`step_linear`.

    Returns:
        ``[rows, channels]``.

    Raises:
        RuntimeError: a shape, dtype or stride does not fit; the message names the argument.
    """
    chosen = select("step_norm", x, weight, bias, refusals=_refuse(dtype, normalised=x.shape[-1]))
    if chosen == "reference":
        return reference.step_norm(x, weight, bias, eps, dtype)
    out: torch.Tensor = _norm_op(x, weight, bias, eps, dtype, early)
    return out


def step_embedding(
    last_ids: torch.Tensor,
    mask_id: int | None,
    slots: torch.Tensor,
    steps: torch.Tensor,
    source_lengths: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    type: Optional,
    type_id: int,
    norm: Norm,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The normalised embeddings of a step's rows, ordered (example, beam, row).

    Args:
        last_ids: int32 ``[E, B]``: row 0 of each hypothesis, at position ``source_lengths[slots[e]] + steps[e]``.
        mask_id: row 1, one position later; None: there is none.
        slots, steps: int32 ``[E]``.
        source_lengths: int32 ``[slots]``.
        word, position: fp32 tables ``[ids, channels]``; on CUDA a multiple of 8, at most 1024 channels.
        type: fp32 table of token types or None; ``type_id`` is that of all rows.
        norm: of the sums.
        dtype: of the result; on CUDA bf16 or fp16.

    Returns:
        ``[E * B * rows, channels]``. On CUDA a row whose id or position lies outside its table is NaN.

    Raises:
        RuntimeError: a shape, dtype or stride does not fit; the message names the argument.
    """
    chosen = select("step_embedding", last_ids, word, refusals=_refuse(dtype, normalised=word.shape[1]))
    run = reference.step_embedding if chosen == "reference" else _embedding_op
    mask = -1 if mask_id is None else mask_id
    out: torch.Tensor = run(last_ids, mask, slots, steps, source_lengths, word, position, type, type_id, *norm, dtype)
    return out
