"""A whole decoding on the way of CUDA tensors, emulated on a CPU: kernels of csrc/cuda and what is around them."""

from __future__ import annotations

import sys

import pytest
import torch
from emulated_cuda import operators
from test_pooled_search import SPECIAL, in_pool, random_sources, small_model

from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.search import BeamSearch
from minilm_fast.modeling import packed_encoder
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.packed_encoder import attention_dtype
from minilm_fast.ops import _cuda, _dispatch

OPERATORS = {
    "decode_attention": {"_op": "decode_attention", "_early_op": "decode_attention_early", "_store_op": "store_source"},
    "linear": {"_head_op": "lm_head_topk"},
    "beam": {"_ban_op": "ban_repeated_ngrams", "_advance_op": "advance_beams"},
    "step": {"_linear_op": "step_linear", "_norm_op": "step_norm", "_embedding_op": "step_embedding"},
}
"""Which attributes of which module of ``minilm_fast.ops`` are the operators with CUDA kernels."""


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of CUDA tensors."""
    available = _dispatch.unusable

    def unusable(name: str, operator: str, device: torch.device, needs_grad: bool = False) -> str | None:
        if name == "cuda" and operator in _cuda.KERNELS | _cuda.COMPOSED:
            return None
        return available(name, operator, device, needs_grad)

    monkeypatch.setattr(_dispatch, "unusable", unusable)
    monkeypatch.setattr(_dispatch, "PRIORITY", {"cpu": ("cuda", "cpu", "reference")})
    monkeypatch.setattr(packed_encoder, "default_activations", lambda format, device: attention_dtype(format))
    for module, names in OPERATORS.items():
        for attribute, operator in names.items():
            overload = getattr(operators(), operator).default
            monkeypatch.setattr(sys.modules[f"minilm_fast.ops.{module}"], attribute, overload)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 3, "length_penalty": 0.7, "forbid_duplicate_ngrams": True, "ngram_size": 2, "min_len": 4},
        {"beam_size": 2, "pos_shift": True},
    ],
)
def test_fp32_gives_the_answers_of_the_cpu(options: dict[str, object], request: pytest.FixtureRequest) -> None:
    config, state = small_model()
    sources = random_sources()[:5]
    chosen = SearchOptions(batch_size=3, max_tgt_length=8, **options)
    plain = dict(BeamSearch(InferenceEngine(config, state), chosen, SPECIAL, ignored=[7]).run(sources))
    request.getfixturevalue("emulated")
    engine = InferenceEngine(config, state)
    assert engine._head.backend == "cuda"
    found = in_pool(BeamSearch(engine, chosen, SPECIAL, ignored=[7]), sources, 3)
    assert found.keys() == plain.keys()
    for index, expected in plain.items():
        assert found[index].ids == expected.ids
        assert found[index].score == pytest.approx(expected.score, abs=1e-3)


def test_bf16_stays_near_fp32(request: pytest.FixtureRequest) -> None:
    config, state = small_model()
    sources = random_sources()[:4]
    slots = torch.arange(4, dtype=torch.int32)

    def first_candidates(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        engine = InferenceEngine(config, state, dtype)
        cache = engine.new_cache(slots=4, beams=1, source_capacity=32, steps=2)
        with torch.inference_mode():
            hidden = engine.prefill(sources, SPECIAL.mask, slots, cache, keep_query=False)
            hidden = engine.step(
                torch.full((4, 1), 9, dtype=torch.int32),
                SPECIAL.mask,
                slots,
                torch.zeros(4, dtype=torch.int32),
                torch.zeros(4, 1, 2, dtype=torch.int32),
                cache,
            )
            return hidden, engine.predict(hidden, 1)[0]

    exact, score = first_candidates("fp32")
    request.getfixturevalue("emulated")
    hidden, near = first_candidates("bf16")
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float() - exact).norm() < 0.03 * exact.norm()
    torch.testing.assert_close(near, score, rtol=0.05, atol=0.3)
