"""The trainable Transformer encoder of the BERT family, over packed batches.

Parameter names are those of Hugging Face's ``BertForMaskedLM`` below ``bert.``. A batch is ``[tokens, ...]`` without
padding; a :class:`~minilm_fast.ops.layout.SequenceLayout` says where the sequences are and gives the attention mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilm_fast import ops
from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.errors import UserError
from minilm_fast.ops.dropout import draw_seeds
from minilm_fast.ops.layout import SequenceLayout

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


# The bias of each distance [heads, 2R + 1], and the positions [tokens].
RelativeBias = tuple[Tensor, Tensor]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a configuration names in ``hidden_act``.

    Raises:
        UserError: the name is not known.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} is not one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def lm_head_activation(config: Config) -> str:
    """The activation of the masked-LM head: ``hidden_act``, for RoBERTa, XLM-R and ELECTRA always the exact GELU."""
    return "gelu" if config.model_type in (*ROBERTA_TYPES, "electra") else config.hidden_act


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


def initialise(module: nn.Module, std: float) -> None:
    """BERT's initialisation of linear layers, embeddings and LayerNorms."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            nn.init.zeros_(part.weight.data[part.padding_idx])
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


class Embeddings(nn.Module):
    """Word, position and (unless ``type_vocab_size`` is 0) token-type embeddings, added and normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.embedding_size
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
        self.probability = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)

    def _project(self, hidden: Tensor, layers: list[nn.Linear]) -> Tensor:
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(hidden, weight, bias).view(hidden.shape[0], len(layers), self.heads, -1)

    def forward(
        self, hidden: Tensor, queries: Tensor | None, layout: SequenceLayout, bias: RelativeBias | None, seed: Tensor
    ) -> Tensor:
        """Context of the rows ``queries [rows, hidden]``, or of all rows of ``hidden [tokens, hidden]``."""
        asked = None if queries is None else self.query(queries).unflatten(1, (self.heads, -1))
        own = [self.query, self.key, self.value] if queries is None else [self.key, self.value]
        table, positions = bias or (None, None)
        context, _ = ops.projected_attention(
            self._project(hidden, own),
            layout,
            queries=asked,
            relative_bias=table,
            position_ids=positions,
            dropout=self.probability if self.training else 0.0,
            seed=seed,
        )
        return context.flatten(1)


class ResidualOutput(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``."""

    def __init__(self, input_size: int, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.probability = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor, seed: Tensor) -> Tensor:
        norm = self.LayerNorm
        return ops.dropout_add_layer_norm(
            F.linear(x, self.dense.weight),
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout=self.probability if self.training else 0.0,
            seed=seed,
            x_bias=self.dense.bias,
        )


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)


class Intermediate(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = None if config.hidden_act == "gelu" else activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return activated(self.dense, self.activation, hidden)


def activated(dense: nn.Linear, function: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """``function(dense(x))``; None is the exact GELU, which takes the bias along."""
    if function is None:
        return ops.bias_gelu(F.linear(x, dense.weight), dense.bias)
    return function(dense(x))


class Layer(nn.Module):
    """One post-norm Transformer layer."""

    SEEDS = 3

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, layout: SequenceLayout, bias: RelativeBias | None, seeds: Tensor) -> Tensor:
        """``[tokens, hidden]`` to ``[layout.total_queries, hidden]``; dropout follows ``seeds`` int64 ``[3]``."""
        queries = None if layout.cu_queries is None else hidden[layout.query_index()]
        context = self.attention.self(hidden, queries, layout, bias, seeds[:1])
        attended = self.attention.output(context, hidden if queries is None else queries, seeds[1:2])
        return self.output(self.intermediate(attended), attended, seeds[2:3])


class LayerStack(nn.Module):
    """The layers, under the name ``layer`` that checkpoints use."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Encoder(nn.Module):
    """Embeddings and layers.

    Attributes:
        gradient_checkpointing: keep only the layers' inputs for the backward pass and compute the rest again.
        embeddings_project: from the width of the embeddings to that of the layers, where they differ (ELECTRA,
            arXiv:2003.10555, section 3.1).

    Raises:
        UserError: the configuration asks for something that this network does not have.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.embeddings_project: nn.Linear | None = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = LayerStack(config)
        self.rel_pos_bias: nn.Linear | None = None
        if config.rel_pos_bins > 0:
            self.rel_pos_bias = nn.Linear(config.rel_pos_bins, config.num_attention_heads, bias=False)

    def _relative_bias(self, position_ids: Tensor) -> RelativeBias | None:
        if self.rel_pos_bias is None:
            return None
        limit = self.config.max_rel_pos
        distance = torch.arange(-limit, limit + 1, device=position_ids.device)
        bucket = relative_position_bucket(distance, self.config.rel_pos_bins, limit)
        return self.rel_pos_bias.weight[:, bucket].float(), position_ids

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, layout: SequenceLayout, token_type_ids: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The output of the embeddings, then that of each layer.

        Args:
            input_ids, position_ids: int32 ``[tokens]``.
            layout: of the batch; if only some of its rows ask, the last layer is computed for them only.
            token_type_ids: int32 ``[tokens]``; by default the configuration's for source and target.

        Yields:
            ``[tokens, hidden]``, the last one ``[layout.total_queries, hidden]``; under autocast in its dtype,
            otherwise in that of the weights.
        """
        if token_type_ids is None:
            token_type_ids = torch.where(layout.in_source(), self.config.source_type_id, self.config.target_type_id)
        hidden = self.embeddings(input_ids, position_ids, token_type_ids)
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        yield hidden
        layers = list(self.encoder.layer)
        bias = self._relative_bias(position_ids)
        seeds = draw_seeds(len(layers) * Layer.SEEDS) if self.training else torch.zeros(0, dtype=torch.int64)
        everything = layout.without_queries()
        for i, layer in enumerate(layers):
            rows = layout if i == len(layers) - 1 else everything
            own = seeds[i * Layer.SEEDS : (i + 1) * Layer.SEEDS]
            if self.gradient_checkpointing and self.training:
                # Dropout follows the seeds, so no generator has to be put back for the second computation.
                hidden = checkpoint(layer, hidden, rows, bias, own, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, rows, bias, own)
            yield hidden

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, layout: SequenceLayout, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The last of :meth:`hidden_states`."""
        *_, last = self.hidden_states(input_ids, position_ids, layout, token_type_ids)
        return last
