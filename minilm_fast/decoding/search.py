"""Beam search over packed examples that come and go.

The original's rules (see ``docs/decoding.md``): log-softmax, banned ids at -10000, the best ``K`` of each beam, then
the best ``K`` of all; an ended hypothesis goes on with -10000; the winner is the best ended hypothesis of the frames
up to the first in which all have ended, or any of the last frame, the earliest of equal ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minilm_fast import ops
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.pooled import PooledSearch
from minilm_fast.decoding.result import Hypothesis, Trace
from minilm_fast.errors import enough_memory
from minilm_fast.modeling.inference import DecodeCache, InferenceEngine

# Room for the rounding of a log-probability above 0, per remaining step, so that the early exit stays exact.
ROUNDING = 1e-6


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the search needs: end of a target, padding, and the mask that asks for a token."""

    sep: int
    pad: int
    mask: int


class LiveExamples:
    """State of the examples being decoded, one row each; tensors ``[E, ...]``."""

    FIELDS = (
        "example",
        "slots",
        "steps",
        "frame",
        "scores",
        "last_ids",
        "tokens",
        "ancestry",
        "best_score",
        "best_tokens",
        "best_length",
        "all_ended",
        "trace_scores",
        "trace_ids",
        "trace_parents",
    )

    def __init__(
        self, examples: Sequence[int], slots: Sequence[int], options: SearchOptions, device: torch.device
    ) -> None:
        with device:
            self._allocate(examples, slots, options)

    def _allocate(self, examples: Sequence[int], slots: Sequence[int], options: SearchOptions) -> None:
        count, beams, length = len(examples), options.beam_size, options.max_tgt_length
        frames = length if options.need_score_traces else 0
        self.example = torch.tensor(examples, dtype=torch.int64)
        self.slots = torch.tensor(slots, dtype=torch.int32)
        self.steps = torch.full((count,), int(options.pos_shift), dtype=torch.int32)
        self.frame = torch.zeros(count, dtype=torch.int64)
        self.scores = torch.zeros(count, beams)
        self.last_ids = torch.full((count, beams), -1, dtype=torch.int32)
        self.tokens = torch.zeros(count, beams, length, dtype=torch.int32)
        self.ancestry = torch.zeros(count, beams, length + int(options.pos_shift), dtype=torch.int32)
        self.best_score = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.best_tokens = torch.zeros(count, length, dtype=torch.int32)
        self.best_length = torch.zeros(count, dtype=torch.int64)
        self.all_ended = torch.full((count,), -1, dtype=torch.int64)
        self.trace_scores = torch.zeros(count, frames, beams)
        self.trace_ids = torch.zeros(count, frames, beams, dtype=torch.int32)
        self.trace_parents = torch.zeros(count, frames, beams, dtype=torch.int32)

    def __len__(self) -> int:
        return self.example.numel()

    def clone(self) -> LiveExamples:
        copy = object.__new__(LiveExamples)
        for name in self.FIELDS:
            setattr(copy, name, getattr(self, name).clone())
        return copy

    def at(self, rows: Sequence[int]) -> LiveExamples:
        """Some of the examples, on the CPU."""
        index = torch.tensor(rows, device=self.example.device)
        some = object.__new__(LiveExamples)
        for name in self.FIELDS:
            setattr(some, name, getattr(self, name)[index].cpu())
        return some

    def copy(self, other: LiveExamples) -> None:
        """Takes over the values of as many other examples, in place."""
        for name in self.FIELDS:
            getattr(self, name).copy_(getattr(other, name))

    def keep(self, rows: torch.Tensor) -> None:
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name)[rows])

    def extend(self, other: LiveExamples) -> None:
        for name in self.FIELDS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


