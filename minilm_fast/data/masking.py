"""From features to training samples: truncation, and which tokens are masked, in the three ways of s2s-ft.

Every way draws from Python's ``random`` exactly as the original's data set class does, so a run that starts from
the same seed sees the same samples.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from minilm_fast.errors import UserError


@dataclass(frozen=True, slots=True)
class Feature:
    """Token ids of one example, without special tokens, not truncated."""

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
    ``source_mask_prob`` is the chance that a source token is chosen. ``target_mask_prob`` is, for a target token, in
    the ways v0 the chance to be chosen, v1 the share that is chosen, v2 the chance to take over its pseudo token.
    """

    random_prob: float = 0.1
    keep_prob: float = 0.1
    source_mask_prob: float = -1.0
    target_mask_prob: float = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: source, target and pseudo tokens in this order.

    ``predicted`` are offsets into the part that is queried, which is ``pseudo`` if there is any and ``target``
    otherwise; ``labels`` are the ids to be predicted there, as many.
    """

    source: list[int]
    target: list[int]
    pseudo: list[int]
    predicted: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Number of tokens of the packed sequence."""
        return len(self.source) + len(self.target) + len(self.pseudo)


def _token_masker(special: SpecialIds, masking: Masking, rng: random.Random) -> Callable[[int], int]:
    chance, getrandbits = rng.random, rng.getrandbits
    keep, replace = masking.keep_prob, masking.keep_prob + masking.random_prob
    mask, vocab_size, bits = special.mask, special.vocab_size, special.vocab_size.bit_length()

    def masked(token: int) -> int:
        drawn = chance()
        if drawn < keep:
            return token
        if drawn >= replace:
            return mask
        # What randint(0, vocab_size - 1) draws, at a quarter of its time.
        index = getrandbits(bits)
        while index >= vocab_size:
            index = getrandbits(bits)
        return index

    return masked


class Masker(ABC):
    """Turns features into samples; one subclass a way.

    Args:
        max_source: longest source, its special tokens included.
        max_target: longest target, its special token included.
        rng: drawn from at every call; restoring its state restores the masker's.

    Raises:
        UserError: a limit leaves no room for the special tokens.
    """

    source_specials: ClassVar[int] = 2

    def __init__(
        self, special: SpecialIds, masking: Masking, max_source: int, max_target: int, rng: random.Random
    ) -> None:
        if max_source < self.source_specials:
            raise UserError(f"--max_source_seq_length must be at least {self.source_specials}, not {max_source}")
        if max_target < 1:
            raise UserError(f"--max_target_seq_length must be at least 1, not {max_target}")
        self.special = special
        self.masking = masking
        self.max_source = max_source
        self.max_target = max_target
        self.rng = rng
        self._masked = _token_masker(special, masking, rng)

    @abstractmethod
    def __call__(self, feature: Feature) -> Sample:
        """A fresh sample: what is masked differs from call to call."""

    def segments(self, source: Any, target: Any) -> tuple[Any, Any, Any]:
        """Numbers of source, target and pseudo tokens of samples.

        Args:
            source, target: lengths of features, an int or an integer numpy array each.
        """
        return _cut(source + self.source_specials, self.max_source), _cut(target + 1, self.max_target), target * 0

    def predictions(self, target: Any) -> Any:
        """Numbers of labels of samples whose features have targets of these lengths (int or numpy array)."""
        return _cut(target + 1, self.max_target)

    def truncated(self, source: Any, target: Any) -> tuple[int, int]:
        """How many of the features with these lengths (integer numpy arrays) lose source and target tokens."""
        return (
            int((source + self.source_specials > self.max_source).sum()),
            int((target + 1 > self.max_target).sum()),
        )

    def _source(self, feature: Feature) -> list[int]:
        special = self.special
        source = [special.cls, *feature.source_ids[: self.max_source - self.source_specials]]
        if self.source_specials == 2:
            source.append(special.sep)
        share = self.masking.source_mask_prob
        if share > 0:
            chance, masked, kept = self.rng.random, self._masked, (special.cls, special.sep)
            source = [masked(token) if token not in kept and chance() < share else token for token in source]
        return source

    def _target(self, feature: Feature) -> list[int]:
        return [*feature.target_ids[: self.max_target - 1], self.special.sep]


