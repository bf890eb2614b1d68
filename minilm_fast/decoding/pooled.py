"""Beam search on a GPU: a fixed pool of examples whose step is a CUDA graph that is captured once and replayed.

Every tensor of the search stays where it is. An example that has its answer stands still, its row is computed all the
same, until a waiting one takes its place. The host never waits for the step that it has just started: it looks at what
the step before said of who has finished, so the device always has work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from minilm_fast.decoding.result import Hypothesis
from minilm_fast.modeling.inference import DecodeCache

if TYPE_CHECKING:
    from minilm_fast.decoding.search import BeamSearch, LiveExamples

# Steps under way whose outcome the host has not looked at.
IN_FLIGHT = 2
# Runs before the capture, in which libraries allocate and kernels are compiled.
WARM_UP = 2


class Replayed:
    """A function without arguments that only changes tensors in place; on a GPU captured at the first call.

    Args:
        function: what to run. It must not wait for the device.
        restore: undoes what the runs before the capture changed.
        device: where its tensors are; on a CPU the function is called each time.
    """

    def __init__(self, function: Callable[[], None], restore: Callable[[], None], device: torch.device) -> None:
        self._function = function
        self._restore = restore
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._device.type != "cuda":
            self._function()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._function()
            self._restore()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._function()
        return graph


class _Flags:
    """Which rows had finished after each of the last steps, on their way to the host."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, flags: torch.Tensor) -> None:
        if flags.device.type != "cuda":
            self._pending.append((flags.clone(), None))
            return
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))

    def receive(self) -> torch.Tensor:
        """The oldest flags; waits for them."""
        host, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return host


class PooledSearch:
    """Runs a search on a pool; one row a slot of the cache.

    Args:
        search: what to search and with which engine.
        cache: has as many slots as the pool rows.
    """

    def __init__(self, search: BeamSearch, cache: DecodeCache) -> None:
        self._search = search
        self._cache = cache
        slots = cache.source_lengths.numel()
        self._pool: LiveExamples = search.new_live(range(slots), range(slots))
        device = self._pool.frame.device
        self._running = torch.zeros(slots, dtype=torch.bool, device=device)
        self._saved: LiveExamples | None = None
        self._step = Replayed(self._advance, self._restore, device)

    def run(self, sources: Sequence[Sequence[int]], waiting: deque[int]) -> Iterator[tuple[int, Hypothesis]]:
        """Decodes the waiting sources and yields ``(index, winner)`` as they finish."""
        slots = len(self._pool)
        owners: dict[int, int] = {}
        entered: dict[int, int] = {}
        free = list(reversed(range(slots)))
        flags = _Flags()
        count = 0
        while waiting or owners:
            if self._search.admits(len(free), slots, bool(owners), len(waiting)):
                rows = [free.pop() for _ in range(min(len(free), len(waiting)))]
                examples = [waiting.popleft() for _ in rows]
                self._enter(sources, examples, rows)
                owners |= dict(zip(rows, examples, strict=True))
                # What a row's flags said before belongs to the example that had it then.
                entered |= dict.fromkeys(rows, count)
            else:
                self._take_step()
            flags.send(~self._running)
            count += 1
            if len(flags) < IN_FLIGHT:
                continue
            about = count - len(flags)
            done = flags.receive().nonzero().flatten().tolist()
            done = [row for row in done if row in owners and entered[row] <= about]
            if done:
                answers = self._pool.at(done)
                for place, row in enumerate(done):
                    yield owners.pop(row), self._search.winner(answers, place)
                free += done

    def _enter(self, sources: Sequence[Sequence[int]], examples: list[int], rows: list[int]) -> None:
        fresh = self._search.enter(sources, examples, rows, self._cache)
        index = torch.tensor(rows, device=self._running.device)
        for name in self._pool.FIELDS:
            getattr(self._pool, name)[index] = getattr(fresh, name)
        self._running[index] = ~self._search.finished(fresh)

    def _take_step(self) -> None:
        if self._saved is None:
            self._saved = self._pool.clone()
            self._saved_running = self._running.clone()
        self._step()

    def _restore(self) -> None:
        assert self._saved is not None
        self._pool.copy(self._saved)
        self._running.copy_(self._saved_running)

    def _advance(self) -> None:
        """One step of the rows that run; the others keep what they have."""
        running = self._running
        work = self._pool.clone()
        # A row that stands still may have no room for another step, or never have had a token.
        work.frame = work.frame.where(running, 0)
        work.steps = work.steps.where(running, 0)
        work.last_ids = work.last_ids.where(running[:, None], 0)
        self._search.step(work, self._cache)
        finished = self._search.finished(work)
        for name in self._pool.FIELDS:
            kept = getattr(self._pool, name)
            kept.copy_(getattr(work, name).where(running.view(-1, *[1] * (kept.dim() - 1)), kept))
        running &= ~finished
