"""What fine-tuning for understanding tasks has in common: where a run starts, what is measured and kept at its end.

A script makes a trainer of an :class:`UnderstandingTask` and leaves the rest to
:func:`minilm_fast.cli.run_understanding`: training with ``--do_train``, then :func:`finish`.

After training the output folder itself is a checkpoint beside its ``ckpt-N/``: the best one where checkpoints were
measured (``--evaluate_during_training``, ``--eval_all_checkpoints``), otherwise the last. Where they were, ``best``
is a link to the folder of the best one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from minilm_fast.atomic import atomic_write, remove_quietly, temporary_name
from minilm_fast.checkpoint import LoadedCheckpoint
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training import checkpointing
from minilm_fast.training.checkpointing import checkpoint_folder
from minilm_fast.training.distributed import World
from minilm_fast.training.flags import known_by, loop_options
from minilm_fast.training.history import best_record
from minilm_fast.training.loading import load_with_tokenizer
from minilm_fast.training.loop import Trainer
from minilm_fast.training.precision import Precision
from minilm_fast.training.seq2seq import steps_of_epochs
from minilm_fast.training.task import Task

logger = logging.getLogger(__name__)

RESULTS = "eval_results"
_LONGEST_LINE = 90


class UnderstandingTask(Task, Protocol):
    """A task of the training loop whose model can also be reported on and asked for predictions."""

    def report(self, world: World, precision: Precision, output_dir: Path) -> Mapping[str, float]:
        """What ``--do_eval`` measures of the chosen checkpoint only, beside :meth:`Task.evaluate`; may write files.

        All processes call it and get the same. The model is in evaluation mode.
        """

    def predict_files(self, world: World, precision: Precision, output_dir: Path) -> list[Path]:
        """Write the predictions for the test set, as ``--do_predict`` asks; the files.

        All processes call it; the first one writes.
        """


def start(args: argparse.Namespace) -> tuple[LoadedCheckpoint, Tokenizer]:
    """What a run begins with: ``--model_name_or_path``; without ``--do_train`` the model in ``--output_dir``, if any.

    Args:
        args: with the flags of :func:`minilm_fast.training.flags.add_understanding_flags`.
    """
    trained = None if args.do_train else trained_model(args.output_dir)
    if trained is not None:
        logger.info("the model is %s", trained)
        loaded, tokenizer = load_with_tokenizer(str(trained), max_seq_length=args.max_seq_length, for_training=True)
    else:
        loaded, tokenizer = load_with_tokenizer(
            args.model_name_or_path,
            config_name=args.config_name,
            tokenizer_name=args.tokenizer_name,
            cache_dir=args.cache_dir,
            model_type=args.model_type,
            do_lower_case=args.do_lower_case or None,
            max_seq_length=args.max_seq_length,
            for_training=True,
        )
    return loaded, tokenizer


def trained_model(output_dir: Path) -> Path | None:
    """The folder of the model that a run left in its output folder: the best that is known, else the last."""
    if (output_dir / "config.json").is_file():
        return output_dir
    steps = checkpointing.weight_steps(output_dir)
    if not steps:
        return None
    best = output_dir / "best"
    return best if best.is_dir() else checkpoint_folder(output_dir, steps[-1])


def identity(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a run is known by beside the options of loop and task: plain values by the name of their flag."""
    names = ("model_name_or_path", "config_name", "tokenizer_name")
    return {
        **{name: known_by(getattr(args, name)) for name in names},
        "model_type": args.model_type,
        "do_lower_case": args.do_lower_case,
        "max_seq_length": args.max_seq_length,
        **more,
    }


def make_trainer(
    args: argparse.Namespace,
    task: UnderstandingTask,
    examples: int,
    metric: str,
    world: World,
    measures: Collection[str] = (),
) -> Trainer:
    """The trainer of a task, with the loop's options from the flags.

    Args:
        examples: of the training set, or features where one example gives several; 0 without ``--do_train``.
        metric: the measure of :meth:`Task.evaluate` that decides which checkpoint is best, unless
            ``--metric_for_best_model`` names another.
        measures: all measures of :meth:`Task.evaluate`, if they are known beforehand.

    Raises:
        UserError: ``--metric_for_best_model`` is not one of them, or flags contradict one another.
    """
    chosen = args.metric_for_best_model or metric
    if measures and chosen not in measures:
        raise UserError(f"--metric_for_best_model {chosen}: not one of {', '.join(sorted(measures))}")
    steps = args.num_training_steps
    batch = args.per_gpu_train_batch_size * args.gradient_accumulation_steps * world.size
    if steps <= 0:
        steps = max(1, steps_of_epochs(examples, args.num_training_epochs, batch))
    if args.do_train:
        logger.info("%d steps of %d sequences: %.2f epochs", steps, batch, steps * batch / max(1, examples))
    options = loop_options(
        args,
        total_steps=steps,
        evaluate_checkpoints=args.evaluate_during_training,
        metric_for_best_model=chosen,
    )
    return Trainer(task, options, args.output_dir, world)


@dataclass(frozen=True)
class Candidate:
    """A model that is to be measured.

    Args:
        name: for people.
        step: of the folder with its weights; None: the model as it is.
    """

    name: str
    step: int | None


