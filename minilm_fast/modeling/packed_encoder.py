"""The encoder over weights that were packed once: what decoding, frozen teachers and embeddings run.

Built from a configuration and a state dict with canonical names; independent of the trainable network. Biases and
norms stay fp32, on a CPU the activations between operators too; ``dtype`` is the format of the linear layers' weights.
Unless it is fp32, attention is in bf16, with fp16 weights in fp16; on a GPU activations then have that dtype as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import activation, relative_position_bucket
from minilm_fast.ops.encoder import can_fuse

_FUSED_ACTIVATIONS = ("none", "gelu")


def attention_dtype(format: str) -> torch.dtype:
    """The dtype of attention where the linear layers' weights have this format."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(format, torch.bfloat16)


def default_activations(format: str, device: torch.device) -> torch.dtype:
    """The dtype of what passes between the operators where the linear layers' weights have this format."""
    return attention_dtype(format) if device.type == "cuda" else torch.float32


def split_activation(function: str) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """Of the activation that a configuration names, what the linear operators apply and what is left to apply."""
    if function in _FUSED_ACTIVATIONS:
        return function, None
    return "none", activation("silu" if function == "swish" else function)


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer ``[rows, in] -> [rows, out]``, with the activation that a configuration names.

    ``bias`` is fp32; ``added_bias``, of the dtype in which it is added where there is no activation, is its copy.
    """

    weight: ops.PackedWeight
    bias: Tensor
    added_bias: Tensor

    @classmethod
    def of(cls, weight: ops.PackedWeight, bias: Tensor) -> PackedLinear:
        """The layer with an fp32 bias, which is rounded here once and not in each call."""
        return cls(weight, bias, bias.to(weight.data.dtype) if weight.backend == "cuda" else bias)

    def __call__(self, x: Tensor, function: str = "none") -> Tensor:
        fused, rest = split_activation(function)
        y = ops.linear(x, self.weight, self.added_bias if fused == "none" else self.bias, fused)
        return y if rest is None else rest(y)

    def part(self, start: int, stop: int) -> PackedLinear:
        """The outputs from ``start`` to ``stop`` over the same memory, of a weight that is a plain matrix."""
        return PackedLinear(self.weight.part(start, stop), self.bias[start:stop], self.added_bias[start:stop])


@dataclass(frozen=True)
class PackedNorm:
    """``LayerNorm(x + residual)`` of rows; ``residual`` may be absent."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def parts(self) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and eps."""
        return self.weight, self.bias, self.eps


@dataclass(frozen=True)
class PackedBlock:
    """What follows the attention of a layer."""

    attention_output: PackedLinear
    attention_norm: PackedNorm
    intermediate: PackedLinear
    output: PackedLinear
    output_norm: PackedNorm
    activation: str

    def __call__(self, context: Tensor, x: Tensor) -> Tensor:
        """From the attention's result ``[rows, H, D]`` and the layer's input to the layer's output."""
        x = self.attention_norm(self.attention_output(context.flatten(1)), x)
        return self.output_norm(self.output(self.intermediate(x, self.activation)), x)


@dataclass(frozen=True)
class PackedLayer:
    """A layer: the fused projection to queries, keys and values, and what follows the attention."""

    projection: PackedLinear
    block: PackedBlock

    def fused(self) -> ops.EncoderLayer:
        """The same weights for :func:`minilm_fast.ops.encoder_layers`."""
        block = self.block
        return ops.EncoderLayer(
            projection=self.projection.weight,
            attention_output=block.attention_output.weight,
            intermediate=block.intermediate.weight,
            output=block.output.weight,
            projection_bias=self.projection.bias,
            attention_output_bias=block.attention_output.bias,
            attention_norm_weight=block.attention_norm.weight,
            attention_norm_bias=block.attention_norm.bias,
            intermediate_bias=block.intermediate.bias,
            output_bias=block.output.bias,
            output_norm_weight=block.output_norm.weight,
            output_norm_bias=block.output_norm.bias,
        )


