"""A teacher that only runs forward, over weights that were packed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.distillation.sides import MODULES, SideInputs
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import activation, relative_position_bucket


@dataclass(frozen=True)
class _Linear:
    weight: ops.PackedWeight
    bias: Tensor

    def __call__(self, x: Tensor, function: str = "none") -> Tensor:
        return ops.linear(x, self.weight, self.bias, function)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    projection: _Linear
    attention_output: _Linear
    attention_norm: _Norm
    intermediate: _Linear
    output: _Linear
    output_norm: _Norm


class FrozenEncoder:
    """The encoder of a checkpoint up to one layer, with packed weights.

    Activations between the operators are fp32; with ``dtype="bf16"`` the products and the attention are bf16.

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
        self._device = torch.device(device)
        self._tensors = {name: tensor.detach() for name, tensor in state.items()}
        base = "bert.embeddings"
        self._word = self._get(f"{base}.word_embeddings.weight")
        self._position = self._get(f"{base}.position_embeddings.weight")
        self._type = self._get(f"{base}.token_type_embeddings.weight") if config.type_vocab_size else None
        self._embedding_norm = self._norm(base)
        wide = config.embedding_size != config.hidden_size
        self._project = self._linear("bert.embeddings_project") if wide else None
        self._layers = [self._layer(f"bert.encoder.layer.{i}") for i in range(self.layers - 1)]
        self._vectors = self._qkv(self.layers - 1)
        self._activation = None if config.hidden_act == "gelu" else activation(config.hidden_act)
        self._bias = self._relative_bias()
        del self._tensors

    def _get(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device, torch.float32).contiguous()

    def _linear(self, *names: str) -> _Linear:
        weight = torch.cat([self._get(f"{name}.weight") for name in names])
        return _Linear(ops.pack_weight(weight, self.dtype), torch.cat([self._get(f"{name}.bias") for name in names]))

    def _norm(self, name: str) -> _Norm:
        weight, bias = (self._get(f"{name}.LayerNorm.{part}") for part in ("weight", "bias"))
        return _Norm(weight, bias, self.config.layer_norm_eps)

    def _qkv(self, layer: int) -> dict[str, _Linear]:
        base = f"bert.encoder.layer.{layer}.attention.self"
        return {name: self._linear(f"{base}.{module}") for name, module in MODULES.items()}

    def _layer(self, base: str) -> _Layer:
        return _Layer(
            projection=self._linear(*(f"{base}.attention.self.{module}" for module in MODULES.values())),
            attention_output=self._linear(f"{base}.attention.output.dense"),
            attention_norm=self._norm(f"{base}.attention.output"),
            intermediate=self._linear(f"{base}.intermediate.dense"),
            output=self._linear(f"{base}.output.dense"),
            output_norm=self._norm(f"{base}.output"),
        )

    def _relative_bias(self) -> Tensor | None:
        if not self.config.rel_pos_bins:
            return None
        limit = self.config.max_rel_pos
        distance = torch.arange(-limit, limit + 1, device=self._device)
        bucket = relative_position_bucket(distance, self.config.rel_pos_bins, limit)
        return self._get("bert.rel_pos_bias.weight")[:, bucket].contiguous()

    def _embed(self, ids: Tensor, positions: Tensor, layout: ops.SequenceLayout) -> Tensor:
        types = None
        if self._type is not None:
            config = self.config
            types = torch.where(layout.in_source(), config.source_type_id, config.target_type_id).to(torch.int32)
        norm = self._embedding_norm
        x = ops.embed_layer_norm(
            ids, positions, types, self._word, self._position, self._type, norm.weight, norm.bias, norm.eps
        )
        return x if self._project is None else self._project(x)

    def _forward(self, layer: _Layer, x: Tensor, positions: Tensor, layout: ops.SequenceLayout) -> Tensor:
        wanted = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        q, k, v = layer.projection(x).to(wanted).view(x.shape[0], 3, self.heads, -1).unbind(1)
        at = None if self._bias is None else positions
        context, _ = ops.attention(q, k, v, layout, relative_bias=self._bias, position_ids=at)
        x = layer.attention_norm(layer.attention_output(context.flatten(1).float()), x)
        inner = layer.intermediate(x, "gelu" if self._activation is None else "none")
        return layer.output_norm(layer.output(inner if self._activation is None else self._activation(inner)), x)

    @torch.no_grad()
    def vectors(self, inputs: SideInputs, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`minilm_fast.distillation.sides.Side`; fp32.

        Raises:
            UserError: ``layer`` is another than the one that was packed.
        """
        if layer != self.layers:
            raise UserError(f"teacher layer {layer}: layer {self.layers} was packed")
        batch = inputs.packed()
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            x = self._embed(batch.input_ids, batch.position_ids, batch.layout)
            for each in self._layers:
                x = self._forward(each, x, batch.position_ids, batch.layout)
            return {name: self._vectors[name](x) for name in names}
