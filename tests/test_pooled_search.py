"""The search on a fixed pool, which is what a GPU runs: the same answers as the search on examples that come and go."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from minilm_fast.config import Config
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.pooled import PooledSearch
from minilm_fast.decoding.result import Hypothesis
from minilm_fast.decoding.search import BeamSearch, SpecialIds
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.model import Model

SPECIAL = SpecialIds(sep=3, pad=0, mask=4)


def small_model() -> tuple[Config, dict[str, torch.Tensor]]:
    """Random weights, inclined to end, at different lengths."""
    config = Config(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    state = Model.from_config(config, seed=5).state
    state["cls.predictions.bias"][3] += 18.0
    return config, state


@pytest.fixture(scope="module")
def engine() -> InferenceEngine:
    return InferenceEngine(*small_model())


def random_sources() -> list[list[int]]:
    torch.manual_seed(2)
    return [torch.randint(5, 60, (n,)).tolist() for n in (9, 1, 17, 4, 30, 12, 3, 21, 8, 2, 25)]


def in_pool(search: BeamSearch, sources: list[list[int]], slots: int) -> dict[int, Hypothesis]:
    options = search.options
    cache = search.engine.new_cache(
        slots=slots,
        beams=options.beam_size,
        source_capacity=max(map(len, sources)),
        steps=options.max_tgt_length + int(options.pos_shift),
    )
    with torch.inference_mode():
        waiting = deque(range(len(sources)))
        return dict(PooledSearch(search, cache).run(sources, waiting))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 3},
        {"beam_size": 3, "length_penalty": 0.7, "forbid_duplicate_ngrams": True, "ngram_size": 2, "min_len": 4},
        {"beam_size": 2, "pos_shift": True},
        {"beam_size": 2, "need_score_traces": True},
        {"beam_size": 4, "early_exit": False},
        {"beam_size": 4, "continuous_batching": False},
    ],
)
@pytest.mark.parametrize("slots", [1, 4, 11])
def test_answers_are_those_of_the_plain_search(engine: InferenceEngine, options: dict[str, object], slots: int) -> None:
    search = BeamSearch(engine, SearchOptions(batch_size=slots, max_tgt_length=12, **options), SPECIAL, ignored=[7])
    sources = random_sources()
    plain = dict(search.run(sources))
    assert in_pool(search, sources, slots) == plain
    assert sorted(plain) == list(range(len(sources)))
    assert len({len(hypothesis.ids) for hypothesis in plain.values()}) > 1 or "early_exit" in options
