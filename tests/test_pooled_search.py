"""The search on a fixed pool, which is what a GPU runs: the same answers as the search on examples that come and go."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_fast import backend
from minilm_fast.config import Config
from minilm_fast.decoding import pool as pools
from minilm_fast.decoding import pooled
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.pool import Pool
from minilm_fast.decoding.pooled import PooledSearch
from minilm_fast.decoding.result import Hypothesis
from minilm_fast.decoding.search import BeamSearch, SpecialIds
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.model import Model
from minilm_fast.modeling.source_batch import SourceBatch, number_count

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
    with torch.inference_mode():
        waiting = deque(range(len(sources)))
        return dict(PooledSearch(search, slots, max(map(len, sources))).run(sources, waiting))


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


def with_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects for how many rows each step was computed."""
    sizes: list[int] = []
    step = Pool.step

    def counted(pool: Pool, search: BeamSearch, size: int) -> None:
        sizes.append(size)
        step(pool, search, size)

    monkeypatch.setattr(Pool, "step", counted)
    return sizes


def test_steps_become_smaller_when_nothing_waits(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = with_sizes(monkeypatch)
    options = SearchOptions(batch_size=9, max_tgt_length=12, beam_size=3, length_penalty=0.7)
    in_pool(BeamSearch(engine, options, SPECIAL), random_sources(), 9)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 9 and sizes[-1] < 9 and set(sizes) <= {9, 8, 6, 4, 3, 2, 1}


def test_no_step_is_started_in_vain(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = with_sizes(monkeypatch)
    options = SearchOptions(batch_size=4, max_tgt_length=12, beam_size=3, early_exit=False)
    in_pool(BeamSearch(engine, options, SPECIAL), random_sources()[:4], 4)
    assert sizes == [4] * 11


class _Counting(TorchDispatchMode):
    """Counts the operators that are more than another view of a tensor."""

    VIEWS = frozenset({"view", "slice", "select", "_unsafe_view", "unsqueeze", "transpose", "t", "detach"})

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name not in self.VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("traces", [False, True])
def test_what_a_step_takes_but_for_the_layers(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, traces: bool
) -> None:
    options = SearchOptions(
        batch_size=4, max_tgt_length=12, beam_size=3, forbid_duplicate_ngrams=True, min_len=5, need_score_traces=traces
    )
    search = BeamSearch(engine, options, SPECIAL)
    pool = Pool(search, 4, 16)
    hidden = torch.ones(6, engine.config.hidden_size)
    monkeypatch.setattr(engine, "step", lambda *_: hidden)
    with torch.inference_mode(), _Counting() as counting:
        pool.step(search, 2)
    assert counting.found == Counter(
        {"ban_repeated_ngrams": 1, "linear": 1, "add_layer_norm": 1, "lm_head_topk": 1, "advance_beams": 1}
    )


def test_a_pool_is_used_again(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.kept.clear()
    made: list[Pool] = []
    initialise = Pool.__init__

    def counted(pool: Pool, *args: Any) -> None:
        made.append(pool)
        initialise(pool, *args)

    monkeypatch.setattr(Pool, "__init__", counted)
    monkeypatch.setattr(pooled, "CAPACITY_MULTIPLE", 16)
    sources = random_sources()

    def decode(given: list[list[int]], slots: int, **options: Any) -> int:
        """Decodes; how many pools that made."""
        before = len(made)
        search = BeamSearch(engine, SearchOptions(batch_size=slots, max_tgt_length=12, **options), SPECIAL, ignored=[7])
        assert in_pool(search, given, slots) == dict(search.run(given))
        return len(made) - before

    beams = {"beam_size": 3, "forbid_duplicate_ngrams": True, "ngram_size": 2}
    assert decode(sources, 4, **beams) == 1
    assert decode(sources[:3], 2, **beams) == 0
    assert decode(sources[3:], 4, **beams) == 0
    assert decode(sources, 5, **beams) == 1, "more slots"
    assert decode([*sources, [9] * 40], 5, **beams) == 1, "a longer source"
    assert decode(sources, 5, **beams | {"min_len": 3}) == 1, "another rule"
    with backend("reference"):
        assert decode(sources[:2], 2, **beams) == 1, "another backend"
    assert len(engine.kept) == pooled.KEPT_POOLS
    # One that was not run to its end is not kept.
    search = BeamSearch(engine, SearchOptions(batch_size=2, max_tgt_length=12), SPECIAL)
    with torch.inference_mode():
        running = PooledSearch(search, 2, 30).run(sources, deque(range(5)))
        next(running)
        running.close()
    assert decode(sources, 2) == 1


def test_a_kept_pool_makes_room(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.kept.clear()
    sources = random_sources()
    in_pool(BeamSearch(engine, SearchOptions(batch_size=4, max_tgt_length=12), SPECIAL), sources, 4)
    other = BeamSearch(engine, SearchOptions(batch_size=4, max_tgt_length=12, beam_size=2), SPECIAL)
    new_cache, refused = engine.new_cache, []

    def full(**sizes: Any) -> Any:
        if engine.kept:
            refused.append(sizes)
            raise torch.OutOfMemoryError("out of memory")
        return new_cache(**sizes)

    monkeypatch.setattr(engine, "new_cache", full)
    assert len(in_pool(other, sources, 4)) == len(sources)
    assert len(refused) == 1 and len(engine.kept) == 1


def test_sizes_are_captured_when_they_have_been_wanted_often(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 2)
    pool = Pool(BeamSearch(engine, SearchOptions(max_tgt_length=12), SPECIAL), 8, 16)
    assert [pool.size_for(n) for n in (8, 7, 6, 5, 4, 3, 2, 1)] == [8, 8, 6, 6, 4, 3, 2, 1]
    # As on a GPU, where each size has a graph.
    monkeypatch.setattr(pool, "captures", True)
    graphs: dict[int, Any] = {}
    monkeypatch.setattr(pool, "_graphs", graphs)
    assert pool.size_for(3) == 3
    graphs[8] = "captured"
    assert [pool.size_for(n) for n in (8, 4, 4, 3, 4, 1)] == [8, 8, 8, 8, 4, 8]
    graphs[4] = "captured"
    assert [pool.size_for(n) for n in (4, 1, 5, 1)] == [4, 4, 8, 1]


def test_room_is_made_in_few_sizes() -> None:
    assert [pools.room_for(n, 32) for n in (1, 3, 5, 7, 9, 13, 17, 25, 32)] == [1, 3, 6, 8, 12, 16, 24, 32, 32]
    assert [pools.room_for(n, 11) for n in (1, 8, 9, 11)] == [1, 8, 11, 11]
    assert pools.sizes_to(1) == [1]


@pytest.mark.parametrize("options", [{}, {"beam_size": 3, "pos_shift": True}, {"mode": "l2r"}])
@pytest.mark.parametrize("most", [0, 40])
def test_sources_read_one_by_one_or_filled_up(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], most: int
) -> None:
    """Small prefills are filled up with an idle sequence, large ones are read as they are: the same answers."""
    monkeypatch.setattr(pools, "MOST_PREFILL_TOKENS", most)
    monkeypatch.setattr(pools, "TOKEN_MULTIPLE", 8)
    monkeypatch.setattr(pools, "MOST_PREFILLS", 2)
    engine.kept.clear()
    search = BeamSearch(engine, SearchOptions(batch_size=3, max_tgt_length=12, **options), SPECIAL)
    sources = random_sources()
    assert in_pool(search, sources, 3) == dict(search.run(sources))
    (pool,) = engine.kept.values()
    assert len(pool._prefills) == (2 if most else 0)


def test_an_idle_sequence_changes_nothing(engine: InferenceEngine) -> None:
    sources = random_sources()[:3]
    tokens = sum(map(len, sources)) + 3
    slots, results = torch.tensor([2, 0, 1], dtype=torch.int32), []
    for given in (None, tokens, tokens + 21):
        cache = engine.new_cache(slots=3, beams=1, source_capacity=17, steps=1)
        cache.source_k.zero_()
        numbers = engine.pack(sources, SPECIAL.mask, tokens=given)
        count = given or tokens
        assert numbers.numel() == number_count(3, count, given is not None)
        batch = SourceBatch(numbers, 3, count, 22, given is not None)
        assert all(x.data_ptr() % 16 == 0 for x in (batch.ids, batch.layout.segments, batch.layout.cu_seqlens))
        with torch.inference_mode():
            hidden = engine.prefill_packed(batch, slots, cache, keep_query=False)
        results.append((hidden, cache.source_k, cache.source_lengths))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_another_gpu_is_the_current_one_only_while_the_search_works(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entered.append(chosen)
        yield
        entered.pop()

    def results() -> Generator[int, None, None]:
        for i in range(3):
            assert entered == [torch.device("cuda:1")]
            yield i

    monkeypatch.setattr(torch.cuda, "device", device)
    found = []
    for i in pooled.on_device(torch.device("cuda:1"), results()):
        assert not entered
        found.append(i)
    assert found == [0, 1, 2] and not entered
