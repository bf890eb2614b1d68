"""What the tests of run_glue and run_xnli share: a tiny model, sentences that can be told apart, command lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from command import Outcome

MODEL = Path(__file__).parent / "goldens" / "distillation" / "teacher"
WORDS = [f"w{i}" for i in range(92)]
RUN = {
    "max_seq_length": 20,
    "max_steps": 30,
    "save_steps": 10,
    "per_gpu_train_batch_size": 16,
    "learning_rate": 3e-3,
    "logging_steps": 10,
    "peak_tflops": 0.1,
}


def write_vocabulary(folder: Path) -> Path:
    """A vocabulary of as many words as the tiny model has."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return path


def sentences(count: int, classes: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """Pairs of texts and the class that the words of both tell."""
    rng = np.random.RandomState(seed)
    found = []
    for i in range(count):
        first, second = (
            " ".join(f"w{30 * (i % classes) + rng.randint(30)}" for _ in range(rng.randint(2, 8))) for _ in range(2)
        )
        found.append((first, second, i % classes))
    return found


def write_table(path: Path, header: str, rows: Iterable[Iterable[object]]) -> Path:
    """A tab-separated file."""
    lines = ([header] if header else []) + ["\t".join(map(str, row)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(folder: Path, **flags: object) -> list[str]:
    """The command line of a run with data and output below ``folder``; True stands for a flag without a value."""
    flags = {
        "model_name_or_path": MODEL,
        "tokenizer_name": folder / "vocab.txt",
        "data_dir": folder / "data",
        "output_dir": folder / "out",
    } | flags
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def results(folder: Path) -> Any:
    """What ``eval_results.json`` says."""
    return json.loads((folder / "eval_results.json").read_text())


def error_line(outcome: Outcome) -> str:
    """The last line; before it come the log's lines, which begin with a time."""
    assert outcome.status == 2, outcome
    lines = [line for line in outcome.err.splitlines() if not line[:2].isdigit()]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]
