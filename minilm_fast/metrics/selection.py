"""Which checkpoint is the best: ``save_best.SPLIT`` beside the predictions, as the original's scripts keep it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilm_fast.atomic import atomic_write
from minilm_fast.errors import UserError

_DEV = "dev"


def save_best(scores: Mapping[str, float], split: str) -> list[str]:
    """Notes in each folder its best prediction file, unless one noted before is at least as good.

    Args:
        scores: of each file, between 0 and 1.
        split: ends the name of the note.

    Returns:
        The notes that were written. Three lines each: folder, name of the file, score.

    Raises:
        UserError: a note cannot be read or written.
    """
    written = []
    for folder in dict.fromkeys(os.path.dirname(name) for name in scores):
        best = max((name for name in scores if os.path.dirname(name) == folder), key=lambda name: scores[name])
        note = Path(folder or ".") / f"save_best.{split}"
        if note.exists() and read_note(note)[1] >= scores[best]:
            continue
        with atomic_write(note) as stream:
            stream.write(f"{folder or '.'}\n{os.path.basename(best)}\n{scores[best]}\n".encode())
        written.append(str(note))
    return written


def read_note(path: Path) -> tuple[str, float]:
    """Name and score of the best file that a note names.

    Raises:
        UserError: it cannot be read or is not such a note.
    """
    try:
        _, name, score = path.read_text(encoding="utf-8").strip().split("\n")
        value = float(score)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not three lines that end with a score") from None
    if math.isnan(value):
        raise UserError(f"{path}: the score is not a number")
    return name, value


def only_best(names: Sequence[str]) -> list[str]:
    """The files whose checkpoint is the one that ``save_best.dev`` in their folder names.

    ``ckpt-3000.test`` and ``ckpt-3000.dev`` are of one checkpoint: names are compared without the part that is ``dev``
    in the note (the last part if none is).

    Raises:
        UserError: no file is left, or a note cannot be read.
    """
    kept = [name for name in names if _is_best(Path(name))]
    if not kept:
        raise UserError(
            f"--only_eval_best: no save_best.{_DEV} beside the predictions names the checkpoint of one of them"
        )
    return kept


def _is_best(path: Path) -> bool:
    note = path.parent / f"save_best.{_DEV}"
    if not note.exists():
        return False
    best, own = read_note(note)[0].split("."), path.name.split(".")
    if len(best) == 1:
        return own == best
    place = best.index(_DEV) if _DEV in best else len(best) - 1
    return len(own) == len(best) and best[:place] + best[place + 1 :] == own[:place] + own[place + 1 :]
