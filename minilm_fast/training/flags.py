"""Command-line flags that all training programs share. Nothing heavy is imported here, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast.training.loop import LoopOptions


def positive_int(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def natural(text: str) -> int:
    """An integer from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def non_negative_float(text: str) -> float:
    """A finite number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be a number that is not negative")
    return value


def add_loop_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of optimiser, schedule, checkpoints, number formats and processes."""
    _add_optimiser_flags(parser)
    _add_checkpoint_flags(parser)
    _add_device_flags(parser)


def _add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--per_gpu_train_batch_size", type=positive_int, default=8, help="examples of one process' forward pass")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes of an optimiser step")
    add("--learning_rate", type=positive_float, default=5e-5)
    add("--weight_decay", type=non_negative_float, default=0.01)
    add("--adam_epsilon", type=positive_float, default=1e-8)
    add("--max_grad_norm", type=positive_float, default=1.0)
    add("--num_training_steps", type=int, default=-1, help="optimiser steps; by default --num_training_epochs counts")
    add("--num_training_epochs", type=positive_int, default=10)
    add("--num_warmup_steps", type=natural, default=0)
    add("--seed", type=int, default=42)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time (new)")


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--logging_steps", type=positive_int, default=500, help="steps between progress lines (at least one a minute)")
    add("--log_dir", type=Path, help="TensorBoard's files; default: OUTPUT_DIR/runs if TensorBoard is installed")
    add("--save_steps", type=positive_int, default=1500)
    add("--save_total_limit", type=positive_int, help="keep this many checkpoints beside the best; default: all (new)")
    add("--overwrite_output_dir", action="store_true", help="remove the checkpoints of another run (new)")
    add("--metric_for_best_model", help="measure that decides which checkpoint is best, such as dev_loss (new)")


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fp16", action="store_true", help="float16 autocast with a scaled loss")
    add("--bf16", action="store_true", help="bfloat16 autocast (new)")
    add("--fp16_opt_level", default="O1", help="accepted, has no effect: apex is not used")
    add("--no_cuda", action="store_true", help="train on the CPU even if there is a GPU")
    add(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="set by launchers; torchrun's environment comes first",
    )
    add("--server_ip", default="", help="accepted, has no effect")
    add("--server_port", default="", help="accepted, has no effect")
    add("--peak_tflops", type=positive_float, help="peak of one device in 1e12 operations a second; measured (new)")


def loop_options(args: argparse.Namespace, **values: Any) -> LoopOptions:
    """The loop's options: the flags of these names, and ``values`` in place of them or beside them.

    Raises:
        UserError: flags contradict one another.
    """
    from minilm_fast.training.loop import LoopOptions

    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude one another")
    given = {name: getattr(args, name) for name in LoopOptions.__dataclass_fields__ if hasattr(args, name)}
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    return LoopOptions(**({**given, "precision": precision} | values))


def known_by(name: str | None) -> str | None:
    """What a run is known by where a flag names a file or folder, or else a hub id: the same for every spelling."""
    return os.path.realpath(name) if name is not None and os.path.exists(name) else name
