"""A head model for inference: its encoder over weights that are packed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilm_fast import ops
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads.base import HeadModel
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.last_layer import LastLayer
from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader

DTYPES = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}
"""The formats of the linear layers' weights, by the kind of device."""


class PackedHead:
    """Logits of a head model's present weights, faster than the model itself and without gradients.

    The encoder's layers are packed; the head, whose work is small, is the model's own and computes in fp32. Heads that
    read the first token of a sequence have the last layer computed for that token alone. In fp32 the logits are those
    of the model in evaluation mode to the rounding of another order of sums.

    Args:
        model: on a CPU or a GPU, where the logits will be computed. After its weights have changed, a new object is
            needed.
        dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"``: format of the linear layers' weights.

    Raises:
        UserError: a dtype that is unknown or not for the device, or a model on a device of another kind.
    """

    def __init__(self, model: HeadModel, dtype: str = "fp32") -> None:
        state, device = model.state_dict(), model.device
        if device.type not in DTYPES:
            raise UserError(f"weights are packed for a CPU or a GPU, the model is on {device}")
        if dtype not in DTYPES[device.type]:
            known = ", ".join(DTYPES[device.type])
            raise UserError(f"dtype must be one of {known}, got {dtype!r} for a model on {device.type}")
        self.model = model
        self.dtype = dtype
        reader = WeightReader(model.config, state, dtype, device=device)
        layers = model.config.num_hidden_layers
        first_only = model.reads_first_token
        self._encoder = PackedEncoder(reader, layers - 1 if first_only else layers)
        self._last = LastLayer(reader, layers - 1) if first_only else None

    @torch.no_grad()
    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        """Logits fp32; arguments and errors as for the model itself."""
        with _evaluating(self.model):
            return self.model(*inputs, **more, encode=self._encode)

    def _encode(self, batch: HeadInput) -> Tensor:
        """The encoder's output: fp32 ``[layout.total_queries, hidden]``."""
        tokens, encoder = batch.tokens, self._encoder
        layout, positions = tokens.layout, tokens.position_ids
        x = encoder.embed(tokens.input_ids, positions, batch.token_type_ids)
        x = encoder.run_layers(x, positions, layout.without_queries())
        if self._last is None:
            return x.float()
        rows = x[layout.query_index()]
        k, v = self._last.keys_values(x)
        q, k, v = (part.to(encoder.attention_dtype) for part in (self._last.queries(rows), k, v))
        bias = encoder.relative_bias
        at = None if bias is None else positions
        context, _ = ops.attention(q, k, v, layout, scale=encoder.scale, relative_bias=bias, position_ids=at)
        return self._last.block(context.to(x.dtype), rows).float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
