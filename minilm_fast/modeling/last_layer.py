"""A last layer over packed weights that is computed for some rows only: the others give keys and values alone."""

from __future__ import annotations

from torch import Tensor

from minilm_fast.modeling.packed_encoder import PackedBlock, PackedLinear, WeightReader


class LastLayer:
    """The layer with its queries projected apart.

    Args:
        reader: of the checkpoint.
        layer: its number, from 0.
        whole: the projections lie in one piece too, as ``projection``; for weights that are plain matrices.
    """

    def __init__(self, reader: WeightReader, layer: int, *, whole: bool = False) -> None:
        self._heads = reader.config.num_attention_heads
        self.projection: PackedLinear | None = reader.projection(layer) if whole else None
        self._query: PackedLinear
        self._key_value: PackedLinear
        if self.projection is not None:
            width = self._heads * reader.head_size
            self._query, self._key_value = self.projection.part(0, width), self.projection.part(width, 3 * width)
        else:
            self._query = reader.projection(layer, "query")
            self._key_value = reader.projection(layer, "key", "value")
        self.block: PackedBlock = reader.block(layer)

    def queries(self, x: Tensor) -> Tensor:
        """Of the rows that ask: ``[rows, hidden]`` -> ``[rows, H, D]``, D the reader's ``head_size``."""
        return self._query(x).view(x.shape[0], self._heads, -1)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of all rows: ``[tokens, hidden]`` -> twice ``[tokens, H, D]``."""
        k, v = self._key_value(x).view(x.shape[0], 2, self._heads, -1).unbind(1)
        return k, v
