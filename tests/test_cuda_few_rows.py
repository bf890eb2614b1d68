"""A decoding step in few launches, on the way of CUDA tensors emulated on a CPU, next to that of separate operators."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_cuda import poisoned_results
from test_cuda_decode import emulated  # noqa: F401 (a fixture)
from test_pooled_search import SPECIAL, in_pool, random_sources, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_fast.config import Config
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.search import BeamSearch
from minilm_fast.modeling import few_rows
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.model import Model
from minilm_fast.ops import step

OPTIONS: list[dict[str, Any]] = [
    {},
    {"beam_size": 3, "length_penalty": 0.7, "forbid_duplicate_ngrams": True, "ngram_size": 2, "min_len": 4},
    {"beam_size": 2, "pos_shift": True},
]


class Launches(TorchDispatchMode):
    """Counts the operators that compute something: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
        if not views and "empty" not in schema.name:
            self.found[schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def after_prefill(engine: InferenceEngine, mask: int | None = SPECIAL.mask) -> Callable[[], torch.Tensor]:
    """The last hidden states of a step of two beams of four sources."""
    cache = engine.new_cache(slots=5, beams=2, source_capacity=32, steps=3)
    slots = torch.tensor([2, 0, 4, 1], dtype=torch.int32, device=engine.device)
    query = SPECIAL.mask if mask is not None else SPECIAL.sep
    engine.prefill(random_sources()[:4], query, slots, cache, keep_query=mask is None)
    steps = torch.full_like(slots, int(mask is None))
    last = torch.arange(8, dtype=torch.int32, device=engine.device).view(4, 2)
    ancestry = slots.new_zeros(4, 2, 3)
    return lambda: engine.step(last, mask, slots, steps, ancestry, cache)


@torch.no_grad()
def test_launches_of_a_step(emulated: None) -> None:  # noqa: F811
    """Five a layer, the embeddings, the last norm; of the head a product, a norm and the search."""
    engine = InferenceEngine(*small_model(), "bf16")
    layers = engine.config.num_hidden_layers
    run = after_prefill(engine)
    with Launches() as launches:
        hidden = run()
    assert launches.found == {
        "step_linear": 4 * layers,
        "decode_attention": layers,
        "step_embedding": 1,
        "step_norm": 1,
    }
    with Launches() as launches:
        engine.predict(hidden, 3)
    assert launches.found == {"step_linear": 1, "step_norm": 1, "lm_head_topk": 1}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_specification_gives_the_answers_of_the_old_step(
    options: dict[str, object], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, state = small_model()
    sources = random_sources()[:5]
    chosen = SearchOptions(batch_size=3, max_tgt_length=8, **options)
    operators = {name: getattr(step, name) for name in ("_linear_op", "_norm_op", "_embedding_op")}
    plain = dict(BeamSearch(InferenceEngine(config, state), chosen, SPECIAL, ignored=[7]).run(sources))
    request.getfixturevalue("emulated")
    for name, specification in operators.items():
        monkeypatch.setattr(step, name, specification)
    monkeypatch.setattr(few_rows.ops, "step_kernels_take", lambda weight, normalised=True: True)
    engine = InferenceEngine(config, state)
    with Launches() as launches:
        found = in_pool(BeamSearch(engine, chosen, SPECIAL, ignored=[7]), sources, 3)
    assert launches.found["step_linear"] > 0
    assert {index: hypothesis.ids for index, hypothesis in found.items()} == {i: h.ids for i, h in plain.items()}
    for index, hypothesis in plain.items():
        assert found[index].score == pytest.approx(hypothesis.score, abs=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernels_give_the_answers_of_the_old_step(
    options: dict[str, object],
    emulated: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, state = small_model()
    sources = random_sources()[:5]
    chosen = SearchOptions(batch_size=3, max_tgt_length=8, **options)
    search = BeamSearch(InferenceEngine(config, state, "bf16"), chosen, SPECIAL, ignored=[7])
    found = in_pool(search, sources, 3)
    monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    plain = in_pool(search, sources, 3)
    assert {index: hypothesis.ids for index, hypothesis in found.items()} == {i: h.ids for i, h in plain.items()}
    for index, hypothesis in plain.items():
        assert found[index].score == pytest.approx(hypothesis.score, abs=0.1)


def _models() -> dict[str, Config]:
    plain = small_model()[0]
    return {
        "plain": plain,
        "narrow embeddings": dataclasses.replace(plain, model_type="electra", embedding_size=32),
        "another activation": dataclasses.replace(plain, hidden_act="relu"),
        "no token types": dataclasses.replace(plain, type_vocab_size=0),
    }


@pytest.mark.parametrize("config", _models().values(), ids=_models().keys())
@pytest.mark.parametrize("mask", [SPECIAL.mask, None])
@torch.inference_mode()
def test_no_further_from_fp32_than_the_old_step(
    config: Config, mask: int | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Model.from_config(config, seed=5).state
    exact_engine = InferenceEngine(config, state)
    exact = after_prefill(exact_engine, mask)()
    best = exact_engine.predict(exact, 1)[0]
    request.getfixturevalue("emulated")
    engine = InferenceEngine(config, state, "bf16")
    run = after_prefill(engine, mask)
    with poisoned_results():
        mine = run()
        scores = engine.predict(mine, 1)[0]
    monkeypatch.setattr(few_rows, "overlap", lambda device: True)
    assert torch.equal(mine, run()) and torch.equal(scores, engine.predict(mine, 1)[0])
    monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    theirs = run()
    assert mine.dtype == theirs.dtype and mine.shape == exact.shape
    distance = [(x.double() - exact.double()).norm() for x in (mine, theirs)]
    assert distance[0] <= 1.1 * distance[1]
    assert (scores - best).abs().max() <= 0.15


def test_what_the_kernels_do_not_take_runs_as_before(emulated: None) -> None:  # noqa: F811
    config, state = small_model()
    assert InferenceEngine(config, state)._few_rows is None
    narrow = dataclasses.replace(config, intermediate_size=100)
    assert InferenceEngine(narrow, Model.from_config(narrow, seed=5).state, "bf16")._few_rows is None
    engine = InferenceEngine(config, state, "bf16")
    few = engine._few_rows
    assert few is not None and few.takes(few_rows.MOST_ROWS) and not few.takes(few_rows.MOST_ROWS + 1)
    with few_rows.ops.backend("reference"):
        assert not few.takes(1)
