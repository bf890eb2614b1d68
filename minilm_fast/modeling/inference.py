"""The encoder with packed weights for decoding: prefill of sources, then one step at a time.

Built from a configuration and a state dict with canonical names; independent of the trainable network. Biases and
norms stay fp32, and so do the activations between operators; ``dtype`` is the format of the linear layers' weights.
Unless it is fp32, sources attend in bf16 and keys and values are cached as bf16, which halves what a step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import relative_position_bucket

# The original's decoder normalises with 1e-5 whatever the configuration says.
LAYER_NORM_EPS = 1e-5
CAPACITY_MULTIPLE = 16

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class _Linear:
    weight: ops.PackedWeight
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        if activation in ("none", "gelu"):
            return ops.linear(x, self.weight, self.bias, activation)
        return _ACTIVATIONS[activation](ops.linear(x, self.weight, self.bias))


@dataclass(frozen=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, LAYER_NORM_EPS)


@dataclass(frozen=True)
class _Projection:
    """Queries, keys and values of a layer: one product, or in the last layer the queries apart."""

    fused: _Linear | None
    query: _Linear | None
    key_value: _Linear | None

    def __call__(
        self, x: torch.Tensor, heads: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.fused is not None:
            q, k, v = self.fused(x).to(dtype).view(x.shape[0], 3, heads, -1).unbind(1)
            return q, k, v
        k, v = self.keys_values(x, heads)
        return self.queries(x, heads), k, v

    def queries(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        assert self.query is not None
        return self.query(x).view(x.shape[0], heads, -1)

    def keys_values(self, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.key_value is not None
        k, v = self.key_value(x).view(x.shape[0], 2, heads, -1).unbind(1)
        return k, v


@dataclass(frozen=True)
class _Layer:
    projection: _Projection
    attention_output: _Linear
    attention_norm: _Norm
    intermediate: _Linear
    output: _Linear
    output_norm: _Norm
    activation: str

    def after_attention(self, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From the attention's result ``[rows, H, D]`` and the layer's input to the layer's output."""
        x = self.attention_norm(self.attention_output(context.flatten(1)), x)
        return self.output_norm(self.output(self.intermediate(x, self.activation)), x)


