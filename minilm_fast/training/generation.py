"""Decoding a few dev examples at every checkpoint, and the scores of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilm_fast.training.distributed import World

Source = str | Sequence[str]


@dataclass(frozen=True)
class Generation:
    """What to decode and how to score it.

    Args:
        sources: texts or lists of tokens.
        references: one or more texts for each source.
        decode: from a folder with weights and sources to texts.
        score: from texts and their references to measures by name.
    """

    sources: Sequence[Source]
    references: Sequence[Sequence[str]]
    decode: Callable[[Path, Sequence[Source]], list[str]]
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]

    def measure(self, world: World, weights: Path) -> dict[str, float]:
        """The scores of a checkpoint, their names with ``dev_`` before them; every process decodes a share."""
        share = self.sources[world.rank :: world.size]
        shares = world.gather(self.decode(weights, share) if share else [])
        texts = [shares[i % world.size][i // world.size] for i in range(len(self.sources))]

        def score() -> dict[str, float]:
            return {f"dev_{name}": value for name, value in self.score(texts, self.references).items()}

        return world.on_main(score)
