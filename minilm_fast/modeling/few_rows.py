"""The layers of a decoding step in few launches: what :mod:`minilm_fast.ops.step` has, put around the attention.

A layer is five launches: norm and projection, attention, output and residual, norm and first product of the
feed-forward layer with its GELU, second product and residual. The sums before a norm stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minilm_fast import ops
from minilm_fast.modeling.last_layer import LastLayer
from minilm_fast.modeling.packed_encoder import (
    PackedBlock,
    PackedEmbeddings,
    PackedLayer,
    PackedLinear,
    PackedNorm,
    split_activation,
)

MOST_ROWS = 512
"""With more rows the products are large enough for those of cuBLAS."""
OVERLAP = False
"""Kernels start before the one before has ended and fetch their weights meanwhile, where the GPU can (programmatic
dependent launch). Off until it has been timed."""
Attention = Callable[[int, Tensor, Tensor, Tensor, bool], Tensor]
"""Of a layer's number, queries, keys and values ``[rows, H, D]``, and whether its kernel may start early."""


def overlap(device: torch.device) -> bool:
    """Whether the kernels of a step may overlap now."""
    return OVERLAP and ops.kernels_can_overlap(device)


def project(
    linear: PackedLinear,
    x: Tensor,
    norm: PackedNorm | None = None,
    *,
    function: str = "none",
    residual: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`minilm_fast.ops.step_linear` with an activation that a configuration names.

    Raises:
        UserError: there is no such activation.
    """
    fused, rest = split_activation(function)
    y, normal = ops.step_linear(
        *(x, linear.weight, linear.bias),
        norm=None if norm is None else norm.parts(),
        residual=residual,
        activation=fused,
        wide=wide,
        early=overlap(x.device),
    )
    return (y if rest is None else rest(y)), normal


class FewRows:
    """The encoder and the head's transform for few rows.

    Args:
        embed, layers, last: the encoder; ``last`` with its whole projection.
        transform, transform_norm: of the head.
        function: the transform's activation.
        heads: of the attention.
    """

    def __init__(
        self,
        embed: PackedEmbeddings,
        layers: Sequence[PackedLayer],
        last: LastLayer,
        transform: PackedLinear,
        transform_norm: PackedNorm,
        function: str,
        heads: int,
    ) -> None:
        assert last.projection is not None
        self.embed = embed
        self._layers = [*layers, PackedLayer(last.projection, last.block)]
        self._transform = transform
        self._transform_norm = transform_norm
        self._function = function
        self._heads = heads

    def fits(self) -> bool:
        """Whether the kernels take every weight."""
        normalised = [linear for layer in self._layers for linear in (layer.projection, layer.block.intermediate)]
        plain = [linear for layer in self._layers for linear in (layer.block.attention_output, layer.block.output)]
        plain += [self._transform, *self.embed.projections()]
        return all(ops.step_kernels_take(linear.weight) for linear in normalised) and all(
            ops.step_kernels_take(linear.weight, normalised=False) for linear in plain
        )

    def takes(self, rows: int) -> bool:
        """Whether so many rows run here at this moment; a backend may have been forced."""
        return rows <= MOST_ROWS and ops.step_kernels_take(self._transform.weight, normalised=False)

    def layers(self, x: Tensor, rows: int, attention: Attention) -> Tensor:
        """All layers of the rows of a step, the last one of each ``rows`` only in the last layer.

        Args:
            x: the normalised embeddings.

        Returns:
            ``[x.shape[0] / rows, hidden]``.
        """
        dtype = x.dtype
        norm: PackedNorm | None = None
        for index, layer in enumerate(self._layers):
            projected, x = project(layer.projection, x, norm)
            q, k, v = projected.view(x.shape[0], 3, self._heads, -1).unbind(1)
            context = attention(index, q, k, v, overlap(x.device))
            if index == len(self._layers) - 1:
                context, x = context[rows - 1 :: rows], x[rows - 1 :: rows]
            x = _block(layer.block, context.flatten(1), x)
            norm = layer.block.output_norm
        assert norm is not None
        return ops.step_norm(x, *norm.parts(), dtype, overlap(x.device))

    def transform(self, hidden: Tensor) -> Tensor:
        """The head's transform of last hidden states."""
        y, _ = project(self._transform, hidden, function=self._function, wide=True)
        return ops.step_norm(y, *self._transform_norm.parts(), hidden.dtype, overlap(y.device))


def _block(block: PackedBlock, context: Tensor, x: Tensor) -> Tensor:
    """What follows the attention, up to the sums before the last norm, fp32."""
    sums, _ = project(block.attention_output, context, residual=x, wide=True)
    inner, x = project(block.intermediate, sums, block.attention_norm, function=block.activation)
    return project(block.output, inner, residual=x, wide=True)[0]
