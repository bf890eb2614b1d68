"""Beam search on a GPU: a fixed pool of examples whose step is a CUDA graph that is captured once and replayed.

Every tensor of the search stays where it is. An example that has its answer stands still, its row is computed all the
same, until a waiting one takes its place. Once none waits, the rows in use are moved to the front as they become fewer,
and a step is computed for so many of the first rows as are needed. The host never waits for the step that it has just
started: it looks at what the step before left, so the device always has work.

A pool is kept by the engine and used again, graphs included, by the next search with the same options.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from minilm_fast.decoding.pool import CAPACITY_MULTIPLE, Pool, pinned_like, room_for
from minilm_fast.decoding.result import Hypothesis
from minilm_fast.decoding.state import winner
from minilm_fast.errors import is_out_of_memory
from minilm_fast.ops import forced_backend

if TYPE_CHECKING:
    from minilm_fast.decoding.search import BeamSearch

T = TypeVar("T")

# Steps under way whose outcome the host has not looked at.
IN_FLIGHT = 2
# Pools that an engine keeps.
KEPT_POOLS = 2


class _Answers:
    """What the last steps left of what an answer is read from, on its way to the host, and whose each row was then."""

    def __init__(self, pool: Pool) -> None:
        self._part = pool.buffer[: pool.layout.answer_bytes]
        self._on_gpu = pool.on_gpu
        self._layout = pool.layout
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event | None, dict[int, int]]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, rows: dict[int, int]) -> None:
        """Starts the copy; ``rows``: the row of each example."""
        if not self._on_gpu:
            self._pending.append((self._part.clone(), None, dict(rows)))
            return
        host = pinned_like(self._part)
        host.copy_(self._part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, dict(rows)))

    def receive(self) -> tuple[dict[str, torch.Tensor], dict[int, int]]:
        """The oldest; waits for it."""
        host, event, rows = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return self._layout.over(host), rows


def on_device(device: torch.device, results: Generator[T, None, None]) -> Iterator[T]:
    """Runs a generator with a device as the current one, for streams and captures, but not what is done between."""
    if device.type != "cuda":
        yield from results
        return
    try:
        while True:
            with torch.cuda.device(device):
                try:
                    result = next(results)
                except StopIteration:
                    return
            yield result
    finally:
        results.close()


class PooledSearch:
    """Runs a search on a pool, which it takes from the engine or makes.

    Args:
        search: what to search and with which engine.
        slots: examples side by side.
        source_capacity: the longest source.
    """

    def __init__(self, search: BeamSearch, slots: int, source_capacity: int) -> None:
        self._search = search
        self._slots = slots
        self._capacity = source_capacity

    def run(self, sources: Sequence[Sequence[int]], waiting: deque[int]) -> Iterator[tuple[int, Hypothesis]]:
        """Decodes the waiting sources and yields ``(index, winner)`` as they finish."""
        yield from on_device(self._search.engine.device, self._run(sources, waiting))

    def _run(
        self, sources: Sequence[Sequence[int]], waiting: deque[int]
    ) -> Generator[tuple[int, Hypothesis], None, None]:
        kept, key = self._search.engine.kept, self._key()
        try:
            pool = self._take(kept.pop(key, None))
            yield from self._decode(pool, sources, waiting)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                kept.clear()
            raise
        pool.end()
        while len(kept) >= KEPT_POOLS:
            kept.pop(next(iter(kept)))
        kept[key] = pool

    def _key(self) -> Hashable:
        """All that a captured step depends on but for the engine and the sizes."""
        search = self._search
        options = dataclasses.replace(search.options, batch_size=1)
        settings = (forced_backend(), torch.get_float32_matmul_precision())
        return options, search.special, search.ignored_ids, settings

    def _take(self, pool: Pool | None) -> Pool:
        if pool is not None and pool.capacity >= self._slots and pool.source_capacity >= self._capacity:
            return pool
        del pool
        slots = room_for(self._slots, max(self._slots, self._search.options.batch_size))
        capacity = -(-self._capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        try:
            return Pool(self._search, slots, capacity)
        except (MemoryError, RuntimeError) as error:
            if not self._search.engine.kept or not is_out_of_memory(error):
                raise
        self._search.engine.kept.clear()
        return Pool(self._search, slots, capacity)

    def _decode(
        self, pool: Pool, sources: Sequence[Sequence[int]], waiting: deque[int]
    ) -> Iterator[tuple[int, Hypothesis]]:
        options = self._search.options
        rows: dict[int, int] = {}
        frames: dict[int, int] = {}
        free = list(reversed(range(self._slots)))
        pool.start(self._search)
        size = pool.size_for(self._slots)
        answers = _Answers(pool)
        while waiting or rows:
            if self._search.admits(len(free), self._slots, bool(rows), len(waiting)):
                count = self._search.group(self._slots) if rows else self._slots
                entering = {waiting.popleft(): free.pop() for _ in range(min(count, len(free), len(waiting)))}
                # As long as examples wait no row has been moved: each has the slot of its number.
                pool.enter(self._search, [sources[e] for e in entering], list(entering.values()))
                rows |= entering
                frames |= dict.fromkeys(entering, 1)
                answers.send(rows)
            elif any(frames[example] < options.max_tgt_length for example in rows):
                if not waiting:
                    size = self._shrink(pool, rows, size)
                pool.step(self._search, size)
                for example in rows:
                    frames[example] += 1
                answers.send(rows)
            else:
                # All have their last frame; it only has to arrive.
                assert len(answers)
                yield from self._finished(answers, rows, free)
                continue
            if len(answers) >= IN_FLIGHT:
                yield from self._finished(answers, rows, free)

    def _shrink(self, pool: Pool, rows: dict[int, int], size: int) -> int:
        """Moves what is left to the front if a smaller step will do; changes ``rows`` and gives the new size."""
        smaller = min(size, pool.size_for(len(rows)))
        moved = [example for example, row in rows.items() if row >= smaller]
        if moved:
            used = set(rows.values())
            targets = [row for row in range(smaller) if row not in used][: len(moved)]
            pool.move([rows[example] for example in moved], targets)
            rows |= dict(zip(moved, targets, strict=True))
        return smaller

    def _finished(self, answers: _Answers, rows: dict[int, int], free: list[int]) -> Iterator[tuple[int, Hypothesis]]:
        """Takes out the examples that had finished as of the oldest copy."""
        found, then = answers.receive()
        running = found["running"].tolist()
        for example, row in then.items():
            if example in rows and not running[row]:
                free.append(rows.pop(example))
                yield example, winner(found, row, self._search.options)
