"""Training samples of the pseudo-masked way (v2): which tokens are masked, and in which order chance is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """Token ids of one example, without special tokens."""

    source_ids: Sequence[int]
    target_ids: Sequence[int]


@dataclass(frozen=True)
class SpecialIds:
    """Ids that frame and mask a sample."""

    cls: int
    sep: int
    mask: int
    vocab_size: int


@dataclass(frozen=True)
class Masking:
    """Chances of the masking.

    A token that is chosen becomes itself with ``keep_prob``, a random one with ``random_prob``, ``[MASK]`` otherwise.
    Every pseudo token is chosen; a target token takes over its pseudo token with ``target_mask_prob``; a source
    token is chosen with ``source_mask_prob``.
    """

    random_prob: float = 0.1
    keep_prob: float = 0.1
    source_mask_prob: float = -1.0
    target_mask_prob: float = 0.5


@dataclass(frozen=True)
class Sample:
    """One sequence to train on; ``target``, ``pseudo`` and ``labels`` are equally long."""

    source: list[int]
    target: list[int]
    pseudo: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Number of tokens of the packed sequence."""
        return len(self.source) + 2 * len(self.labels)


def framed_lengths(feature: Feature, max_source: int, max_target: int) -> tuple[int, int]:
    """Lengths of source (with ``[CLS]`` and ``[SEP]``) and target (with ``[SEP]``) after truncation."""
    return min(len(feature.source_ids) + 2, max_source), min(len(feature.target_ids) + 1, max_target)


class PseudoMasker:
    """Turns features into samples; draws from ``rng`` exactly as the original data set does.

    Args:
        max_source: longest source, ``[CLS]`` and ``[SEP]`` included.
        max_target: longest target, ``[SEP]`` included.
    """

    def __init__(
        self, special: SpecialIds, masking: Masking, max_source: int, max_target: int, rng: random.Random
    ) -> None:
        self.special = special
        self.masking = masking
        self.max_source = max_source
        self.max_target = max_target
        self.rng = rng

    def _masked(self, token: int) -> int:
        chance = self.rng.random()
        if chance < self.masking.keep_prob:
            return token
        if chance < self.masking.keep_prob + self.masking.random_prob:
            return self.rng.randint(0, self.special.vocab_size - 1)
        return self.special.mask

    def _mask_source(self, source: list[int]) -> list[int]:
        kept = (self.special.cls, self.special.sep)
        return [
            self._masked(token) if token not in kept and self.rng.random() < self.masking.source_mask_prob else token
            for token in source
        ]

    def __call__(self, feature: Feature) -> Sample:
        sep = self.special.sep
        source = [self.special.cls, *feature.source_ids[: self.max_source - 2], sep]
        labels = [*feature.target_ids[: self.max_target - 1], sep]
        if self.masking.source_mask_prob > 0:
            source = self._mask_source(source)
        target, pseudo = [], []
        for token in labels:
            masked = self._masked(token)
            pseudo.append(masked)
            target.append(masked if self.rng.random() < self.masking.target_mask_prob else token)
        return Sample(source, target, pseudo, labels)
