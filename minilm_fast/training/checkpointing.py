"""The folder of a run: ``ckpt-N/`` (weights), ``optim.N.bin`` (all else), ``run.json``, ``history.json``."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minilm_fast.atomic import atomic_write, remove_quietly, temporary_name
from minilm_fast.checkpoint import write_archive
from minilm_fast.errors import UserError
from minilm_fast.training.distributed import World

# The state before the latest is kept too, for the case that the latest turns out to be damaged.
STATES_KEPT = 2


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Folder of the weights after ``step`` optimiser steps."""
    return output_dir / f"ckpt-{step}"


def state_file(output_dir: Path, step: int) -> Path:
    """File with what is needed beside the weights to go on after ``step`` steps."""
    return output_dir / f"optim.{step}.bin"


def weight_steps(output_dir: Path) -> list[int]:
    """Steps of which there are weights, ascending."""
    names = (re.fullmatch(r"ckpt-(\d+)", folder.name) for folder in output_dir.glob("ckpt-*") if folder.is_dir())
    return sorted(int(match[1]) for match in names if match)


def whole_steps(output_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending: both parts are there, and each appeared when it was complete."""
    return [step for step in weight_steps(output_dir) if state_file(output_dir, step).is_file()]


def latest_step(output_dir: Path) -> int | None:
    """The largest step with a whole checkpoint."""
    return max(whole_steps(output_dir), default=None)


def save(output_dir: Path, step: int, state: Mapping[str, Any], save_weights: Callable[[Path], None]) -> Path:
    """Write a checkpoint, whole at any instant or not there.

    Args:
        state: plain values and tensors.
        save_weights: writes the weights to the folder that it is given.

    Returns:
        the folder with the weights.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    folder = checkpoint_folder(output_dir, step)
    if folder.exists():
        _remove_folder(folder)
    with atomic_write(state_file(output_dir, step)) as file:
        write_archive(state, file)
    save_weights(folder)
    states = _state_steps(output_dir)
    kept = [number for number in states if number <= step][-STATES_KEPT:]
    for number in states:
        # Those of later steps turned out to be of no use, or the run would have gone on from there.
        if number not in kept:
            remove_quietly(state_file(output_dir, number))
    return folder


def _state_steps(output_dir: Path) -> list[int]:
    names = (re.fullmatch(r"optim\.(\d+)\.bin", file.name) for file in output_dir.glob("optim.*.bin"))
    return sorted(int(match[1]) for match in names if match)


def _remove_folder(folder: Path) -> None:
    """A folder that vanishes at once, whatever happens on the way."""
    doomed = temporary_name(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_state(output_dir: Path, step: int) -> dict[str, Any]:
    """What :func:`save` was given as ``state``.

    Raises:
        UserError: the file is cut off or damaged.
    """
    path = state_file(output_dir, step)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"cannot resume from {path}: it is damaged ({damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot resume from {path}: {reason}") from None


def prune(output_dir: Path, step: int, limit: int | None, best: int | None) -> None:
    """Remove the weights of all but the last ``limit`` steps up to ``step`` and the best; None keeps all."""
    if limit is None:
        return
    for old in [number for number in weight_steps(output_dir) if number <= step][:-limit]:
        if old != best:
            remove_quietly(state_file(output_dir, old))
            _remove_folder(checkpoint_folder(output_dir, old))


def point_to_best(output_dir: Path, step: int) -> None:
    """Let the link ``best`` name the folder of the weights of a step, where the file system has links."""
    link = output_dir / "best"
    name = temporary_name(link)
    try:
        os.symlink(checkpoint_folder(output_dir, step).name, name)
        os.replace(name, link)
    except OSError:
        remove_quietly(name)


class RunFolder:
    """The output folder, held by one run at a time.

    Args:
        path: made if need be.

    Raises:
        UserError: it cannot be made, or another run that is under way holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "ab")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise UserError(f"--output_dir {path}: {error.strerror}") from None
        self._hold()
        for leftover in path.glob(".*.tmp"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                remove_quietly(leftover)

    def _hold(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {self.path}: another run is writing to it") from None
        except OSError:
            return

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.close()

    def claim(self, run: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make sure that checkpoints in the folder are of this run, and note what run it is.

        Args:
            run: plain values by the name of their flag.
            overwrite: remove the checkpoints of another run.

        Raises:
            UserError: the folder holds checkpoints of another run; the message names a flag that differs.
        """
        if weight_steps(self.path):
            difference = self._difference(run)
            if difference is not None:
                if not overwrite:
                    raise UserError(
                        f"--output_dir {self.path} holds checkpoints {difference}: name another folder, or remove "
                        f"them with --overwrite_output_dir"
                    )
                self._clear()
        with atomic_write(self.path / "run.json") as file:
            file.write((json.dumps({"run": run}, indent=1, sort_keys=True) + "\n").encode())

    def _difference(self, run: Mapping[str, Any]) -> str | None:
        try:
            found = dict(json.loads((self.path / "run.json").read_text(encoding="utf-8"))["run"])
        except FileNotFoundError:
            return "of another program (no run.json)"
        except (OSError, ValueError, KeyError, TypeError):
            return "beside a run.json that cannot be read"
        for name in sorted({*found, *run}):
            if found.get(name) != run.get(name):
                return f"of another run (--{name} {found.get(name)} there, {run.get(name)} here)"
        if not whole_steps(self.path):
            return "that cannot be resumed (no optim.N.bin belongs to them)"
        return None

    def _clear(self) -> None:
        for step in _state_steps(self.path):
            remove_quietly(state_file(self.path, step))
        for step in weight_steps(self.path):
            _remove_folder(checkpoint_folder(self.path, step))
        for name in ("history.json", "best", "run.json"):
            remove_quietly(self.path / name)


@contextmanager
def run_folder(world: World, path: Path) -> Iterator[RunFolder | None]:
    """The output folder, held by the first process during the block; the others get None.

    Raises:
        UserError: see :class:`RunFolder`; in every process.
    """
    held: list[RunFolder] = []
    world.on_main(lambda: held.append(RunFolder(path)))
    try:
        yield held[0] if held else None
    finally:
        for folder in held:
            folder.close()
