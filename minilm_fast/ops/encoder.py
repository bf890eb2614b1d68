"""The layers of a BERT encoder over packed sequences as one operator, with weights that are packed once.

``encoder_layers``: for each layer, ``x`` being fp32 ``[tokens, hidden]``,

    q, k, v = x W_qkv^T + b_qkv                          c = attention(q, k, v), scale ``head_dim ** -0.5``
    y = LayerNorm(c W_o^T + b_o + x)                     x = LayerNorm(gelu(y W_1^T + b_1) W_2^T + b_2 + y)

(Vaswani et al., arXiv:1706.03762, section 3, with BERT's order of norms and erf-GELU.) The products are those of
:func:`minilm_fast.ops.linear` in the format of the weights. In ``bf16`` and ``int8`` the queries, keys and values, the
context ``c`` and the output of the GELU are rounded to bf16; ``x``, ``y``, the sums and the norms are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from minilm_fast.ops import reference
from minilm_fast.ops._dispatch import unusable
from minilm_fast.ops._library import define
from minilm_fast.ops.layout import SequenceLayout
from minilm_fast.ops.linear import FORMATS, PackedWeight


def _reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    segments: torch.Tensor,
    max_seqlen: int,
    heads: int,
    inner: int,
    format: int,
    eps: float,
    relative_bias: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    layout = SequenceLayout(cu_seqlens, segments, max_seqlen, x.shape[0])
    return reference.encoder_layers(
        x, weights, vectors, layout, heads, FORMATS[format], eps, relative_bias, position_ids
    )


_op = define(
    "encoder_layers(Tensor x, Tensor[] weights, Tensor[] vectors, Tensor cu_seqlens, Tensor segments, int max_seqlen, "
    "int heads, int inner, int format, float eps, Tensor? relative_bias, Tensor? position_ids) -> Tensor",
    reference=_reference,
    fake=lambda x, *_: torch.empty_like(x),
)


@dataclass(frozen=True)
class EncoderLayer:
    """The weights of a layer and the fp32 vectors that go with them.

    ``projection`` is the queries', keys' and values' ``[3 * hidden, hidden]``.
    """

    projection: PackedWeight
    attention_output: PackedWeight
    intermediate: PackedWeight
    output: PackedWeight
    projection_bias: torch.Tensor
    attention_output_bias: torch.Tensor
    attention_norm_weight: torch.Tensor
    attention_norm_bias: torch.Tensor
    intermediate_bias: torch.Tensor
    output_bias: torch.Tensor
    output_norm_weight: torch.Tensor
    output_norm_bias: torch.Tensor

    def weights(self) -> list[PackedWeight]:
        """The four weights."""
        return [self.projection, self.attention_output, self.intermediate, self.output]

    def vectors(self) -> list[torch.Tensor]:
        """The eight vectors."""
        return [getattr(self, field.name) for field in fields(self)[4:]]


@dataclass(frozen=True)
class EncoderStack:
    """Layers in the form that the operator takes: made once, it spares every call the collecting.

    Attributes:
        weights: four a layer, as their backend packed them.
        vectors: eight a layer.
        inner: size between the two products after the attention.
        format, backend: of the weights.
    """

    weights: list[torch.Tensor]
    vectors: list[torch.Tensor]
    inner: int
    format: str
    backend: str

    @classmethod
    def of(cls, layers: Sequence[EncoderLayer]) -> EncoderStack:
        """The stack of some layers.

        Raises:
            ValueError: their weights differ in format or backend.
        """
        weights = [weight for layer in layers for weight in layer.weights()]
        kinds = {(weight.format, weight.backend) for weight in weights}
        if len(kinds) > 1:
            raise ValueError("encoder_layers: the weights must be packed in one format by one backend")
        format, backend = kinds.pop() if kinds else ("fp32", "reference")
        vectors = [vector for layer in layers for vector in layer.vectors()]
        inner = layers[0].intermediate.out_features if layers else 0
        return cls([weight.data for weight in weights], vectors, inner, format, backend)


def can_fuse(weight: PackedWeight) -> bool:
    """Whether :func:`encoder_layers` exists for the backend that packed a weight."""
    return unusable(weight.backend, "encoder_layers", weight.data.device) is None


def encoder_layers(
    x: torch.Tensor,
    layers: Sequence[EncoderLayer] | EncoderStack,
    layout: SequenceLayout,
    heads: int,
    eps: float,
    *,
    relative_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layers one after the other (module docstring). Forward only.

    Args:
        x: fp32 ``[layout.total, hidden]``.
        layers: all packed in one format; none gives ``x``.
        layout: where the sequences are and who sees whom; all rows ask.
        heads: of the attention.
        eps: of the norms.
        relative_bias, position_ids: as for :func:`minilm_fast.ops.attention`.

    Returns:
        fp32 ``[layout.total, hidden]``. A sequence's rows do not depend on the other sequences.

    Raises:
        ValueError: shapes or formats do not fit together.
    """
    if x.dim() != 2 or x.shape[0] != layout.total or x.dtype != torch.float32:
        raise ValueError(f"encoder_layers: x must be fp32 [{layout.total}, hidden], got {x.dtype} {tuple(x.shape)}")
    if layout.cu_queries is not None:
        raise ValueError("encoder_layers: all rows of the layout must ask")
    if (relative_bias is None) != (position_ids is None):
        raise ValueError("encoder_layers: relative_bias and position_ids go together")
    stack = layers if isinstance(layers, EncoderStack) else EncoderStack.of(layers)
    if not stack.weights:
        return x
    run = _reference if stack.backend == "reference" else _op
    return run(
        x.contiguous(),
        stack.weights,
        stack.vectors,
        layout.cu_seqlens,
        layout.segments,
        layout.max_seqlen,
        heads,
        stack.inner,
        FORMATS.index(stack.format),
        eps,
        relative_bias,
        position_ids,
    )
