"""How many floating-point operations a packed batch needs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from minilm_fast.config import Config

Counts = tuple[int, int, int]


def seen_pairs(counts: Counts) -> int:
    """Pairs of a row and a token that it sees, in a sequence of so many source, target and pseudo tokens."""
    source, target, pseudo = counts
    rows = target + pseudo
    return source * source + rows * source + target * (target + 1) // 2 + pseudo * (pseudo + 1) // 2


def queried_pairs(counts: Counts) -> int:
    """Those of the rows that predict: the pseudo tokens, or the target tokens if there are none."""
    source, target, pseudo = counts
    rows = pseudo or target
    return rows * source + rows * (rows + 1) // 2


def encoder_flops(config: Config, tokens: int, pairs: int, layers: int) -> float:
    """Forward pass of whole layers: four projections, the feed-forward network, two products a pair."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return layers * (2.0 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 4.0 * hidden * pairs)


def first_token_flops(config: Config, lengths: np.ndarray) -> float:
    """Forward pass of sequences of which only the first token goes through the last layer whole.

    Args:
        lengths: int64 ``[sequences]``.
    """
    tokens, count, hidden = int(lengths.sum()), len(lengths), config.hidden_size
    whole = encoder_flops(config, tokens, int((lengths**2).sum()), config.num_hidden_layers - 1)
    # Of the others the last layer needs keys and values.
    return whole + encoder_flops(config, count, tokens, 1) + 2.0 * (tokens - count) * 2 * hidden * hidden


def sequence_to_sequence_flops(config: Config, samples: Iterable[Counts], predicted: int) -> float:
    """Forward and backward pass (twice the forward) of sequences, whose last layer only the queried rows go through.

    Args:
        samples: source, target and pseudo tokens of each.
        predicted: rows that are multiplied with the vocabulary.
    """
    tokens = queries = pairs = asked = 0
    for counts in samples:
        tokens += sum(counts)
        queries += counts[2] or counts[1]
        pairs += seen_pairs(counts)
        asked += queried_pairs(counts)
    hidden = config.hidden_size
    forward = encoder_flops(config, tokens, pairs, config.num_hidden_layers - 1)
    forward += encoder_flops(config, queries, asked, 1) + 2.0 * (tokens - queries) * 2 * hidden * hidden
    forward += 2.0 * predicted * (hidden * hidden + hidden * config.vocab_size)
    return 3 * forward
