"""A teacher that only runs forward, over weights that were packed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minilm_fast.config import Config
from minilm_fast.distillation.sides import MODULES, SideInputs
from minilm_fast.errors import UserError
from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader, attention_dtype


class FrozenEncoder:
    """The encoder of a checkpoint up to one layer, with packed weights.

    Activations between the operators are fp32; with ``dtype="bf16"`` the products, the attention and the vectors are
    bf16, as those of a student under autocast.

    Args:
        config, state: of the checkpoint; canonical names, fp32.
        layer: the layer whose vectors may be asked for, from 1; by default the model's last. For the distiller it is
            the last one.
        dtype: ``"fp32"`` or ``"bf16"``.
        device: where it computes.

    Raises:
        UserError: ``layer`` is out of range.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, Tensor],
        *,
        layer: int | None = None,
        dtype: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.heads = config.num_attention_heads
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.layers = config.num_hidden_layers if layer is None else layer
        if not 1 <= self.layers <= config.num_hidden_layers:
            raise UserError(f"teacher layer {layer}: the teacher has layers 1 to {config.num_hidden_layers}")
        self.dtype = dtype
        reader = WeightReader(
            config, state, dtype, device=device, purpose="a frozen teacher", activation_dtype=torch.float32
        )
        self._encoder = PackedEncoder(reader, self.layers - 1)
        base = f"bert.encoder.layer.{self.layers - 1}.attention.self"
        self._vectors = {name: reader.linear(f"{base}.{module}") for name, module in MODULES.items()}

    @torch.no_grad()
    def vectors(self, inputs: SideInputs, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`minilm_fast.distillation.sides.Side`; in the dtype of the teacher.

        Raises:
            UserError: ``layer`` is another than the one that was packed.
        """
        if layer != self.layers:
            raise UserError(f"teacher layer {layer}: layer {self.layers} was packed")
        batch = inputs.packed()
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            x = self._encoder.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
            x = x.to(attention_dtype(self.dtype))
            return {name: self._vectors[name](x) for name in names}
