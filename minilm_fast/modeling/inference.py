"""The encoder with packed weights for decoding: prefill of sources, then one step at a time.

Built from a configuration and a state dict with canonical names; independent of the trainable network. Biases and
norms stay fp32; ``dtype`` is the format of the linear layers' weights. Unless it is fp32, sources attend in bf16 (with
fp16 weights in fp16) and keys and values are cached so, which halves what a step reads. The activations between
operators are fp32 on a CPU and of the cache's dtype on a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.modeling.encoder import lm_head_activation
from minilm_fast.modeling.few_rows import FewRows
from minilm_fast.modeling.last_layer import LastLayer
from minilm_fast.modeling.packed_encoder import PackedEncoder, WeightReader, attention_dtype
from minilm_fast.modeling.source_batch import SourceBatch, pack

# The original's decoder normalises with 1e-5 whatever the configuration says.
LAYER_NORM_EPS = 1e-5
CAPACITY_MULTIPLE = 16


class DecodeCache:
    """Keys and values of the examples being decoded: one slot an example, all layers.

    Args:
        layers, heads, head_dim: shape of the model.
        slots: examples held at the same time.
        beams: hypotheses per example.
        source_capacity: longest source in tokens; rounded up to a multiple of 16.
        steps: longest history.
        dtype: fp32, bf16 or fp16.
        device: where it is.
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
        device: torch.device | str = "cpu",
    ) -> None:
        capacity = -(-max(source_capacity, 1) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.source_k = torch.empty(layers, slots, heads, head_dim, capacity, dtype=dtype, device=device)
        self.source_v = torch.empty(layers, slots, heads, capacity, head_dim, dtype=dtype, device=device)
        self.history_k = torch.empty(layers, slots, steps, beams, heads, head_dim, dtype=dtype, device=device)
        self.history_v = torch.empty_like(self.history_k)
        self.source_lengths = torch.zeros(slots, dtype=torch.int32, device=device)


class InferenceEngine:
    """Forward passes of decoding over packed weights.

    Args:
        config: shape of the model.
        state: fp32 tensors by canonical name.
        dtype: format of the linear layers' weights: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"``, on a GPU ``"fp16"``.
        device: where it computes.

    Raises:
        UserError: a weight that decoding needs is missing.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, torch.Tensor],
        dtype: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.heads = config.num_attention_heads
        reader = WeightReader(
            config,
            state,
            dtype,
            device=self.device,
            eps=LAYER_NORM_EPS,
            purpose="decoding",
        )
        last = config.num_hidden_layers - 1
        self.head_dim = reader.head_size
        self._encoder = PackedEncoder(reader, last)
        self.scale = self._encoder.scale
        self._transform = reader.linear("cls.predictions.transform.dense")
        self._last = LastLayer(reader, last, whole=self._transform.weight.backend == "cuda")
        self._activation = lm_head_activation(config)
        self._transform_norm = reader.norm("cls.predictions.transform")
        decoder = state.get("cls.predictions.decoder.weight", self._encoder.embed.word)
        self._head = ops.pack_weight(decoder.to(self.device), dtype)
        self._head_bias = reader.get("cls.predictions.bias")
        self.relative_bias = self._encoder.relative_bias
        # What a search keeps for the next one: memory, and graphs that read these weights.
        self.kept: dict[Hashable, Any] = {}
        self._few_rows = self._make_few_rows()

    def _make_few_rows(self) -> FewRows | None:
        """A step in few launches, if the weights fit its kernels."""
        if self._last.projection is None:
            return None
        encoder, head = self._encoder, (self._transform, self._transform_norm, self._activation)
        few = FewRows(encoder.embed, encoder.layers, self._last, *head, self.heads)
        return few if few.fits() else None

    def new_cache(self, *, slots: int, beams: int, source_capacity: int, steps: int) -> DecodeCache:
        """An empty cache for this model; arguments as for :class:`DecodeCache`."""
        return DecodeCache(
            self.config.num_hidden_layers,
            self.heads,
            self.head_dim,
            slots=slots,
            beams=beams,
            source_capacity=source_capacity,
            steps=steps,
            dtype=attention_dtype(self.dtype),
            device=self.device,
        )

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
            ``[n, hidden]``: last hidden state of each query row.
        """
        numbers = self.pack(sources, query_id, causal_source=causal_source)
        tokens, longest = sum(map(len, sources)) + len(sources), max(map(len, sources), default=0) + 1
        batch = SourceBatch(numbers.to(self.device), len(sources), tokens, longest, idle=False)
        return self.prefill_packed(batch, slots, cache, keep_query=keep_query)

    def pack(
        self,
        sources: Sequence[Sequence[int]],
        query_id: int,
        *,
        causal_source: bool = False,
        tokens: int | None = None,
    ) -> torch.Tensor:
        """The numbers of a :class:`SourceBatch` for :meth:`prefill_packed`, on the CPU.

        Args:
            sources, query_id, causal_source: as for :meth:`prefill`.
            tokens: if given, an idle sequence, which may be empty, makes up for what is missing.
        """
        types = (self.config.source_type_id, self.config.target_type_id)
        return pack(sources, query_id, types=types, causal=causal_source, tokens=tokens)

    def prefill_packed(
        self, batch: SourceBatch, slots: torch.Tensor, cache: DecodeCache, *, keep_query: bool
    ) -> torch.Tensor:
        """:meth:`prefill` of sources that lie on the device. It does not wait for it, and can be captured."""
        layout, query_rows = batch.layout, batch.query_rows()
        kept_rows = query_rows if keep_query else None
        x = self._encoder.embed(batch.ids, batch.positions, batch.types)
        for index, layer in enumerate(self._encoder.layers):
            x, k, v = self._encoder.run_layer(layer, x, batch.positions, layout)
            self._store(index, k, v, batch, slots, cache, kept_rows)
        k, v = self._last.keys_values(x)
        self._store(self.config.num_hidden_layers - 1, k, v, batch, slots, cache, kept_rows)
        return self._last_query(x[query_rows], k[query_rows], v[query_rows], slots, cache)

    def _store(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: SourceBatch,
        slots: torch.Tensor,
        cache: DecodeCache,
        query_rows: torch.Tensor | None,
    ) -> None:
        source_k, source_v = cache.source_k[layer], cache.source_v[layer]
        starts = batch.layout.cu_seqlens[: batch.counts.numel() + 1]
        ops.store_source(k, v, starts, batch.counts, slots, source_k, source_v, cache.source_lengths)
        if query_rows is not None:
            cache.history_k[layer, slots.long(), 0, 0] = k[query_rows].to(cache.history_k.dtype)
            cache.history_v[layer, slots.long(), 0, 0] = v[query_rows].to(cache.history_v.dtype)

    def _last_query(
        self,
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        cache: DecodeCache,
    ) -> torch.Tensor:
        """The last layer for the first query rows alone: they see their source, just stored, and themselves."""
        rows = x.shape[0]
        scratch = cache.source_k.new_empty(cache.source_lengths.numel(), 1, 1, self.heads, self.head_dim)
        context = ops.decode_attention(
            self._last.queries(x),
            k,
            v,
            cache.source_k[-1],
            cache.source_v[-1],
            cache.source_lengths,
            scratch,
            torch.empty_like(scratch),
            slots.new_zeros(rows, 1, 1),
            slots,
            slots.new_zeros(rows),
            1,
            self.scale,
            self.relative_bias,
        )
        return self._last.block(context, x)

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
            ``[E * B, hidden]``: last hidden states of the rows that predict.
        """
        examples, beams = last_ids.shape
        rows = 1 if mask_id is None else 2
        few = self._few_rows
        if few is not None and few.takes(examples * beams * rows):
            type_id = self.config.target_type_id
            x = few.embed.few_rows(last_ids, mask_id, slots, steps, cache.source_lengths, type_id)
            return few.layers(
                *(x, rows),
                lambda layer, q, k, v, early: self._decode_attention(
                    layer, q, k, v, slots, steps, ancestry, rows, cache, early
                ),
            )
        ids = last_ids[:, :, None]
        if mask_id is not None:
            ids = torch.cat([ids, torch.full_like(ids, mask_id)], dim=2)
        start = (cache.source_lengths[slots.long()] + steps)[:, None, None]
        positions = (start + torch.arange(rows, dtype=torch.int32, device=self.device)).expand(examples, beams, rows)
        ids = ids.reshape(-1)
        types = torch.full_like(ids, self.config.target_type_id)
        x = self._encoder.embed(ids, positions.contiguous().view(-1), types)
        for index, layer in enumerate(self._encoder.layers):
            q, k, v = layer.projection(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
            x = layer.block(self._decode_attention(index, q, k, v, slots, steps, ancestry, rows, cache), x)
        k, v = self._last.keys_values(x)
        q = self._last.queries(x)
        last = self.config.num_hidden_layers - 1
        context = self._decode_attention(last, q, k, v, slots, steps, ancestry, rows, cache)
        return self._last.block(context[rows - 1 :: rows], x[rows - 1 :: rows])

    def _decode_attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        steps: torch.Tensor,
        ancestry: torch.Tensor,
        rows: int,
        cache: DecodeCache,
        early: bool = False,
    ) -> torch.Tensor:
        return ops.decode_attention(
            q,
            k,
            v,
            cache.source_k[layer],
            cache.source_v[layer],
            cache.source_lengths,
            cache.history_k[layer],
            cache.history_v[layer],
            ancestry,
            slots,
            steps,
            rows,
            self.scale,
            self.relative_bias,
            early=early,
        )

    def predict(
        self,
        hidden: torch.Tensor,
        k: int,
        banned: torch.Tensor | None = None,
        suppress_id: int = -1,
        suppress: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` best next tokens of each row: see :func:`minilm_fast.ops.lm_head_topk`."""
        few = self._few_rows
        if few is not None and few.takes(hidden.shape[0]):
            x = few.transform(hidden)
        else:
            x = self._transform_norm(self._transform(hidden, self._activation))
        return ops.lm_head_topk(
            x, self._head, self._head_bias, k, banned=banned, suppress_id=suppress_id, suppress=suppress
        )
