"""The trainable Transformer encoder of the BERT family.

Parameter names are those of Hugging Face's ``BertForMaskedLM`` below ``bert.``. A batch is ``[batch, length]``: every
sequence holds its source, target and pseudo tokens one after the other, then padding; the three counts
(``segments``) give the attention mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.errors import UserError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a configuration names in ``hidden_act``.

    Raises:
        UserError: the name is not known.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} is not one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def segment_mask(segments: Tensor, length: int) -> Tensor:
    """Which key each query may see, from the counts of source, target and pseudo tokens.

    Source rows see the source. Target row ``j`` sees the source and target ``0..j``. Pseudo row ``j`` sees the
    source, target ``0..j-1`` and itself (pseudo-masking, UniLMv2, arXiv:2002.12804, section 2). Padding rows see the
    source and themselves, so that no row is empty.

    Args:
        segments: int64 ``[batch, 3]``, the numbers of source, target and pseudo tokens, in that order in memory.
        length: the padded length.

    Returns:
        bool ``[batch, length, length]``, rows are queries, true where attention is allowed.
    """
    position = torch.arange(length, device=segments.device)
    source, target, _ = (count.view(-1, 1) for count in segments.unbind(1))
    is_target = (position >= source) & (position < source + target)
    row = position - source
    last_target_seen = torch.where(is_target, row, row - target - 1)
    is_pseudo = (position >= source + target) & (position < segments.sum(1, keepdim=True))
    seen_target = is_target[:, None, :] & (row[:, None, :] <= last_target_seen[:, :, None])
    seen_target &= (is_target | is_pseudo)[:, :, None]
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (position < source)[:, None, :] | seen_target | itself


def relative_position_bucket(distance: Tensor, bins: int, max_distance: int) -> Tensor:
    """Bucket of ``key position - query position`` (T5, arXiv:1910.10683, section 2.1, bidirectional).

    Half of the bins are for keys after the query. In each half the first half of the bins holds one distance each,
    the others grow logarithmically up to ``max_distance``.

    Args:
        distance: int64, any shape.

    Returns:
        int64 of the same shape, in ``[0, bins)``.
    """
    half = bins // 2
    exact = half // 2
    magnitude = distance.abs()
    ratio = magnitude.clamp(min=1).float() / exact
    log_bin = exact + (ratio.log() / math.log(max_distance / exact) * (half - exact)).long()
    inside = torch.where(magnitude < exact, magnitude, log_bin.clamp(max=half - 1))
    return inside + (distance > 0) * half


class Embeddings(nn.Module):
    """Word, position and (unless ``type_vocab_size`` is 0) token-type embeddings, added and normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings: nn.Embedding | None = None
        if config.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if self.token_type_embeddings is not None:
            hidden = hidden + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(hidden))


class SelfAttention(nn.Module):
    """Multi-head attention; the three projections of the full rows are one product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _project(self, hidden: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, ...]:
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(hidden, weight, bias).chunk(len(layers), dim=-1)

    def forward(self, hidden: Tensor, bias: Tensor, queries: Tensor | None) -> Tensor:
        if queries is None:
            query, key, value = self._project(hidden, [self.query, self.key, self.value])
        else:
            key, value = self._project(hidden, [self.key, self.value])
            query = self.query(queries)
        scale = (hidden.shape[-1] // self.heads) ** -0.5
        # Two products and a softmax: the backward of PyTorch's fused CPU attention takes twice as long.
        scores = (self._split(query * scale) @ self._split(key).transpose(2, 3)).add_(bias)
        probabilities = self.dropout(scores.softmax(-1).to(query.dtype))
        context = probabilities @ self._split(value)
        return context.transpose(1, 2).flatten(2)


class ResidualOutput(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``."""

    def __init__(self, input_size: int, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, bias: Tensor, queries: Tensor | None) -> Tensor:
        context = self.self(hidden, bias, queries)
        return self.output(context, hidden if queries is None else queries)


class Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class Layer(nn.Module):
    """One post-norm Transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, bias: Tensor, queries: Tensor | None = None) -> Tensor:
        """Rows ``queries [batch, rows, hidden]`` only if given, otherwise all rows of ``hidden``."""
        attended = self.attention(hidden, bias, queries)
        return self.output(self.intermediate(attended), attended)


class LayerStack(nn.Module):
    """The layers, under the name ``layer`` that checkpoints use."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Encoder(nn.Module):
    """Embeddings and layers.

    Raises:
        UserError: the configuration asks for something that this network does not have.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.embedding_size != config.hidden_size:
            raise UserError(
                f"training needs embedding_size = hidden_size, the configuration has {config.embedding_size} and "
                f"{config.hidden_size}"
            )
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.rel_pos_bias: nn.Linear | None = None
        if config.rel_pos_bins > 0:
            self.rel_pos_bias = nn.Linear(config.rel_pos_bins, config.num_attention_heads, bias=False)

    def _token_types(self, segments: Tensor, length: int) -> Tensor:
        is_source = torch.arange(length, device=segments.device) < segments[:, :1]
        return torch.where(is_source, self.config.source_type_id, self.config.target_type_id)

    def _attention_bias(self, position_ids: Tensor, segments: Tensor, dtype: torch.dtype) -> Tensor:
        allowed = segment_mask(segments, position_ids.shape[1])[:, None]
        if self.rel_pos_bias is None:
            return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
        distance = position_ids[:, None, :] - position_ids[:, :, None]
        bucket = relative_position_bucket(distance, self.config.rel_pos_bins, self.config.max_rel_pos)
        bias = self.rel_pos_bias.weight.t()[bucket].permute(0, 3, 1, 2)
        return bias.masked_fill(~allowed, float("-inf")).to(dtype)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, segments: Tensor, predicted: Tensor | None = None
    ) -> Tensor:
        """Last hidden states.

        Args:
            input_ids, position_ids: int64 ``[batch, length]``.
            segments: int64 ``[batch, 3]``, see :func:`segment_mask`.
            predicted: int64 ``[batch, rows]``; if given, only these rows go through the last layer beyond their keys
                and values.

        Returns:
            ``[batch, rows or length, hidden]``; under autocast in its dtype, otherwise in that of the weights.
        """
        token_types = self._token_types(segments, input_ids.shape[1])
        hidden = self.embeddings(input_ids, position_ids, token_types)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        bias = self._attention_bias(position_ids, segments, hidden.dtype)
        *first, last = self.encoder.layer
        for layer in first:
            hidden = layer(hidden, bias)
        if predicted is None:
            return last(hidden, bias)
        rows = predicted[:, :, None]
        queries = hidden.gather(1, rows.expand(-1, -1, hidden.shape[2]))
        key_rows = rows[:, None].expand(-1, bias.shape[1], -1, bias.shape[3])
        return last(hidden, bias.gather(2, key_rows), queries)
