"""What to search for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from minilm_fast.errors import UserError

DTYPES = ("fp32", "bf16", "int8", "fp16")
MODES = ("s2s", "l2r")


@dataclass(frozen=True)
class SearchOptions:
    """Options of decoding; names and defaults are those of the original's command line.

    Attributes:
        batch_size: examples decoded side by side.
        beam_size: hypotheses of each example; 1 is greedy search, which knows no minimum length, no n-gram
            blocking and no length penalty.
        max_seq_length: most tokens of source and target together.
        max_tgt_length: most tokens of the target, the final ``[SEP]`` included.
        length_penalty: if positive, a score is divided by ``((5 + length) / 6) ** length_penalty``.
        min_len: ``[SEP]`` is held off in the first ``min_len`` steps.
        forbid_duplicate_ngrams, ngram_size: never repeat an n-gram of that size.
        forbid_ignore_word: words joined by ``|`` that n-gram blocking overlooks, ``[..]`` in upper case.
        pos_shift: predict at the last token instead of at an appended ``[MASK]``.
        mode: ``s2s``, or ``l2r``: the source, too, is read from left to right.
        need_score_traces: keep scores, ids and back-pointers of every step (beams only).
        early_exit: stop a sentence when no live hypothesis can win any more; the answer stays the same.
        continuous_batching: a waiting sentence takes the place of one that has ended.

    Raises:
        UserError: a value is out of its range or two do not go together.
    """

    batch_size: int = 32
    beam_size: int = 1
    max_seq_length: int = 512
    max_tgt_length: int = 128
    length_penalty: float = 0.0
    min_len: int = 1
    forbid_duplicate_ngrams: bool = False
    ngram_size: int = 3
    forbid_ignore_word: str | None = None
    pos_shift: bool = False
    mode: str = "s2s"
    need_score_traces: bool = False
    early_exit: bool = True
    continuous_batching: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "beam_size", "max_tgt_length", "ngram_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.min_len < 0:
            raise UserError(f"--min_len must not be negative, got {self.min_len}")
        if not -1e4 < self.length_penalty < 1e4:
            raise UserError(f"--length_penalty must be a finite number, got {self.length_penalty}")
        if self.max_tgt_length >= self.max_seq_length - 2:
            raise UserError(
                f"--max_tgt_length {self.max_tgt_length} leaves no room for a source in --max_seq_length "
                f"{self.max_seq_length}: it must be less than max_seq_length - 2"
            )
        if self.mode not in MODES:
            raise UserError(f"--mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.need_score_traces and self.beam_size == 1:
            raise UserError("--need_score_traces needs --beam_size greater than 1: greedy search keeps no traces")

    @property
    def max_source_length(self) -> int:
        """Most tokens of a source without its special tokens (the original's limit)."""
        return self.max_seq_length - self.max_tgt_length - (1 if self.pos_shift else 2)

    @property
    def constrained(self) -> bool:
        """Whether minimum length, n-gram blocking and length penalty apply: with beams only."""
        return self.beam_size > 1

    @property
    def entering(self) -> int:
        """History entries of an example before its first step: with position shift the ``[SEP]`` before the target."""
        return int(self.pos_shift)

    @property
    def traced_frames(self) -> int:
        """Frames whose scores, ids and back-pointers are kept."""
        return self.max_tgt_length if self.need_score_traces else 0