class WeightReader:
    """Packs parts of a state dict.

    Args:
        config, state: of the checkpoint; canonical names.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"`` or, on a GPU, ``"fp16"``: format of the linear layers' weights.
        device: where the parts are put.
        eps: of the norms, by default what the configuration says.
        purpose: who needs the weights, for the error.
        activation_dtype: of what passes between the operators, by default that of :func:`default_activations`.

    Attributes:
        head_size: of queries, keys and values as the weights give them.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, Tensor],
        dtype: str,
        *,
        device: torch.device | str = "cpu",
        eps: float | None = None,
        purpose: str = "the encoder",
        activation_dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.activation_dtype = activation_dtype or default_activations(dtype, self.device)
        self._state = state
        # Heads are filled up with zeros to a size that the kernels for GPUs have; that changes no score and no sum.
        padded = self.device.type == "cuda" and ops.forced_backend() != "reference"
        self.head_size = ops.kernel_head_size(config.head_size) if padded else config.head_size
        self.eps = config.layer_norm_eps if eps is None else eps
        self._purpose = purpose

    def get(self, name: str) -> Tensor:
        """A tensor in fp32.

        Raises:
            UserError: it is missing.
        """
        try:
            tensor = self._state[name]
        except KeyError:
            raise UserError(f"the checkpoint has no {name}, which {self._purpose} needs") from None
        return tensor.detach().to(self.device, torch.float32).contiguous()

    def linear(self, *prefixes: str) -> PackedLinear:
        """Linear layers side by side as one."""
        return self._packed(*(torch.cat([self.get(f"{p}.{part}") for p in prefixes]) for part in ("weight", "bias")))

    def _packed(self, weight: Tensor, bias: Tensor) -> PackedLinear:
        return PackedLinear.of(ops.pack_weight(weight, self.dtype), bias)

    def _padded_heads(self, x: Tensor) -> Tensor:
        """``[heads * size, ...]`` with every head filled up to :attr:`head_size`."""
        heads, size = self.config.num_attention_heads, self.config.head_size
        if self.head_size == size:
            return x
        padded = x.new_zeros(heads, self.head_size, *x.shape[1:])
        padded[:, :size] = x.view(heads, size, *x.shape[1:])
        return padded.flatten(0, 1)

    def norm(self, prefix: str) -> PackedNorm:
        """The norm ``<prefix>.LayerNorm``."""
        return PackedNorm(self.get(f"{prefix}.LayerNorm.weight"), self.get(f"{prefix}.LayerNorm.bias"), self.eps)

    def projection(self, layer: int, *names: str) -> PackedLinear:
        """Of a layer (from 0) the projections ``query``, ``key`` and ``value``, or those named, as one."""
        base = f"bert.encoder.layer.{layer}.attention.self"
        names = names or ("query", "key", "value")
        weights = [self._padded_heads(self.get(f"{base}.{name}.weight")) for name in names]
        biases = [self._padded_heads(self.get(f"{base}.{name}.bias")) for name in names]
        # A key bias shifts a row of scores by a constant, which the softmax does not see.
        biases = [torch.zeros_like(b) if name == "key" else b for name, b in zip(names, biases, strict=True)]
        return self._packed(torch.cat(weights), torch.cat(biases))

    def block(self, layer: int) -> PackedBlock:
        """What follows the attention of a layer (from 0)."""
        base = f"bert.encoder.layer.{layer}"
        attention = f"{base}.attention.output.dense"
        return PackedBlock(
            attention_output=self._packed(
                self._padded_heads(self.get(f"{attention}.weight").T).T.contiguous(), self.get(f"{attention}.bias")
            ),
            attention_norm=self.norm(f"{base}.attention.output"),
            intermediate=self.linear(f"{base}.intermediate.dense"),
            output=self.linear(f"{base}.output.dense"),
            output_norm=self.norm(f"{base}.output"),
            activation=self.config.hidden_act,
        )

    def layer(self, layer: int) -> PackedLayer:
        """A layer (from 0)."""
        return PackedLayer(self.projection(layer), self.block(layer))

    def relative_bias(self) -> Tensor | None:
        """The bias of every distance, ``[heads, 2R + 1]``, from the buckets' biases; None for models without."""
        config = self.config
        if not config.rel_pos_bins:
            return None
        # From max_rel_pos on, all distances fall into the last bucket.
        limit = config.max_rel_pos
        distance = torch.arange(-limit, limit + 1, device=self.device)
        bucket = relative_position_bucket(distance, config.rel_pos_bins, limit)
        return self.get("bert.rel_pos_bias.weight")[:, bucket].contiguous()


