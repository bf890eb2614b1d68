"""The papers' settings, and how they are fitted to other models.

v1: Wang et al., arXiv 2002.10957, section 4.1: 256 sequences of at most 512 tokens a step, peak learning rate 3e-4
(1024 and 5e-4 for the student of 6 layers and 768 hidden units), 400,000 steps, linear warm-up over the first
4,000 and linear decay, Adam with betas 0.9 and 0.999, dropout 0.1, weight decay 0.01; the last layer of both models.

v2: Wang et al., arXiv 2012.15828: 48 relation heads for teachers of base size and 64 for large ones; of 24 layers the
21st for BERT, the 19th for RoBERTa and XLM-R. Batch, steps, warm-up and weight decay are those of v1 and the peak
learning rate is 6e-4, as in the configuration that bloomberg/minilmv2.bb has for it.

Adam's epsilon of 1e-6 is BERT's; the papers do not name it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minilm_fast.config import ROBERTA_TYPES, Config

GLOBAL_BATCH = 256
STEPS = 400_000
WARMUP_STEPS = 4_000
# Short runs warm up over this share of their steps at most.
_WARMUP_SHARE = 0.1
LEARNING_RATES = {"v1": 3e-4, "v2": 6e-4}
_LARGE_LAYERS, _LARGE_WIDTH = 24, 1024
_BASE_HEADS, _LARGE_HEADS = 48, 64


@dataclass(frozen=True)
class Pairing:
    """How teacher and student are compared.

    Attributes:
        relation_heads, teacher_layer: as :class:`minilm_fast.distillation.Distiller` takes them.
    """

    relation_heads: int | None
    teacher_layer: int


def pairing(
    preset: str, teacher: Config, student: Config, relation_heads: int | None, teacher_layer: int | None
) -> Pairing:
    """The preset's relation heads and layer where none are given.

    v2's number of relation heads is 48 or 64 if it divides both hidden sizes, otherwise the largest smaller one that
    does.
    """
    if preset == "v1":
        return Pairing(relation_heads, teacher_layer or teacher.num_hidden_layers)
    if relation_heads is None:
        most = _LARGE_HEADS if teacher.hidden_size >= _LARGE_WIDTH else _BASE_HEADS
        common = math.gcd(teacher.hidden_size, student.hidden_size)
        relation_heads = max(heads for heads in range(1, most + 1) if common % heads == 0)
    if teacher_layer is None:
        teacher_layer = teacher.num_hidden_layers
        if teacher_layer == _LARGE_LAYERS and teacher.hidden_size >= _LARGE_WIDTH:
            teacher_layer = 19 if teacher.model_type in ROBERTA_TYPES else 21
    return Pairing(relation_heads, teacher_layer)


def warmup_steps(total_steps: int) -> int:
    """The papers' warm-up, or a tenth of a shorter run."""
    return min(WARMUP_STEPS, int(_WARMUP_SHARE * total_steps))


def accumulation(per_process: int, processes: int) -> int:
    """Forward passes of a step of about 256 sequences."""
    return max(1, round(GLOBAL_BATCH / (per_process * processes)))
