"""Beam search over packed examples that come and go.

The original's rules (see ``docs/decoding.md``): log-softmax, banned ids at -10000, the best ``K`` of each beam, then
the best ``K`` of all; an ended hypothesis goes on with -10000; the winner is the best ended hypothesis of the frames
up to the first in which all have ended, or any of the last frame, the earliest of equal ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from minilm_fast import ops
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.pooled import PooledSearch
from minilm_fast.decoding.result import Hypothesis
from minilm_fast.decoding.state import new_state, winner
from minilm_fast.errors import enough_memory
from minilm_fast.modeling.inference import DecodeCache, InferenceEngine
from minilm_fast.modeling.source_batch import SourceBatch
from minilm_fast.ops import BeamRules, BeamState


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the search needs: end of a target, padding, and the mask that asks for a token."""

    sep: int
    pad: int
    mask: int


@dataclass
class LiveExamples:
    """Examples being decoded that come and go, a row each of the tensors.

    Attributes:
        examples: which sources they are.
        slots: int32 ``[E]``: where each is in the cache.
        state: how far each is.
    """

    examples: list[int]
    slots: torch.Tensor
    state: BeamState

    def keep(self, rows: torch.Tensor) -> LiveExamples:
        kept = zip(self.examples, rows.tolist(), strict=True)
        return LiveExamples(
            [example for example, stays in kept if stays], self.slots[rows], BeamState(*(x[rows] for x in self.state))
        )

    def joined(self, other: LiveExamples) -> LiveExamples:
        state = BeamState(*map(torch.cat, zip(self.state, other.state, strict=True)))
        return LiveExamples(self.examples + other.examples, torch.cat([self.slots, other.slots]), state)


