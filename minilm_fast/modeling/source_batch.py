"""Sources as a prefill reads them: numbers in one tensor, so that they go to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from minilm_fast.ops import SequenceLayout

# Triton compiles a kernel anew for tensors that start elsewhere than at multiples of 16 bytes.
ALIGNMENT = 4


def _sizes(sources: int, tokens: int, idle: bool) -> list[int]:
    sequences = sources + int(idle)
    return [tokens, tokens, tokens, sources, 3 * sequences, sequences + 1]


def _places(sizes: list[int]) -> list[int]:
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]


def number_count(sources: int, tokens: int, idle: bool) -> int:
    """How many numbers a :class:`SourceBatch` has."""
    return sum(_places(_sizes(sources, tokens, idle)))


class SourceBatch:
    """Packed sources, each followed by its first query row, and perhaps an idle sequence that fills up the tokens.

    Args:
        numbers: from :func:`pack`, on any device; the tensors below are parts of it.
        sources: how many there are.
        tokens: how many there are, query rows and idle ones included.
        longest: at least the length of the longest sequence.
        idle: whether there is an idle sequence.

    Attributes:
        ids, positions, types: int32 ``[tokens]``.
        counts: int32 ``[sources]``: their lengths without the query rows.
        layout: which tokens see which.
    """

    def __init__(self, numbers: torch.Tensor, sources: int, tokens: int, longest: int, idle: bool) -> None:
        sizes = _sizes(sources, tokens, idle)
        parts = [part[:size] for part, size in zip(numbers.split(_places(sizes)), sizes, strict=True)]
        self.ids, self.positions, self.types, self.counts, segments, cu_seqlens = parts
        self.layout = SequenceLayout(cu_seqlens, segments.view(-1, 3), longest, tokens)

    def query_rows(self) -> torch.Tensor:
        """Which tokens are the query rows: int64 ``[sources]``."""
        return self.layout.cu_seqlens[1 : self.counts.numel() + 1].long() - 1


def pack(
    sources: Sequence[Sequence[int]],
    query_id: int,
    *,
    types: tuple[int, int],
    causal: bool = False,
    tokens: int | None = None,
) -> torch.Tensor:
    """The numbers of a :class:`SourceBatch`, int32 on the CPU.

    Args:
        sources: ids of each source, special tokens included.
        query_id: id of the query rows.
        types: token types of source and query rows.
        causal: a source sees only what is before it.
        tokens: if given, an idle sequence, which may be empty, makes up for what is missing.
    """
    counts = [len(source) for source in sources]
    ids = [token for source in sources for token in (*source, query_id)]
    kinds = [kind for n in counts for kind in (*[types[0]] * n, types[1])]
    positions = [torch.arange(n + 1, dtype=torch.int32) for n in counts]
    segments = [(0, n + 1, 0) if causal else (n, 1, 0) for n in counts]
    if tokens is not None:
        idle = tokens - len(ids)
        ids += [query_id] * idle
        kinds += [types[0]] * idle
        positions.append(torch.zeros(idle, dtype=torch.int32))
        segments.append((0, idle, 0) if causal else (idle, 0, 0))
    ends = accumulate(map(sum, segments), initial=0)
    lists = [ids, [], kinds, counts, [n for segment in segments for n in segment], list(ends)]
    fields = [torch.tensor(x, dtype=torch.int32) for x in lists]
    fields[1] = torch.cat(positions)
    places = _places([field.numel() for field in fields])
    numbers = torch.zeros(sum(places), dtype=torch.int32)
    for part, field in zip(numbers.split(places), fields, strict=True):
        part[: field.numel()] = field
    return numbers