def _cut(length: Any, longest: int) -> Any:
    return min(length, longest) if isinstance(length, int) else length.clip(max=longest)


class ShiftMasker(Masker):
    """Way v0, position shift: the target is ``[SEP]`` and the tokens, each row predicts the token after its own.

    The source ends without ``[SEP]``. The last label is ``[SEP]`` even where the target was cut.
    """

    source_specials = 1

    def __call__(self, feature: Feature) -> Sample:
        source = self._source(feature)
        labels = self._target(feature)
        target = [self.special.sep, *labels[:-1]]
        chance, masked, share = self.rng.random, self._masked, self.masking.target_mask_prob
        chance()  # the leading [SEP] is never masked, but its chance is drawn
        for i in range(1, len(target)):
            if chance() < share:
                target[i] = masked(target[i])
        return Sample(source, target, [], list(range(len(labels))), labels)


class TargetMasker(Masker):
    """Way v1, masked language model in the target: a share of its tokens is masked and predicted in place.

    At least one token is, and at most ``num_max_mask_token`` are; 0 sets no limit (with 0, its default, the original
    stops at a failed assertion). ``predicted`` is in the order of the draw.
    """

    def __init__(
        self,
        special: SpecialIds,
        masking: Masking,
        max_source: int,
        max_target: int,
        rng: random.Random,
        num_max_mask_token: int = 0,
    ) -> None:
        super().__init__(special, masking, max_source, max_target, rng)
        if num_max_mask_token < 0:
            raise UserError(f"--num_max_mask_token must not be negative, not {num_max_mask_token}")
        self.most = num_max_mask_token or max_target

    def __call__(self, feature: Feature) -> Sample:
        source = self._source(feature)
        target = self._target(feature)
        positions = list(range(len(target)))
        self.rng.shuffle(positions)
        predicted = positions[: self.predictions(len(feature.target_ids))]
        labels = [target[i] for i in predicted]
        for i in predicted:
            target[i] = self._masked(target[i])
        return Sample(source, target, [], predicted, labels)

    def predictions(self, target: Any) -> Any:
        chosen = self.masking.target_mask_prob * super().predictions(target)
        if isinstance(target, int):
            return max(1, min(self.most, int(chosen)))
        return chosen.astype(target.dtype).clip(1, self.most)


class PseudoMasker(Masker):
    """Way v2, pseudo-masking: every target token is predicted by a masked copy of it behind the target."""

    def __call__(self, feature: Feature) -> Sample:
        source = self._source(feature)
        labels = self._target(feature)
        chance, masked, share = self.rng.random, self._masked, self.masking.target_mask_prob
        target, pseudo = [], []
        for token in labels:
            copy = masked(token)
            pseudo.append(copy)
            target.append(copy if chance() < share else token)
        return Sample(source, target, pseudo, list(range(len(labels))), labels)

    def segments(self, source: Any, target: Any) -> tuple[Any, Any, Any]:
        in_source, in_target, _ = super().segments(source, target)
        return in_source, in_target, in_target


MASK_WAYS = ("v0", "v1", "v2")


def make_masker(
    mask_way: str,
    special: SpecialIds,
    masking: Masking,
    max_source: int,
    max_target: int,
    rng: random.Random,
    num_max_mask_token: int = 0,
) -> Masker:
    """The masker of a way: ``v0`` position shift, ``v1`` masked target, ``v2`` pseudo-masking.

    Args:
        max_source, max_target: longest source and target, special tokens included.
        num_max_mask_token: most tokens that v1 masks in one sample, 0 for no limit; the other ways take no notice.

    Raises:
        UserError: unknown way, or a limit that is too small.
    """
    if mask_way == "v0":
        return ShiftMasker(special, masking, max_source, max_target, rng)
    if mask_way == "v1":
        return TargetMasker(special, masking, max_source, max_target, rng, num_max_mask_token)
    if mask_way == "v2":
        return PseudoMasker(special, masking, max_source, max_target, rng)
    raise UserError(f"--mask_way must be one of {', '.join(MASK_WAYS)}, not {mask_way!r}")