class DecodeCache:
    """Keys and values of the examples being decoded: one slot an example, all layers.

    Args:
        layers, heads, head_dim: shape of the model.
        slots: examples held at the same time.
        beams: hypotheses per example.
        source_capacity: longest source in tokens; rounded up to a multiple of 16.
        steps: longest history.
        dtype: fp32 or bf16.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        *,
        slots: int,
        beams: int,
        source_capacity: int,
        steps: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        capacity = -(-max(source_capacity, 1) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.source_k = torch.empty(layers, slots, heads, head_dim, capacity, dtype=dtype)
        self.source_v = torch.empty(layers, slots, heads, capacity, head_dim, dtype=dtype)
        self.history_k = torch.empty(layers, slots, steps, beams, heads, head_dim, dtype=dtype)
        self.history_v = torch.empty_like(self.history_k)
        self.source_lengths = torch.zeros(slots, dtype=torch.int32)


class InferenceEngine:
    """Forward passes of decoding over packed weights.

    Args:
        config: shape of the model.
        state: fp32 tensors by canonical name.
        dtype: ``"fp32"``, ``"bf16"`` or ``"int8"``: format of the linear layers' weights.

    Raises:
        UserError: a weight that decoding needs is missing.
    """

    def __init__(self, config: Config, state: Mapping[str, torch.Tensor], dtype: str = "fp32") -> None:
        self.config = config
        self.dtype = dtype
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self._state = state
        embeddings = "bert.embeddings"
        self._word = self._get(f"{embeddings}.word_embeddings.weight")
        self._position = self._get(f"{embeddings}.position_embeddings.weight")
        self._type = self._get(f"{embeddings}.token_type_embeddings.weight") if config.type_vocab_size else None
        self._embedding_norm = self._norm(f"{embeddings}.LayerNorm")
        projected = config.embedding_size != config.hidden_size
        self._project = self._linear("bert.embeddings_project") if projected else None
        self._layers = [self._layer(f"bert.encoder.layer.{i}") for i in range(config.num_hidden_layers)]
        self._transform = self._linear("cls.predictions.transform.dense")
        self._transform_norm = self._norm("cls.predictions.transform.LayerNorm")
        decoder = state.get("cls.predictions.decoder.weight", self._word)
        self._head = ops.pack_weight(decoder, dtype)
        self._head_bias = self._get("cls.predictions.bias").contiguous()
        self.relative_bias = self._relative_bias()
        del self._state

    def _get(self, name: str) -> torch.Tensor:
        try:
            return self._state[name].detach().float()
        except KeyError:
            raise UserError(f"the checkpoint has no {name}, which decoding needs") from None

    def _norm(self, prefix: str) -> _Norm:
        return _Norm(self._get(f"{prefix}.weight").contiguous(), self._get(f"{prefix}.bias").contiguous())

    def _linear(self, *prefixes: str, unbiased: str | None = None) -> _Linear:
        weight = torch.cat([self._get(f"{p}.weight") for p in prefixes])
        biases = [self._get(f"{p}.bias") for p in prefixes]
        # A key bias shifts a row of scores by a constant, which the softmax does not see.
        biases = [torch.zeros_like(b) if p == unbiased else b for p, b in zip(prefixes, biases, strict=True)]
        return _Linear(ops.pack_weight(weight, self.dtype), torch.cat(biases))

    def _layer(self, prefix: str) -> _Layer:
        query, key, value = (f"{prefix}.attention.self.{name}" for name in ("query", "key", "value"))
        if prefix.endswith(f".{self.config.num_hidden_layers - 1}"):
            projection = _Projection(None, self._linear(query), self._linear(key, value, unbiased=key))
        else:
            projection = _Projection(self._linear(query, key, value, unbiased=key), None, None)
        return _Layer(
            projection=projection,
            attention_output=self._linear(f"{prefix}.attention.output.dense"),
            attention_norm=self._norm(f"{prefix}.attention.output.LayerNorm"),
            intermediate=self._linear(f"{prefix}.intermediate.dense"),
            output=self._linear(f"{prefix}.output.dense"),
            output_norm=self._norm(f"{prefix}.output.LayerNorm"),
            activation=self.config.hidden_act,
        )

    def _relative_bias(self) -> torch.Tensor | None:
        """The bias of every distance, ``[heads, 2R + 1]``, from the buckets' biases."""
        if not self.config.rel_pos_bins:
            return None
        limit = self.config.max_position_embeddings
        buckets = relative_position_bucket(
            torch.arange(-limit, limit + 1), self.config.rel_pos_bins, self.config.max_rel_pos
        )
        return self._get("bert.rel_pos_bias.weight")[:, buckets].contiguous()

    def new_cache(self, *, slots: int, beams: int, source_capacity: int, steps: int) -> DecodeCache:
        """An empty cache for this model; arguments as for :class:`DecodeCache`."""
        return DecodeCache(
            len(self._layers),
            self.heads,
            self.head_dim,
            slots=slots,
            beams=beams,
            source_capacity=source_capacity,
            steps=steps,
            dtype=torch.float32 if self.dtype == "fp32" else torch.bfloat16,
        )

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        norm = self._embedding_norm
        x = ops.embed_layer_norm(
            ids,
            positions,
            types if self._type is not None else None,
            self._word,
            self._position,
            self._type,
            norm.weight,
            norm.bias,
            LAYER_NORM_EPS,
        )
        return x if self._project is None else self._project(x)

    def prefill(
        self,
        sources: Sequence[Sequence[int]],
        query_id: int,
        slots: torch.Tensor,
        cache: DecodeCache,
        *,
        keep_query: bool,
        causal_source: bool = False,
    ) -> torch.Tensor:
        """Runs sources, each followed by its first query row, and stores their keys and values.

        Args:
            sources: ids of each source, special tokens included.
            query_id: ``[MASK]``, or ``[SEP]`` with position shift.
            slots: int32 ``[n]``: slot of each source.
            cache: changed in place.
            keep_query: the query row's key and value become history entry 0 of beam 0 (position shift).
            causal_source: the source sees only what is before it (mode ``l2r``).

        Returns:
            fp32 ``[n, hidden]``: last hidden state of each query row.
        """
        lengths = [len(s) for s in sources]
        layout = (
            ops.SequenceLayout.causal([n + 1 for n in lengths])
            if causal_source
            else ops.SequenceLayout.seq2seq(lengths, [1] * len(lengths))
        )
        ids = torch.tensor([token for s in sources for token in (*s, query_id)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n + 1, dtype=torch.int32) for n in lengths])
        types = torch.full_like(ids, self.config.source_type_id)
        query_rows = layout.cu_seqlens[1:].long() - 1
        types[query_rows] = self.config.target_type_id
        counts = torch.tensor(lengths, dtype=torch.int32)
        bias = self.relative_bias
        at = None if bias is None else positions
        x = self._embed(ids, positions, types)
        for index, layer in enumerate(self._layers):
            last = index == len(self._layers) - 1
            if last:
                k, v = layer.projection.keys_values(x, self.heads)
            else:
                q, k, v = layer.projection(x, self.heads, cache.source_k.dtype)
            source_k, source_v = cache.source_k[index], cache.source_v[index]
            ops.store_source(k, v, layout.cu_seqlens, counts, slots, source_k, source_v, cache.source_lengths)
            if keep_query:
                cache.history_k[index, slots.long(), 0, 0] = k[query_rows].to(cache.history_k.dtype)
                cache.history_v[index, slots.long(), 0, 0] = v[query_rows].to(cache.history_v.dtype)
            if last:
                x = self._last_query(layer, x[query_rows], k[query_rows], v[query_rows], slots, cache)
            else:
                context, _ = ops.attention(q, k, v, layout, scale=self.scale, relative_bias=bias, position_ids=at)
                x = layer.after_attention(context.float(), x)
        return x

    def _last_query(
        self,
        layer: _Layer,
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        cache: DecodeCache,
    ) -> torch.Tensor:
        """The last layer for the first query rows alone: they see their source, just stored, and themselves."""
        rows = x.shape[0]
        scratch = torch.empty(cache.source_lengths.numel(), 1, 1, self.heads, self.head_dim, dtype=cache.source_k.dtype)
        context = ops.decode_attention(
            layer.projection.queries(x, self.heads),
            k,
            v,
            cache.source_k[-1],
            cache.source_v[-1],
            cache.source_lengths,
            scratch,
            torch.empty_like(scratch),
            torch.zeros(rows, 1, 1, dtype=torch.int32),
            slots,
            torch.zeros(rows, dtype=torch.int32),
            1,
            self.scale,
            self.relative_bias,
        )
        return layer.after_attention(context, x)

    def step(
        self,
        last_ids: torch.Tensor,
        mask_id: int | None,
        slots: torch.Tensor,
        steps: torch.Tensor,
        ancestry: torch.Tensor,
        cache: DecodeCache,
    ) -> torch.Tensor:
        """One decoding step of all live examples.

        Args:
            last_ids: int32 ``[E, B]``: last token of each hypothesis.
            mask_id: ``[MASK]``, or None to predict at the last token (position shift).
            slots, steps, ancestry: as for :func:`minilm_fast.ops.decode_attention`.
            cache: changed in place.

        Returns:
            fp32 ``[E * B, hidden]``: last hidden states of the rows that predict.
        """
        examples, beams = last_ids.shape
        rows = 1 if mask_id is None else 2
        ids = last_ids[:, :, None]
        if mask_id is not None:
            ids = torch.cat([ids, torch.full_like(ids, mask_id)], dim=2)
        start = (cache.source_lengths[slots.long()] + steps)[:, None, None]
        positions = (start + torch.arange(rows, dtype=torch.int32)).expand(examples, beams, rows)
        ids = ids.reshape(-1)
        types = torch.full_like(ids, self.config.target_type_id)
        x = self._embed(ids, positions.contiguous().view(-1), types)
        for index, layer in enumerate(self._layers):
            q, k, v = layer.projection(x, self.heads)
            context = ops.decode_attention(
                q,
                k,
                v,
                cache.source_k[index],
                cache.source_v[index],
                cache.source_lengths,
                cache.history_k[index],
                cache.history_v[index],
                ancestry,
                slots,
                steps,
                rows,
                self.scale,
                self.relative_bias,
            )
            if index == len(self._layers) - 1 and rows == 2:
                context, x = context[1::2], x[1::2]
            x = layer.after_attention(context, x)
        return x

    def predict(
        self,
        hidden: torch.Tensor,
        k: int,
        banned: torch.Tensor | None = None,
        suppress_id: int = -1,
        suppress: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` best next tokens of each row: see :func:`minilm_fast.ops.lm_head_topk`."""
        x = self._transform_norm(self._transform(hidden, self.config.hidden_act))
        return ops.lm_head_topk(
            x, self._head, self._head_bias, k, banned=banned, suppress_id=suppress_id, suppress=suppress
        )
