"""Names that moved to :mod:`minilm_fast.data.masking`."""

from minilm_fast.data.masking import Feature, Masking, PseudoMasker, Sample, SpecialIds, framed_lengths

__all__ = ["Feature", "Masking", "PseudoMasker", "Sample", "SpecialIds", "framed_lengths"]
