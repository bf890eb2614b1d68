"""Floating-point operations that decoding and training need, counted from the shapes.

A multiply-add counts as two operations. Only matrix products are counted: normalisation, softmax and selection are
below one per cent at the shapes in question. What is counted is the work that the task needs when keys and values are
kept, each real position is computed once, and only rows that are read go through the last layer. An implementation
that does more (pad tokens, projections repeated in every step) gets no credit for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shapes import DecodeWorkload, ModelShape


@dataclass(frozen=True)
class Work:
    """Operations of one sequence, by stage and kind. ``step_*`` is the sum over all steps and hypotheses."""

    source_linear: float
    source_attention: float
    step_linear: float
    step_attention: float
    vocabulary: float

    @property
    def linear(self) -> float:
        """Products with weights."""
        return self.source_linear + self.step_linear + self.vocabulary

    @property
    def attention(self) -> float:
        """Products of activations with activations."""
        return self.source_attention + self.step_attention

    @property
    def total(self) -> float:
        return self.linear + self.attention


def _attention(queries: float, keys: float, hidden: int) -> float:
    """Scores and weighted sum of ``queries`` rows over ``keys`` rows, all heads."""
    return 4.0 * queries * keys * hidden


def _history(steps: int) -> float:
    """Rows of history summed over the steps: 0 + 1 + ... + (steps - 1)."""
    return steps * (steps - 1) / 2.0


def masked_query_decoder(shape: ModelShape, load: DecodeWorkload) -> Work:
    """Work of the UniLM decoder, which appends ``[MASK]`` to the last token in every step.

    Step 0 has the one ``[MASK]`` row that all beams share and belongs to the source's stage; every later step has, for
    each hypothesis, its last token and the ``[MASK]``. In the last layer the token's row gives keys and values only.
    """
    d, f, s = shape.hidden, shape.intermediate, load.source
    row = 2.0 * (4 * d * d + 2 * d * f)
    key_value = 4.0 * d * d
    full, rounds = shape.layers - 1, load.steps - 1
    # Round i (from 0) attends to the source, i rows of history and itself; the mask row to one row more.
    keys = rounds * s + _history(rounds)
    token_attention = full * _attention(1, keys + rounds, d)
    mask_attention = shape.layers * _attention(1, keys + 2 * rounds, d)
    return Work(
        source_linear=full * (s + 1) * row + s * key_value + row,
        source_attention=full * _attention(s, s, d) + shape.layers * _attention(1, s + 1, d),
        step_linear=load.beam * rounds * (full * row + key_value + shape.layers * row),
        step_attention=load.beam * (token_attention + mask_attention),
        vocabulary=2.0 * (d * d + d * shape.vocab) * (1 + load.beam * rounds),
    )


def encoder_decoder(shape: ModelShape, load: DecodeWorkload) -> Work:
    """Work of the BART cousin: as many encoder as decoder layers, cross-attention, tied output."""
    d, f, s = shape.hidden, shape.intermediate, load.source
    rows = load.beam * load.steps
    attended = _history(load.steps) + load.steps + load.steps * s
    return Work(
        source_linear=shape.layers * s * (2.0 * (4 * d * d + 2 * d * f) + 4.0 * d * d),
        source_attention=shape.layers * _attention(s, s, d),
        step_linear=shape.layers * rows * 2.0 * (6 * d * d + 2 * d * f),
        step_attention=shape.layers * load.beam * _attention(1, attended, d),
        vocabulary=rows * 2.0 * d * shape.vocab,
    )


def pseudo_masked_training(shape: ModelShape, source: int, target: int) -> tuple[float, float]:
    """Work of one training sequence, forward and backward, with as many pseudo tokens as target tokens.

    The last layer beyond its keys and values, and the vocabulary, are needed for the pseudo rows only. Backward needs
    twice the products of forward.

    Returns:
        operations of the products with weights, and of attention (scores and weighted sum of the visible pairs).
    """
    d, f = shape.hidden, shape.intermediate
    tokens = source + 2 * target
    row = 2.0 * (4 * d * d + 2 * d * f)
    key_value = 4.0 * d * d
    head = 2.0 * (d * d + d * shape.vocab)
    linear = (shape.layers - 1) * tokens * row + tokens * key_value + target * (row - key_value + head)
    earlier = target * (target - 1) / 2
    pseudo = target * source + earlier + target
    pairs = source * source + target * source + earlier + target + pseudo
    attention = (shape.layers - 1) * _attention(1, pairs, d) + _attention(1, pseudo, d)
    return 3 * linear, 3 * attention


def encoder(shape: ModelShape, length: int) -> float:
    """Work of encoding one sequence of ``length`` tokens: all layers, no head."""
    d, f = shape.hidden, shape.intermediate
    row = 2.0 * (4 * d * d + 2 * d * f)
    return shape.layers * (length * row + _attention(length, length, d))
