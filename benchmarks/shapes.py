"""The model shapes and decoding workloads that the benchmarks know by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilm_fast.config import Config


@dataclass(frozen=True)
class ModelShape:
    """Size of a BERT-family Transformer with a masked-language-model head.

    ``layers`` Transformer layers of width ``hidden``, ``heads`` attention heads (head size ``hidden / heads``), a
    feed-forward width of ``intermediate`` and ``vocab`` words; ``positions`` is the longest input.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int = 30522
    positions: int = 512

    def config(self, **more: Any) -> Config:
        """The configuration of such a model; ``more`` adds to it or stands in place of what it has."""
        from minilm_fast.config import Config

        own = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
        }
        return Config(**(own | more))


@dataclass(frozen=True)
class DecodeWorkload:
    """Beam search with a forced number of steps.

    ``batch`` sources of ``source`` tokens each (special tokens counted), ``beam`` hypotheses a source, exactly
    ``steps`` decoding steps, and no n-gram of ``ngram`` tokens twice in an output (0: anything may repeat).
    """

    batch: int = 32
    beam: int = 5
    source: int = 464
    steps: int = 48
    ngram: int = 3


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("l12-h384", layers=12, hidden=384, heads=12, intermediate=1536),
        ModelShape("l6-h384", layers=6, hidden=384, heads=12, intermediate=1536),
        ModelShape("l6-h768", layers=6, hidden=768, heads=12, intermediate=3072),
        ModelShape("bert-base", layers=12, hidden=768, heads=12, intermediate=3072),
        ModelShape("tiny", layers=2, hidden=64, heads=2, intermediate=128),
    )
}

WORKLOADS: dict[str, DecodeWorkload] = {
    "summarisation": DecodeWorkload(),
    "question-generation": DecodeWorkload(source=160, steps=32),
    "headline": DecodeWorkload(source=100, steps=24),
    "one-sentence": DecodeWorkload(batch=1),
}
