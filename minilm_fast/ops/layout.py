"""Packed sequences and the attention mask as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

Counts = Sequence[int] | torch.Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Where each sequence of a packed batch lies and which tokens of it see which.

    Sequence ``i`` is tokens ``cu_seqlens[i]:cu_seqlens[i + 1]``; in it come first the source, then the target,
    then the pseudo tokens, as many of each as ``segments[i]`` says. Source rows see the source; target row ``j``
    sees the source and target ``0..j``; pseudo row ``j`` sees the source, target ``0..j-1`` and itself (UniLM v2,
    section 3.2). A bidirectional sequence is all source, a causal one all target.

    Attributes:
        cu_seqlens: int32 ``[batch + 1]``, ascending from 0.
        segments: int32 ``[batch, 3]``: numbers of source, target and pseudo tokens.
        max_seqlen: length of the longest sequence.
        total: number of tokens.
        cu_queries: int32 ``[batch + 1]`` or None: of sequence ``i`` only the last
            ``cu_queries[i + 1] - cu_queries[i]`` rows ask (see :meth:`with_queries`).
        total_queries: number of rows that ask.
        only_sources: True where it is known that every token is a source token.
    """

    cu_seqlens: torch.Tensor
    segments: torch.Tensor
    max_seqlen: int
    total: int
    cu_queries: torch.Tensor | None = None
    total_queries: int = -1
    only_sources: bool = False

    def __post_init__(self) -> None:
        if self.cu_queries is None:
            object.__setattr__(self, "total_queries", self.total)

    @classmethod
    def from_counts(
        cls, source: Counts, target: Counts, pseudo: Counts, device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """Builds a layout from the three counts of each sequence.

        Raises:
            ValueError: the counts differ in number or one is negative.
        """
        columns = [torch.as_tensor(c, dtype=torch.int32).reshape(-1) for c in (source, target, pseudo)]
        if len({c.numel() for c in columns}) != 1:
            raise ValueError("source, target and pseudo must have one count per sequence")
        segments = torch.stack(columns, dim=1)
        if segments.numel() and int(segments.min()) < 0:
            raise ValueError("a sequence cannot have a negative number of tokens")
        lengths = segments.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        longest = int(lengths.max()) if lengths.numel() else 0
        return cls(cu_seqlens.to(device), segments.to(device), longest, int(cu_seqlens[-1]))

    @classmethod
    def bidirectional(cls, lengths: Counts, device: torch.device | str = "cpu") -> SequenceLayout:
        """Every token of a sequence sees every other (BERT)."""
        counts = [int(n) for n in (lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)]
        if min(counts, default=0) < 0:
            raise ValueError("a sequence cannot have a negative number of tokens")
        starts = [0, *accumulate(counts)]
        segments = torch.tensor([part for n in counts for part in (n, 0, 0)], dtype=torch.int32, device=device)
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        longest = max(counts, default=0)
        return cls(cu_seqlens, segments.view(-1, 3), longest, starts[-1], only_sources=True)

    @classmethod
    def causal(cls, lengths: Counts, device: torch.device | str = "cpu") -> SequenceLayout:
        """Every token sees itself and those before it."""
        return cls.from_counts([0] * len(lengths), lengths, [0] * len(lengths), device)

    @classmethod
    def seq2seq(cls, source: Counts, target: Counts, device: torch.device | str = "cpu") -> SequenceLayout:
        """UniLM's sequence-to-sequence mask (arXiv 1905.03197, section 2.3)."""
        return cls.from_counts(source, target, [0] * len(source), device)

    @classmethod
    def pseudo_masked(cls, source: Counts, target: Counts, device: torch.device | str = "cpu") -> SequenceLayout:
        """Source, target and as many pseudo tokens as target tokens (arXiv 2002.12804, section 3.2)."""
        return cls.from_counts(source, target, target, device)

    def with_queries(self, counts: Counts) -> SequenceLayout:
        """The same sequences, of which only the last ``counts[i]`` rows ask; all rows are still seen.

        This is what the last layer needs when only these rows are read.

        Raises:
            ValueError: not one count per sequence, or a count is negative or above the sequence's length.
        """
        queries = torch.as_tensor(counts, dtype=torch.int32, device=self.segments.device).reshape(-1)
        lengths = self.cu_seqlens.diff()
        if queries.shape != lengths.shape:
            raise ValueError(f"{lengths.numel()} sequences, but {queries.numel()} counts of queries")
        if bool(((queries < 0) | (queries > lengths)).any()):
            raise ValueError("the count of queries must be between 0 and the length of the sequence")
        cu_queries = torch.zeros_like(self.cu_seqlens)
        cu_queries[1:] = queries.cumsum(0)
        return replace(self, cu_queries=cu_queries, total_queries=int(cu_queries[-1]))

    def without_queries(self) -> SequenceLayout:
        """The same sequences, of which all rows ask."""
        return replace(self, cu_queries=None, total_queries=self.total)

    def query_index(self) -> torch.Tensor:
        """The tokens that ask: int64 ``[total_queries]``."""
        index = torch.arange(self.total_queries, device=self.segments.device)
        if self.cu_queries is None:
            return index
        shift = (self.cu_seqlens[1:] - self.cu_queries[1:]).long()
        return index + shift.repeat_interleave(self.cu_queries.diff(), output_size=self.total_queries)

    def in_source(self) -> torch.Tensor:
        """Which tokens belong to a source: bool ``[total]``."""
        end = (self.cu_seqlens[:-1] + self.segments[:, 0]).repeat_interleave(
            self.cu_seqlens.diff(), output_size=self.total
        )
        return torch.arange(self.total, device=end.device) < end

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on a device."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            cu_queries=None if self.cu_queries is None else self.cu_queries.to(device, non_blocking=True),
        )

    def dense_mask(self) -> torch.Tensor:
        """The mask as a matrix: bool ``[batch, max_seqlen, max_seqlen]``, True where a row sees a column.

        Rows and columns beyond a sequence's length are False. The specification of the rules above, for tests
        and the reference; the kernels never build it.
        """
        source, target, pseudo = (c.long()[:, None, None] for c in self.segments.unbind(1))
        index = torch.arange(self.max_seqlen, device=self.segments.device)
        row, column = index[None, :, None], index[None, None, :]
        length = source + target + pseudo
        in_target = (row >= source) & (row < source + target)
        in_pseudo = (row >= source + target) & (row < length)
        sees_source = (column < source) & (row < length)
        sees_target = in_target & (column >= source) & (column <= row)
        before = in_pseudo & (column >= source) & (column < row - target) & (column < source + target)
        itself = in_pseudo & (column == row)
        return sees_source | sees_target | before | itself
