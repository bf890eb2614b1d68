"""What the original computed, on a GPU: training step by step, the losses of distillation, some of decoding.

All of decoding is ``python -m tests.parity --device cuda``. Without a GPU on the simulated one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_distillation
import test_seq2seq_training
from kernel_checks import ON_GPU, SLOW_SIMULATED
from training_files import golden

from tests.parity import decode

pytestmark = ON_GPU


@pytest.mark.parametrize("case", golden("trajectories.json"), ids=lambda c: c["name"])
def test_training(case: dict, tmp_path: Path) -> None:
    test_seq2seq_training.follow(case, tmp_path)


@pytest.mark.parametrize("teacher_kind", ["encoder", "frozen"])
@pytest.mark.parametrize("name", test_distillation.CASES)
def test_distillation_losses(name: str, teacher_kind: str) -> None:
    test_distillation.compare_golden(name, teacher_kind, "cuda")


@pytest.mark.parametrize(
    "group", ["beam1_T24_mask", *(pytest.param(name, marks=SLOW_SIMULATED) for name in ("misc", "relpos"))]
)
def test_decoding(group: str) -> None:
    path = next(path for path in decode.groups() if path.stem == group)
    outcome = decode.compare_group(path, {}, "cuda")
    assert outcome.total > 0 and not outcome.failures, "\n".join(outcome.failures[:5])


def test_first_step_of_decoding() -> None:
    outcome = decode.compare_first_step({}, "cuda")
    assert outcome.total > 0 and not outcome.failures, "\n".join(outcome.failures[:5])