class BeamSearch:
    """Decodes sources with an engine.

    Args:
        engine: the packed model.
        options: what to search for.
        special: ids of the tokenizer.
        ignored: ids that n-gram blocking overlooks.
    """

    # A prefill reads this many tokens at a time: enough for full products, on a CPU few enough to stay in the caches,
    # on a GPU so many that its time is not that of starting kernels.
    PREFILL_TOKENS: ClassVar = {"cpu": 2048, "cuda": 16384}

    def __init__(
        self, engine: InferenceEngine, options: SearchOptions, special: SpecialIds, ignored: Sequence[int] = ()
    ) -> None:
        self.engine = engine
        self.options = options
        self.special = special
        self.ignored_ids = tuple(sorted(ignored))
        self.ignored = torch.tensor(self.ignored_ids, dtype=torch.int32)
        frames = torch.arange(options.max_tgt_length, dtype=torch.float64)
        penalty = max(options.length_penalty, 0.0) if options.constrained else 0.0
        self.rules = BeamRules(
            ((5 + frames + 1) / 6) ** penalty,
            special.sep,
            special.pad,
            options.min_len,
            options.early_exit and not options.need_score_traces,
        )

    @torch.inference_mode()
    def run(self, sources: Sequence[Sequence[int]]) -> Iterator[tuple[int, Hypothesis]]:
        """Decodes sources (ids with their special tokens) and yields ``(index, winner)`` as they finish.

        The longest are read first; the order of the results is that of their finishing.

        Raises:
            NotEnoughMemory: for so many examples side by side. The search can be used again.
        """
        if not sources:
            return
        with enough_memory("a lower --batch_size or --beam_size needs less"):
            yield from self._run(sources)

    def _run(self, sources: Sequence[Sequence[int]]) -> Iterator[tuple[int, Hypothesis]]:
        options = self.options
        waiting = deque(sorted(range(len(sources)), key=lambda i: -len(sources[i])))
        slots, capacity = min(options.batch_size, len(sources)), len(sources[waiting[0]])
        if self.engine.device.type == "cuda":
            yield from PooledSearch(self, slots, capacity).run(sources, waiting)
            return
        cache = self.new_cache(slots, capacity)
        free = list(range(slots))
        live: LiveExamples | None = None
        while waiting or live is not None:
            if self.admits(len(free), slots, live is not None, len(waiting)):
                examples = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                places = torch.tensor([free.pop() for _ in examples], dtype=torch.int32)
                fresh = LiveExamples(examples, places, new_state(len(examples), options, self.engine.device))
                self.enter([sources[e] for e in examples], fresh.slots, cache, fresh.state)
                live = fresh if live is None else live.joined(fresh)
            else:
                assert live is not None
                self.step(live.state, live.slots, cache)
            done = ~live.state.running
            if bool(done.any()):
                found = live.state._asdict()
                for row in done.nonzero().flatten().tolist():
                    yield live.examples[row], winner(found, row, options)
                free.extend(live.slots[done].tolist())
                live = live.keep(~done)
                if not live.examples:
                    live = None

    def new_cache(self, slots: int, source_capacity: int) -> DecodeCache:
        """Room for so many examples with sources of at most so many tokens."""
        options = self.options
        return self.engine.new_cache(
            slots=slots,
            beams=options.beam_size,
            source_capacity=source_capacity,
            steps=options.max_tgt_length + options.entering,
        )

    def admits(self, free: int, slots: int, live: bool, waiting: int) -> bool:
        """Whether waiting sentences enter now: a few at a time, so that their products are not too small."""
        if not waiting or not free:
            return False
        if not live:
            return True
        return self.options.continuous_batching and free >= self.group(slots)

    def group(self, slots: int) -> int:
        """How many sentences enter at least, while others are decoded."""
        return max(1, slots // 8)

    def enter(
        self,
        sources: Sequence[Sequence[int]],
        slots: torch.Tensor,
        cache: DecodeCache,
        state: BeamState,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Prefills sources and takes their first step, in place.

        Args:
            sources: ids of each new example.
            slots: int32 ``[n]``: where each goes in the cache.
            cache, state: changed in place.
            rows: int32 ``[n]``: which row of the state each takes; by default one after the other.
        """
        hidden = []
        start, most = 0, self.PREFILL_TOKENS[self.engine.device.type]
        while start < len(sources):
            stop, tokens = start, 0
            while stop < len(sources) and (stop == start or tokens + len(sources[stop]) < most):
                tokens += len(sources[stop])
                stop += 1
            hidden.append(
                self.engine.prefill(
                    sources[start:stop],
                    self._query,
                    slots[start:stop],
                    cache,
                    keep_query=self.options.pos_shift,
                    causal_source=self._causal,
                )
            )
            start = stop
        self._first_step(torch.cat(hidden), state, rows)

    @property
    def _query(self) -> int:
        return self.special.sep if self.options.pos_shift else self.special.mask

    @property
    def _causal(self) -> bool:
        return self.options.mode == "l2r"

    def pack(self, sources: Sequence[Sequence[int]], tokens: int) -> torch.Tensor:
        """Sources filled up to so many tokens, for :meth:`enter_packed`; on the CPU."""
        return self.engine.pack(sources, self._query, causal_source=self._causal, tokens=tokens)

    def enter_packed(self, batch: SourceBatch, places: torch.Tensor, cache: DecodeCache, state: BeamState) -> None:
        """:meth:`enter` of sources on the device, which have the slots and rows ``places``. It can be captured."""
        hidden = self.engine.prefill_packed(batch, places, cache, keep_query=self.options.pos_shift)
        self._first_step(hidden, state, places)

    def _first_step(self, hidden: torch.Tensor, state: BeamState, rows: torch.Tensor | None) -> None:
        suppress = None
        if self.options.constrained and self.options.min_len >= 1:
            suppress = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        found = self.engine.predict(hidden, self.options.beam_size, None, self.special.sep, suppress)
        self._advance(*found, state, 1, rows, self.options.entering)

    def step(self, state: BeamState, slots: torch.Tensor, cache: DecodeCache) -> None:
        """One step of the examples that run, in place."""
        options = self.options
        mask = None if options.pos_shift else self.special.mask
        hidden = self.engine.step(state.last_ids, mask, slots, state.steps, state.ancestry, cache)
        banned = suppress = None
        if options.constrained and options.forbid_duplicate_ngrams:
            banned = ops.ban_repeated_ngrams(
                state.tokens.view(-1, options.max_tgt_length), state.lengths.view(-1), options.ngram_size, self.ignored
            )
        if options.constrained and options.min_len > 1:
            suppress = state.suppress.view(-1)
        found = self.engine.predict(hidden, options.beam_size, banned, self.special.sep, suppress)
        self._advance(*found, state, options.beam_size)

    def _advance(
        self,
        scores: torch.Tensor,
        ids: torch.Tensor,
        state: BeamState,
        beams: int,
        rows: torch.Tensor | None = None,
        entering: int = -1,
    ) -> None:
        shape = (-1, beams, self.options.beam_size)
        ops.advance_beams(scores.view(shape), ids.view(shape), state, self.rules, rows=rows, entering=entering)
