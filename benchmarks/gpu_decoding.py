"""The cases of ``gpu.py`` for decoding: the operators of a step, and whole outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cousin import create
from gpu_case import CHECKED, OURS, Case, Goal, Size, System, replayed
from gpu_original import OriginalDecoder, Search
from gpu_step import overlapping
from shapes import DecodeWorkload
from work import masked_query_decoder

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.ops import reference

MASK, SEP, PAD = 4, 3, 0
NGRAM = 3


def decode_attention(size: Size) -> Iterator[Case]:
    """One layer after the other of a decoding step in the middle of an output; a batch and one sentence."""
    from attention import Step, StepData

    for batch in dict.fromkeys((size.batch, 1)):
        torch.manual_seed(0)
        step = Step(batch, size.source, size.steps // 2, size.beams, 2, size.shape.heads, size.head_size)
        layers = size.shape.layers
        data = StepData(step, layers)
        calls = []
        for layer in range(layers):
            moved = [x.to(size.device) if isinstance(x, torch.Tensor) else x for x in data.arguments(layer, size.dtype)]
            moved[:3] = [x.to(size.dtype) for x in moved[:3]]
            calls.append(moved)
        sdpa = _sdpa_step(step, data, size)
        exact = reference.decode_attention(
            *(x.to("cpu", torch.float64) if _is_number(x) else _on_cpu(x) for x in calls[0])
        )
        yield Case(
            f"decode_attention, {layers} layers, batch {batch}",
            {
                OURS: System(
                    lambda calls=calls: replayed(
                        lambda: [ops.decode_attention(*call) for call in calls][:1], size.device
                    )
                ),
                "SDPA, history gathered before": System(
                    lambda sdpa=sdpa: replayed(sdpa, size.device),
                    lambda outs, shape=exact.shape: [outs[0].transpose(2, 3).reshape(shape)],
                ),
            },
            exact=lambda exact=exact: [exact],
            operations=layers * step.operations,
            bytes=layers * step.bytes(size.dtype.itemsize, data.entries),
            units=layers,
            unit="layers",
            goals=[Goal("ms", 0.010)] if batch == size.batch else [],
        )


def _is_number(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, torch.Tensor) else x


def _sdpa_step(step: Any, data: Any, size: Size) -> Callable[[], list[torch.Tensor]]:
    """Torch's way: keys and values of each hypothesis lie ready in one piece."""
    e, b, r, h, d = step.examples, step.beams, step.rows, step.heads, step.size
    mask = torch.ones(r, step.source + step.step + r, dtype=torch.bool, device=size.device)
    mask[0, -1] = False
    queries = data.q.reshape(e, b, r, h, d).transpose(2, 3).to(size.device, size.dtype)
    caches = []
    for layer in range(data.layers):
        own = data.histories(layer)
        source = (data.source_k[layer].transpose(-1, -2), data.source_v[layer])
        parts = [
            torch.cat([x[:, None, :, : step.source].expand(-1, b, -1, -1, -1), y], dim=3)
            for x, y in zip(source, own, strict=True)
        ]
        caches.append([x.to(size.device, size.dtype) for x in parts])
    return lambda: [F.scaled_dot_product_attention(queries, k, v, attn_mask=mask) for k, v in caches]


