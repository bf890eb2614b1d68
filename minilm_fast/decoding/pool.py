"""The memory of a search on a GPU and its captured steps."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from minilm_fast.decoding.state import StateLayout
from minilm_fast.modeling.source_batch import SourceBatch, number_count
from minilm_fast.ops import BeamState, noted_fallbacks

if TYPE_CHECKING:
    from minilm_fast.decoding.search import BeamSearch

# Runs before the capture, in which libraries allocate and kernels are compiled.
WARM_UP = 2
# So many steps must have wanted a size that there is no graph for, while there is one for a larger size, before it is
# captured: a capture takes as long as hundreds of steps.
PATIENCE = 256
# The same of prefills, each of which takes as long to start as tens of steps.
PREFILL_PATIENCE = 2
# Prefills of more tokens keep a GPU busy while their kernels are started one by one.
MOST_PREFILL_TOKENS = 2048
# Captured prefills are filled up to a multiple of this.
TOKEN_MULTIPLE = 128
MOST_PREFILLS = 64
# Room for sources is made in multiples of this, so that the next search, with slightly longer ones, has it too.
CAPACITY_MULTIPLE = 128


def sizes_to(most: int) -> list[int]:
    """For how many rows steps are computed in a pool: ``most``, and all 2^n and 3 * 2^n below it."""
    return sorted({most, *(step << n for step in (1, 3) for n in range(most.bit_length()) if step << n < most)})


def room_for(examples: int, batch_size: int) -> int:
    """How many slots a pool gets that so many examples need: one of few numbers, at most the batch size."""
    return next(size for size in sizes_to(batch_size) if size >= examples)


# There may be only one capture at a time in a process.
_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep working memory for each stream that they have seen."""
    return torch.cuda.Stream(device)


def capture(function: Callable[[], None], device: torch.device, memory: Any) -> torch.cuda.CUDAGraph | None:
    """A graph of what a function does on a device; running it twice must do no harm.

    None if there can be none, as an operator runs as its specification, which may wait for the device.
    """
    side, graph = _capture_stream(device), torch.cuda.CUDAGraph()
    with _capturing:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), noted_fallbacks() as fallbacks:
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        if fallbacks:
            return None
        # Other threads may go on with what is forbidden to this one, such as pinning memory.
        with torch.cuda.graph(graph, pool=memory, stream=side, capture_error_mode="thread_local"):
            function()
    return graph


