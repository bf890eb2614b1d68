"""Checkpoints of a run: ``<output_dir>/ckpt-N/`` (weights) beside ``<output_dir>/optim.N.bin`` (all else)."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm_fast import checkpoint
from minilm_fast.atomic import atomic_write
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.tokenization import Tokenizer


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Folder of the weights after ``step`` optimiser steps."""
    return output_dir / f"ckpt-{step}"


def _state_file(output_dir: Path, step: int) -> Path:
    return output_dir / f"optim.{step}.bin"


def latest_step(output_dir: Path) -> int | None:
    """The largest step with a whole checkpoint: both parts are there, and each was renamed into place when complete."""
    steps = [
        int(match[1])
        for folder in output_dir.glob("ckpt-*")
        if (match := re.fullmatch(r"ckpt-(\d+)", folder.name)) and folder.is_dir()
    ]
    whole = [step for step in steps if _state_file(output_dir, step).is_file()]
    return max(whole, default=None)


def _random_state(rng: random.Random) -> dict[str, Any]:
    version, internal, gauss = rng.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }


def _restore_random_state(rng: random.Random, state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    rng.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])


def save(
    output_dir: Path,
    step: int,
    model: Seq2SeqModel,
    optimizer: torch.optim.Optimizer,
    rng: random.Random,
    tokenizer: Tokenizer,
    progress: dict[str, Any],
) -> Path:
    """Write a checkpoint; the state of earlier checkpoints, of use only to go on from there, is removed afterwards.

    Args:
        progress: plain numbers and lists that :func:`restore` gives back.

    Returns:
        the folder with the weights.
    """
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "random": _random_state(rng),
        "progress": progress,
    }
    with atomic_write(_state_file(output_dir, step)) as file:
        torch.save(state, file)
    folder = checkpoint_folder(output_dir, step)
    checkpoint.save(folder, model.config, model.checkpoint_state(), tokenizer)
    for old in output_dir.glob("optim.*.bin"):
        if old != _state_file(output_dir, step):
            old.unlink()
    return folder


def load_weights(output_dir: Path, step: int) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights of a checkpoint of this run."""
    loaded = checkpoint.load(checkpoint_folder(output_dir, step), for_training=True)
    return loaded.config, loaded.state


def restore(output_dir: Path, step: int, optimizer: torch.optim.Optimizer, rng: random.Random) -> dict[str, Any]:
    """Set optimiser and random state to those of a checkpoint.

    Returns:
        what :func:`save` was given as ``progress``.

    Raises:
        UserError: the file is broken or belongs to another model.
    """
    path = _state_file(output_dir, step)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        _restore_random_state(rng, state["random"])
        progress: dict[str, Any] = state["progress"]
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot resume from {path}: {reason}") from None
    return progress