def vocabulary(size: Size) -> Iterator[Case]:
    """The vocabulary projection with its best words, one row a hypothesis."""
    rows, hidden, words = size.batch * size.beams, size.shape.hidden, size.shape.vocab
    x = torch.randn(rows, hidden, dtype=size.dtype, device=size.device)
    weight = torch.randn(words, hidden, device=size.device)
    bias = torch.randn(words, device=size.device)
    packed, plain, plain_bias = ops.pack_weight(weight, size.format), weight.to(size.dtype), bias.to(size.dtype)

    def exact() -> list[torch.Tensor]:
        few = F.linear(x[:CHECKED].double(), plain.double(), bias.double())
        return [few.log_softmax(-1).topk(size.beams).values]

    def scores(found: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        return [found[0][:CHECKED]]

    yield Case(
        "lm_head_topk",
        {
            OURS: System(lambda: lambda: ops.lm_head_topk(x, packed, bias, size.beams), scores),
            "product, log-softmax, top-k": System(
                lambda: lambda: tuple(F.linear(x, plain, plain_bias).float().log_softmax(-1).topk(size.beams)), scores
            ),
        },
        exact=exact,
        operations=2.0 * rows * hidden * words,
        bytes=float(plain.nbytes + x.nbytes),
    )


def bookkeeping(size: Size) -> Iterator[Case]:
    """What follows the candidates in each step of an output of a forced length."""
    from minilm_fast.decoding.options import SearchOptions
    from minilm_fast.decoding.state import new_state

    options = SearchOptions(batch_size=size.batch, beam_size=size.beams, max_tgt_length=size.steps, early_exit=False)
    shape = (size.steps, size.batch, size.beams, size.beams)
    torch.manual_seed(0)
    scores = torch.randn(shape).mul_(3).log_softmax(-1).sort(dim=-1, descending=True).values
    ids = torch.randint(5, size.shape.vocab, shape, dtype=torch.int32)
    rules = ops.BeamRules(torch.ones(size.steps, dtype=torch.float64), SEP, PAD, 1, False)

    def make(device: torch.device, dtype: torch.dtype, advance: Callable[..., None]) -> Callable[[], ops.BeamState]:
        state = new_state(size.batch, options, device)
        state = state._replace(scores=state.scores.to(dtype), trace_scores=state.trace_scores.to(dtype))
        steps = list(zip(scores.to(device, dtype), ids.to(device), strict=True))
        there = rules._replace(divisors=rules.divisors.to(device))

        def run() -> ops.BeamState:
            for step, (values, tokens) in enumerate(steps):
                given = (values, tokens) if step else (values[:, :1].contiguous(), tokens[:, :1].contiguous())
                advance(*given, state, there, -1 if step else 0)
            return state

        return run

    def best(state: ops.BeamState) -> list[torch.Tensor]:
        return [state.best_score, state.best_tokens.double()]

    def ours(scores: torch.Tensor, ids: torch.Tensor, state: ops.BeamState, rules: ops.BeamRules, first: int) -> None:
        ops.advance_beams(scores, ids, state, rules, entering=first)

    def eager(scores: torch.Tensor, ids: torch.Tensor, state: ops.BeamState, rules: ops.BeamRules, first: int) -> None:
        reference.advance_beams(scores, ids, None, rules.divisors, *state, *rules[1:], first)

    yield Case(
        "advance_beams",
        {
            OURS: System(lambda: make(size.device, torch.float32, ours), best),
            "one PyTorch operator after the other": System(lambda: make(size.device, torch.float32, eager), best),
        },
        exact=lambda: best(make(torch.device("cpu"), torch.float64, eager)()),
        units=size.steps,
        unit="steps",
    )


def decoding(size: Size) -> Iterator[Case]:
    """Whole outputs of a forced length, for a batch and one sentence."""
    from minilm_fast.modeling.model import Model

    shape = size.shape
    config = shape.config(max_position_embeddings=max(shape.positions, size.source + size.steps + 1))
    state = Model.from_config(config).state
    cousin = create(shape, seed=0).to(size.device, size.dtype)
    for batch in dict.fromkeys((size.batch, 1)):
        sources = torch.randint(5, shape.vocab, (batch, size.source))
        load = DecodeWorkload(batch, size.beams, size.source, size.steps, NGRAM)
        goals = [Goal("a second", 2600), Goal("of the limit", 0.45), Goal("times", 3, "Hugging Face, static cache")]
        yield Case(
            f"decoding, batch {batch}",
            {
                OURS: System(lambda s=sources: _ours(size, config, state, s), _scores),
                **overlapping(size, lambda s=sources: _ours(size, config, state, s), _scores),
                "the original's algorithm": System(lambda s=sources: _original(size, config, state, s), _scores),
                "Hugging Face, static cache": System(lambda s=sources: _generate(size, cousin, s, "static")),
                "Hugging Face, growing cache": System(lambda s=sources: _generate(size, cousin, s, "dynamic")),
            },
            exact=lambda s=sources: _scores(_original(size, config, state, s, torch.float32)()),
            different=frozenset({"Hugging Face, static cache", "Hugging Face, growing cache"}),
            operations=batch * masked_query_decoder(shape, load).total,
            units=batch,
            unit="sequences",
            goals=goals if batch == size.batch else [Goal("ms", 6)],
        )


def _scores(found: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """The mean probability of a token: scores near 0 have no meaningful relative error."""
    ids, scores = found
    return [(scores / ids.shape[1]).exp()]


def _ours(
    size: Size, config: Config, state: Mapping[str, torch.Tensor], sources: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    from minilm_fast.decoding.options import SearchOptions
    from minilm_fast.decoding.search import BeamSearch, SpecialIds
    from minilm_fast.modeling.inference import InferenceEngine

    options = SearchOptions(
        batch_size=sources.shape[0],
        beam_size=size.beams,
        max_seq_length=config.max_position_embeddings,
        max_tgt_length=size.steps,
        min_len=size.steps,
        forbid_duplicate_ngrams=True,
        ngram_size=NGRAM,
        early_exit=False,
    )
    engine = InferenceEngine(config, state, size.format, size.device)
    search = BeamSearch(engine, options, SpecialIds(sep=SEP, pad=PAD, mask=MASK))
    given = sources.tolist()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        found = [hypothesis for _, hypothesis in sorted(search.run(given), key=lambda pair: pair[0])]
        return torch.tensor([h.ids for h in found]), torch.tensor([h.score for h in found])

    return run


def _original(
    size: Size,
    config: Config,
    state: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    search = Search(size.beams, size.steps, NGRAM, mask=MASK, sep=SEP)
    decoder = OriginalDecoder(config, state, search, dtype or size.dtype, size.device)
    given = sources.to(size.device)
    return lambda: decoder(given)


def _generate(size: Size, cousin: Any, sources: torch.Tensor, cache: str) -> Callable[[], torch.Tensor]:
    """Hugging Face ``generate``, which compiles the decoder by itself for a static cache on a GPU."""
    given = sources.to(size.device)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}

    @torch.inference_mode()
    def run() -> torch.Tensor:
        output: torch.Tensor = cousin.generate(
            given,
            attention_mask=torch.ones_like(given),
            num_beams=size.beams,
            do_sample=False,
            no_repeat_ngram_size=NGRAM,
            min_new_tokens=size.steps,
            max_new_tokens=size.steps,
            use_cache=True,
            **options,
        )
        if output.shape[1] != size.steps + 1:
            raise ValueError(f"generate made {output.shape[1] - 1} tokens instead of {size.steps}")
        return output

    return run