def pinned_like(x: torch.Tensor) -> torch.Tensor:
    """Memory of the host for as many numbers, from and to which a device copies without the host's waiting."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)


class Prefill:
    """A prefill of so many sources of so many tokens, with what it reads at a fixed place.

    Args:
        pool: where the examples go.
        sources: how many.
        tokens: of all, query rows and an idle sequence included.
    """

    def __init__(self, pool: Pool, sources: int, tokens: int) -> None:
        self._pool = pool
        # The idle sequence is shorter than TOKEN_MULTIPLE.
        longest = min(tokens, max(pool.source_capacity + 1, TOKEN_MULTIPLE))
        sizes = [number_count(sources, tokens, idle=True), sources]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=pool.device)
        numbers, self._places = self._numbers.split(sizes)
        self._batch = SourceBatch(numbers, sources, tokens, longest, idle=True)
        self._uses = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, search: BeamSearch, sources: Sequence[Sequence[int]], places: list[int]) -> None:
        """Runs it, on a GPU in the end as a graph."""
        given = search.pack(sources, self._batch.ids.numel())
        given = torch.cat([given, torch.tensor(places, dtype=torch.int32)])
        self._numbers.copy_(pinned_like(given).copy_(given) if self._pool.on_gpu else given, non_blocking=True)
        self._uses += 1
        if self._graph is None and self._uses > PREFILL_PATIENCE:
            self._graph = self._pool.capture_prefill(lambda: self._run(search))
        if self._graph is None:
            self._run(search)
        else:
            self._graph.replay()

    def _run(self, search: BeamSearch) -> None:
        search.enter_packed(self._batch, self._places, self._pool.cache, self._pool.state)


class Pool:
    """The memory of a search and its captured steps; it does not hold the engine, whose weights the graphs read.

    Args:
        search: whose options and engine it is for.
        slots: examples at a time.
        source_capacity: longest source.
    """

    def __init__(self, search: BeamSearch, slots: int, source_capacity: int) -> None:
        self.capacity = slots
        self.source_capacity = source_capacity
        self.layout = StateLayout(slots, search.options)
        self.cache = search.new_cache(slots, source_capacity)
        self.buffer = torch.zeros(self.layout.bytes, dtype=torch.uint8, device=search.engine.device)
        self.device = device = self.buffer.device
        self.on_gpu = self.captures = self._captures_prefills = device.type == "cuda"
        self.state = BeamState(**self.layout.over(self.buffer))
        self._all_slots = torch.arange(slots, dtype=torch.int32, device=device)
        self.slots = self._all_slots.clone()
        # The graphs read these.
        self._rules = search.rules._replace(divisors=search.rules.divisors.to(device))
        self._ignored = search.ignored.to(device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if self.captures else None
        self._prefills: dict[tuple[int, int], Prefill] = {}
        self._wanted: Counter[int] = Counter()
        self._idle: torch.cuda.Event | None = None
        self._sizes = sizes_to(slots)

    def start(self, search: BeamSearch) -> None:
        """Makes it ready for a search, and the search for it: all rows stand still."""
        search.rules, search.ignored = self._rules, self._ignored
        if self._idle is not None:
            torch.cuda.current_stream(self.device).wait_event(self._idle)
        self.buffer.zero_()
        self.slots.copy_(self._all_slots)

    def end(self) -> None:
        """Called when the last step of a search has been started."""
        if self.on_gpu:
            self._idle = torch.cuda.Event()
            self._idle.record(torch.cuda.current_stream(self.device))

    def size_for(self, examples: int) -> int:
        """For how many rows a step is to be computed that so many examples take."""
        fitting = next(size for size in self._sizes if size >= examples)
        captured = [size for size in self._graphs if size >= examples]
        if not self.captures or fitting in captured or not captured:
            return fitting
        self._wanted[fitting] += 1
        return fitting if self._wanted[fitting] > PATIENCE else min(captured)

    def first(self, size: int) -> tuple[BeamState, torch.Tensor]:
        """State and slots of the first rows."""
        return BeamState(*(x[:size] for x in self.state)), self.slots[:size]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Moves rows to places that nothing is read from any more."""
        source, target = torch.tensor([sources, targets]).to(self.device)
        for x in (self.slots, *self.state):
            x[target] = x[source]

    def step(self, search: BeamSearch, size: int) -> None:
        """One step of the first rows; on a GPU captured when the size is first used."""
        if self.captures and size not in self._graphs:
            self._capture_step(search, size)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._step(search, size)

    def _step(self, search: BeamSearch, size: int) -> None:
        search.step(*self.first(size), self.cache)

    def _capture_step(self, search: BeamSearch, size: int) -> None:
        # A step of rows that stand still changes nothing but the last entry of the history, which is written again.
        running = self.state.running.clone()
        self.state.running.zero_()
        graph = capture(lambda: self._step(search, size), self.device, self._memory)
        self.state.running.copy_(running)
        if graph is None:
            self.captures = False
        else:
            self._graphs[size] = graph

    def capture_prefill(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of a prefill, if there can be one; none is tried for again once there could not."""
        if not self._captures_prefills:
            return None
        graph = capture(function, self.device, self._memory)
        self._captures_prefills = graph is not None
        return graph

    def enter(self, search: BeamSearch, sources: Sequence[Sequence[int]], places: list[int]) -> None:
        """Reads sources and takes their first step; each goes to the slot and the row of the same number."""
        tokens = sum(map(len, sources)) + len(sources)
        tokens += -tokens % TOKEN_MULTIPLE
        if tokens > MOST_PREFILL_TOKENS:
            rows = torch.tensor(places, dtype=torch.int32).to(self.device)
            search.enter(sources, rows, self.cache, self.state, rows)
            return
        key = (len(sources), tokens)
        prefill = self._prefills.pop(key, None) or Prefill(self, *key)
        while len(self._prefills) >= MOST_PREFILLS:
            self._prefills.pop(next(iter(self._prefills)))
        self._prefills[key] = prefill
        prefill(search, sources, places)