class BeamSearch:
    """Decodes sources with an engine.

    Args:
        engine: the packed model.
        options: what to search for.
        special: ids of the tokenizer.
        ignored: ids that n-gram blocking overlooks.
    """

    # A prefill reads this many tokens at a time: enough for full products, few enough to stay in the caches.
    PREFILL_TOKENS = 2048

    def __init__(
        self, engine: InferenceEngine, options: SearchOptions, special: SpecialIds, ignored: Sequence[int] = ()
    ) -> None:
        self.engine = engine
        self.options = options
        self.special = special
        self._ignored = torch.tensor(sorted(ignored), dtype=torch.int32, device=engine.device)
        frames = torch.arange(options.max_tgt_length, dtype=torch.float64, device=engine.device)
        penalty = max(options.length_penalty, 0.0) if options.constrained else 0.0
        self._divisors = ((5 + frames + 1) / 6) ** penalty
        self._early_exit = options.early_exit and not options.need_score_traces

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
        slots = min(options.batch_size, len(sources))
        cache = self.engine.new_cache(
            slots=slots,
            beams=options.beam_size,
            source_capacity=len(sources[waiting[0]]),
            steps=options.max_tgt_length + int(options.pos_shift),
        )
        if self.engine.device.type == "cuda":
            yield from PooledSearch(self, cache).run(sources, waiting)
            return
        free = list(range(slots))
        live: LiveExamples | None = None
        while waiting or live is not None:
            if self.admits(len(free), slots, live is not None, len(waiting)):
                entering = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                fresh = self.enter(sources, entering, [free.pop() for _ in entering], cache)
                if live is None:
                    live = fresh
                else:
                    live.extend(fresh)
            else:
                assert live is not None
                self.step(live, cache)
            done = self.finished(live)
            if bool(done.any()):
                for row in done.nonzero().flatten().tolist():
                    yield int(live.example[row]), self.winner(live, row)
                free.extend(live.slots[done].tolist())
                live.keep(~done)
                if not len(live):
                    live = None

    def new_live(self, examples: Sequence[int], slots: Sequence[int]) -> LiveExamples:
        """State of examples that have taken no step."""
        return LiveExamples(examples, slots, self.options, self.engine.device)

    def admits(self, free: int, slots: int, live: bool, waiting: int) -> bool:
        """Whether waiting sentences enter now: a few at a time, so that their products are not too small."""
        if not waiting or not free:
            return False
        if not live:
            return True
        return self.options.continuous_batching and free >= max(1, slots // 8)

    def enter(
        self, sources: Sequence[Sequence[int]], examples: list[int], slots: list[int], cache: DecodeCache
    ) -> LiveExamples:
        """Prefills the sources of new examples and takes their first step."""
        live = self.new_live(examples, slots)
        query = self.special.sep if self.options.pos_shift else self.special.mask
        hidden = []
        start = 0
        while start < len(examples):
            stop, tokens = start, 0
            while stop < len(examples) and (
                stop == start or tokens + len(sources[examples[stop]]) < self.PREFILL_TOKENS
            ):
                tokens += len(sources[examples[stop]])
                stop += 1
            hidden.append(
                self.engine.prefill(
                    [sources[e] for e in examples[start:stop]],
                    query,
                    live.slots[start:stop],
                    cache,
                    keep_query=self.options.pos_shift,
                    causal_source=self.options.mode == "l2r",
                )
            )
            start = stop
        scores, ids = self._predict(live, torch.cat(hidden), beams=1)
        parents = torch.zeros_like(ids)
        self._advance(live, scores.view(len(live), -1), ids.view(len(live), -1), parents.view(len(live), -1))
        return live

    def step(self, live: LiveExamples, cache: DecodeCache) -> None:
        """One step of every live example."""
        mask = None if self.options.pos_shift else self.special.mask
        hidden = self.engine.step(live.last_ids, mask, live.slots, live.steps, live.ancestry, cache)
        candidate_scores, candidate_ids = self._predict(live, hidden, beams=self.options.beam_size)
        shape = (len(live), self.options.beam_size, -1)
        end = self.special.sep if self.options.constrained else -1
        scores, ids, parents = ops.beam_step(
            candidate_scores.view(shape), candidate_ids.view(shape), live.scores, live.last_ids, end
        )
        if self.options.constrained:
            index = parents.long()[:, :, None]
            live.tokens = live.tokens.gather(1, index.expand_as(live.tokens))
            live.ancestry = live.ancestry.gather(1, index.expand_as(live.ancestry))
        # The last token of each hypothesis has just been stored under the beam that was its parent.
        here = live.steps.long()[:, None, None].expand(-1, self.options.beam_size, 1)
        live.ancestry.scatter_(2, here, parents[:, :, None])
        live.steps = live.steps + 1
        self._advance(live, scores, ids, parents)

    def _predict(self, live: LiveExamples, hidden: torch.Tensor, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates of each hypothesis under the constraints."""
        options = self.options
        if not options.constrained:
            return self.engine.predict(hidden, 1)
        banned = None
        if options.forbid_duplicate_ngrams and beams > 1:
            lengths = live.frame.int().repeat_interleave(beams)
            banned = ops.ban_repeated_ngrams(live.tokens.flatten(0, 1), lengths, options.ngram_size, self._ignored)
        suppress = (live.frame + 1 <= options.min_len).repeat_interleave(beams)
        return self.engine.predict(hidden, options.beam_size, banned, self.special.sep, suppress)

    def _advance(self, live: LiveExamples, scores: torch.Tensor, ids: torch.Tensor, parents: torch.Tensor) -> None:
        """Enters the chosen hypotheses of a frame and keeps the best ended one."""
        live.scores, live.last_ids = scores, ids
        at = live.frame[:, None, None].expand(-1, self.options.beam_size, 1)
        live.tokens.scatter_(2, at, ids[:, :, None])
        if self.options.need_score_traces:
            row = torch.arange(len(live), device=live.frame.device)
            live.trace_scores[row, live.frame] = scores
            live.trace_ids[row, live.frame] = ids
            live.trace_parents[row, live.frame] = parents
        ended = ids == self.special.sep
        counts = ended | (live.frame == self.options.max_tgt_length - 1)[:, None]
        open_frames = (live.all_ended < 0)[:, None]
        final = scores.double() / self._divisors[live.frame][:, None]
        final = final.masked_fill(~(counts & open_frames), -torch.inf)
        best, slot = final.max(dim=1)
        better = best > live.best_score
        live.best_score = torch.where(better, best, live.best_score)
        winner = live.tokens.gather(1, slot[:, None, None].expand(-1, 1, live.tokens.shape[2]))[:, 0]
        live.best_tokens = torch.where(better[:, None], winner, live.best_tokens)
        live.best_length = torch.where(better, live.frame + 1, live.best_length)
        all_ended = ended.all(dim=1) & (live.all_ended < 0)
        live.all_ended = torch.where(all_ended, live.frame, live.all_ended)
        live.frame = live.frame + 1

    def finished(self, live: LiveExamples) -> torch.Tensor:
        """Which examples have their answer: bool ``[E]``."""
        steps = self.options.max_tgt_length
        done = live.frame >= steps
        if not self._early_exit:
            return done
        if not self.options.constrained:
            last = live.last_ids[:, 0]
            return done | (last == self.special.sep) | (last == self.special.pad)
        alive = live.last_ids != self.special.sep
        slack = ROUNDING * (steps - live.frame).double()
        bound = live.scores.double().masked_fill(~alive, -torch.inf).max(dim=1).values + slack
        # A log-probability is at most 0, so a live score can only fall, while the divisor grows to its last value.
        bound = torch.where(bound < 0, bound / self._divisors[-1], bound)
        return done | (live.all_ended >= 0) | (live.best_score >= bound)

    def winner(self, live: LiveExamples, row: int) -> Hypothesis:
        frames = int(live.frame[row])
        last_frame = int(live.all_ended[row]) if live.all_ended[row] >= 0 else frames - 1
        trace = None
        if self.options.need_score_traces:
            trace = Trace(
                live.trace_scores[row].tolist(),
                live.trace_ids[row].tolist(),
                live.trace_parents[row].tolist(),
                last_frame,
            )
        if self.options.constrained:
            ids = live.best_tokens[row, : int(live.best_length[row])].tolist()
            return Hypothesis(ids, float(live.best_score[row]), last_frame, trace)
        ended = bool(torch.isfinite(live.best_score[row]))
        score = live.best_score[row] if ended else live.scores[row, 0]
        return Hypothesis(live.tokens[row, 0, :frames].tolist(), float(score), last_frame)
