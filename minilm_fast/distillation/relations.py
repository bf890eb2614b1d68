"""Which self-attention relations are distilled, and with what weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minilm_fast.errors import UserError

VECTORS = ("q", "k", "v")


@dataclass(frozen=True)
class Relation:
    """Scaled products of two kinds of self-attention vectors, ``softmax(A B^T / sqrt(d))``.

    Args:
        a, b: ``"q"``, ``"k"`` or ``"v"``: the rows and the columns.
        weight: factor of its loss.
    """

    a: str
    b: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The two letters."""
        return self.a + self.b


# MiniLM (arXiv 2002.10957), equation 10: attention transfer and value relation.
V1 = (Relation("q", "k"), Relation("v", "v"))
# MiniLMv2 (arXiv 2012.15828), section 3, with all weights 1.
V2 = (Relation("q", "q"), Relation("k", "k"), Relation("v", "v"))
_PRESETS = {"v1": V1, "v2": V2}


def parse_relations(text: str) -> tuple[Relation, ...]:
    """Relations from a text such as ``v1``, ``v2`` or ``qk:1,vv:0.5``; a missing weight is 1.

    Raises:
        UserError: the text is something else; the message names the part.
    """
    if text in _PRESETS:
        return _PRESETS[text]
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if len(name) != 2 or name[0] not in VECTORS or name[1] not in VECTORS:
            raise UserError(f"relation {part.strip()!r}: expected v1, v2 or pairs of q, k and v such as qk:1,vv:0.5")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"relation {part.strip()!r}: the weight must be a positive number")
        found.append(Relation(name[0], name[1], value))
    return check_relations(found)


def check_relations(relations: Sequence[Relation]) -> tuple[Relation, ...]:
    """The relations, if there is at least one and none twice.

    Raises:
        UserError: otherwise.
    """
    names = [relation.name for relation in relations]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names:
        raise UserError("no relation to distil is given")
    if twice is not None:
        raise UserError(f"relation {twice} is given twice")
    return tuple(relations)


def needed_vectors(relations: Sequence[Relation]) -> tuple[str, ...]:
    """Those of q, k and v that the relations are made of, in this order."""
    used = {letter for relation in relations for letter in relation.name}
    return tuple(letter for letter in VECTORS if letter in used)