def finish(args: argparse.Namespace, trainer: Trainer) -> None:
    """``--do_eval`` and ``--do_predict``, and the output folder made a checkpoint after training.

    Args:
        trainer: has trained, or was only made; its task is an :class:`UnderstandingTask`.

    Raises:
        UserError: a checkpoint or a file cannot be read or written, or no checkpoint has the measure that decides.
    """
    task = cast(UnderstandingTask, trainer.task)
    candidates = _candidates(args, trainer)
    results: dict[str, Mapping[str, float]] = {}
    chosen = candidates[-1]
    if args.do_eval:
        for candidate in candidates:
            _load(trainer, candidate)
            results[candidate.name] = trainer.measure(_folder(trainer, candidate))
            _log(candidate.name, results[candidate.name])
        chosen = _best(candidates, results, trainer.options.metric_for_best_model)
    if chosen is not candidates[-1] or not args.do_eval:
        _load(trainer, chosen)
    task.module.eval()
    if args.do_eval:
        report = task.report(trainer.world, trainer.precision, trainer.output_dir)
        _log(chosen.name, report)
        results[chosen.name] = {**results[chosen.name], **report}
        trainer.world.on_main(lambda: _write(trainer, chosen, results))
    if args.do_predict:
        for path in task.predict_files(trainer.world, trainer.precision, trainer.output_dir):
            logger.info("wrote %s", path)
    if chosen.step is not None:
        step = chosen.step
        trainer.world.on_main(lambda: _keep(trainer.output_dir, step, best=len(candidates) > 1))


def _candidates(args: argparse.Namespace, trainer: Trainer) -> list[Candidate]:
    """The models to be measured, in the order of their steps."""

    def found() -> tuple[list[int], int | None]:
        best = best_record(trainer.history.records, trainer.options.metric_for_best_model)
        return checkpointing.weight_steps(trainer.output_dir), best["step"] if best else None

    steps, best = trainer.world.on_main(found)
    if args.eval_all_checkpoints and steps:
        return [Candidate(f"ckpt-{step}", step) for step in steps]
    if args.do_train:
        step = best if best in steps else trainer.step
        return [Candidate(f"ckpt-{step}", step)]
    return [Candidate(str(trained_model(trainer.output_dir) or args.model_name_or_path), None)]


def _folder(trainer: Trainer, candidate: Candidate) -> Path:
    return Path(candidate.name) if candidate.step is None else checkpoint_folder(trainer.output_dir, candidate.step)


def _load(trainer: Trainer, candidate: Candidate) -> None:
    if candidate.step is not None:
        trainer.task.load_weights(_folder(trainer, candidate))


def _best(candidates: list[Candidate], results: Mapping[str, Mapping[str, float]], metric: str) -> Candidate:
    """The candidate with the best measure."""
    if len(candidates) == 1:
        return candidates[0]
    records = [{"step": number, **results[candidate.name]} for number, candidate in enumerate(candidates)]
    best = best_record(records, metric)
    if best is None:
        known = ", ".join(sorted(results[candidates[0].name])) or "none"
        raise UserError(f"no checkpoint has the measure {metric!r} that decides which is best (measured: {known})")
    return candidates[best["step"]]


def _log(name: str, measures: Mapping[str, float]) -> None:
    """A few measures a line: XNLI has some thirty of them."""
    line = ""
    for part in (f"  {measure} {value:.4f}" for measure, value in measures.items()):
        if line and len(line) + len(part) > _LONGEST_LINE:
            logger.info("%s%s", name, line)
            line = ""
        line += part
    if line:
        logger.info("%s%s", name, line)


def _write(trainer: Trainer, chosen: Candidate, results: Mapping[str, Mapping[str, float]]) -> None:
    """``eval_results.txt`` as transformers' scripts write it, and all in ``eval_results.json``."""
    measures = results[chosen.name]
    lines = "".join(f"{name} = {value}\n" for name, value in sorted(measures.items()))
    content: dict[str, Any] = {
        "checkpoint": chosen.name,
        "metric": trainer.options.metric_for_best_model,
        "measures": _plain(measures),
        "checkpoints": {name: _plain(found) for name, found in results.items()},
    }
    with atomic_write(trainer.output_dir / f"{RESULTS}.txt") as file:
        file.write(lines.encode())
    with atomic_write(trainer.output_dir / f"{RESULTS}.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _plain(measures: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def _keep(output_dir: Path, step: int, *, best: bool) -> None:
    """Make the output folder itself a checkpoint: the files of ``ckpt-step``, linked where the file system has links.

    The configuration comes last: until it is there, the folder is not taken for a checkpoint.
    """
    folder = checkpoint_folder(output_dir, step)
    if best:
        checkpointing.point_to_best(output_dir, step)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        name = temporary_name(output_dir / file.name)
        try:
            try:
                os.link(file, name)
            except OSError:
                shutil.copyfile(file, name)
            os.replace(name, output_dir / file.name)
        except OSError as error:
            remove_quietly(name)
            raise UserError(f"{output_dir / file.name}: cannot be written: {error.strerror}") from None