class PackedEmbeddings:
    """Word, position and token-type embeddings, normalised and, if they are narrow, projected to the hidden size."""

    def __init__(self, reader: WeightReader) -> None:
        base, config = "bert.embeddings", reader.config
        self.word = reader.get(f"{base}.word_embeddings.weight")
        self._position = reader.get(f"{base}.position_embeddings.weight")
        self._type = reader.get(f"{base}.token_type_embeddings.weight") if config.type_vocab_size else None
        self._norm = reader.norm(base)
        self._dtype = reader.activation_dtype
        narrow = config.embedding_size != config.hidden_size
        self._project = reader.linear("bert.embeddings_project") if narrow else None

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """``[tokens, hidden]`` of int32 ``[tokens]``; ``types`` are not read if the model has none."""
        norm = self._norm
        if self._type is None:
            types = None
        x = ops.embed_layer_norm(
            ids, positions, types, self.word, self._position, self._type, norm.weight, norm.bias, norm.eps
        ).to(self._dtype)
        return x if self._project is None else self._project(x)

    def few_rows(
        self,
        last_ids: Tensor,
        mask_id: int | None,
        slots: Tensor,
        steps: Tensor,
        source_lengths: Tensor,
        type_id: int,
    ) -> Tensor:
        """The same for the rows of a decoding step: see :func:`minilm_fast.ops.step_embedding`."""
        tables = (self.word, self._position, self._type, type_id)
        x = ops.step_embedding(
            *(last_ids, mask_id, slots, steps, source_lengths, *tables, self._norm.parts(), self._dtype)
        )
        return x if self._project is None else ops.step_linear(x, self._project.weight, self._project.bias)[0]

    def projections(self) -> list[PackedLinear]:
        """The projection to the hidden size, if there is one."""
        return [] if self._project is None else [self._project]


class PackedEncoder:
    """Embeddings and the first layers of a checkpoint.

    Args:
        reader: of the checkpoint.
        layers: how many, by default all.

    Attributes:
        config, dtype, device: as the reader's.
        scale: of the scores.
        relative_bias: fp32 ``[heads, 2R + 1]`` or None.

    Raises:
        UserError: a weight is missing.
    """

    def __init__(self, reader: WeightReader, layers: int | None = None) -> None:
        config = reader.config
        self.config = config
        self.dtype = reader.dtype
        self.device = reader.device
        self.heads = config.num_attention_heads
        self.scale = config.head_size**-0.5
        self._eps = reader.eps
        self.embed = PackedEmbeddings(reader)
        self.layers = [reader.layer(i) for i in range(config.num_hidden_layers if layers is None else layers)]
        self.relative_bias = reader.relative_bias()
        # All layers can be one operator if their activation is the erf-GELU.
        fused = config.hidden_act == "gelu" and all(can_fuse(layer.projection.weight) for layer in self.layers)
        self._fused = ops.EncoderStack.of([layer.fused() for layer in self.layers]) if fused else None

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        return attention_dtype(self.dtype)

    def hidden_states(self, ids: Tensor, positions: Tensor, layout: ops.SequenceLayout) -> Tensor:
        """Outputs of the last layer, ``[tokens, hidden]`` in the reader's ``activation_dtype``.

        Args:
            ids, positions: int32 ``[layout.total]``.
            layout: where the sequences are and who sees whom; source tokens have the configuration's source type,
                the others its target type.
        """
        return self.run_layers(self.embed(ids, positions, self.token_types(layout)), positions, layout)

    def token_types(self, layout: ops.SequenceLayout) -> Tensor | None:
        """The token type of each token, int32 ``[tokens]``; None for models without."""
        config = self.config
        if not config.type_vocab_size:
            return None
        if layout.only_sources:
            device = layout.cu_seqlens.device
            return torch.full((layout.total,), config.source_type_id, dtype=torch.int32, device=device)
        return torch.where(layout.in_source(), config.source_type_id, config.target_type_id).to(torch.int32)

    def run_layers(self, x: Tensor, positions: Tensor, layout: ops.SequenceLayout) -> Tensor:
        """All layers; ``[tokens, hidden]`` to the same."""
        if self._fused is not None:
            at = None if self.relative_bias is None else positions
            return ops.encoder_layers(
                x, self._fused, layout, self.heads, self._eps, relative_bias=self.relative_bias, position_ids=at
            )
        for layer in self.layers:
            x = self.run_layer(layer, x, positions, layout)[0]
        return x

    def run_layer(
        self, layer: PackedLayer, x: Tensor, positions: Tensor, layout: ops.SequenceLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's output, and its keys and values ``[tokens, H, D]``."""
        q, k, v = layer.projection(x).to(self.attention_dtype).view(x.shape[0], 3, self.heads, -1).unbind(1)
        bias = self.relative_bias
        at = None if bias is None else positions
        context, _ = ops.attention(q, k, v, layout, scale=self.scale, relative_bias=bias, position_ids=at)
        return layer.block(context.to(x.dtype), x), k, v
