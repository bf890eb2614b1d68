"""Command-line flags that all training programs share. Nothing heavy is imported here, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
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


def seed(text: str) -> int:
    """An integer that generators of random numbers take."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError("must be an integer of 64 bits")
    return value


def number(text: str) -> float:
    """A number, which may be infinite."""
    value = float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("must be a number")
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


@dataclass(frozen=True)
class Family:
    """Names and defaults that differ between the scripts whose flags are taken over.

    Args:
        steps, epochs, warmup: spellings of a flag; a script knows all of them.
        count: reads a number of epochs.
    """

    steps: tuple[str, ...]
    epochs: tuple[str, ...]
    warmup: tuple[str, ...]
    count: Callable[[str], float]
    default_epochs: float
    weight_decay: float
    save_steps: int


S2S_FT = Family(
    steps=("--num_training_steps",),
    epochs=("--num_training_epochs",),
    warmup=("--num_warmup_steps",),
    count=positive_int,
    default_epochs=10,
    weight_decay=0.01,
    save_steps=1500,
)
# run_glue, run_squad and run_xnli of 2020. Messages about a resumed run name the other spelling.
TRANSFORMERS = Family(
    steps=("--max_steps", "--num_training_steps"),
    epochs=("--num_train_epochs", "--num_training_epochs"),
    warmup=("--warmup_steps", "--num_warmup_steps"),
    count=positive_float,
    default_epochs=3.0,
    weight_decay=0.0,
    save_steps=500,
)


def add_loop_flags(parser: argparse.ArgumentParser, family: Family = S2S_FT) -> None:
    """Flags of optimiser, schedule, checkpoints, number formats and processes.

    Whatever the spelling, the values are ``num_training_steps``, ``num_training_epochs`` and ``num_warmup_steps``.
    """
    _add_optimiser_flags(parser, family)
    _add_checkpoint_flags(parser, family)
    _add_device_flags(parser)


def add_understanding_flags(parser: argparse.ArgumentParser, max_seq_length: int = 128) -> None:
    """Flags that the scripts for understanding tasks share, with the names of transformers' scripts of 2020."""
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="checkpoint to start from, or to evaluate")
    add("--output_dir", required=True, type=Path, help="checkpoints ckpt-N and results; a run found here is resumed")
    add("--data_dir", type=Path, help="folder of the files")
    add("--model_type", help="family of the checkpoint, where it does not say itself")
    add("--config_name", help="configuration file in place of the checkpoint's own")
    add("--tokenizer_name", help="vocabulary or tokenizer folder in place of the checkpoint's own")
    add("--cache_dir", help="where downloads from the hub are kept")
    add("--do_lower_case", action="store_true", help="uncased vocabulary, if the checkpoint does not say so")
    add("--max_seq_length", type=positive_int, default=max_seq_length, help="tokens, special ones included")
    add("--do_train", action="store_true", help="fine-tune")
    add("--do_eval", action="store_true", help="measure, and write eval_results.txt and .json")
    add("--do_predict", action="store_true", help="write the predictions for the test set")
    add("--evaluate_during_training", action="store_true", help="measure every checkpoint as it is saved")
    add("--eval_all_checkpoints", action="store_true", help="measure every ckpt-N of OUTPUT_DIR; the best is kept")
    add("--per_gpu_eval_batch_size", type=positive_int, default=8, help="examples of a forward pass without training")
    add(
        "--eval_dtype",
        choices=("fp32", "bf16", "int8"),
        help="what --do_eval and --do_predict compute in; default: as training does; int8 on a CPU only (new)",
    )
    add("--overwrite_cache", action="store_true", help="accepted, has no effect: nothing is cached")
    add("--save_format", choices=("safetensors", "bin", "both"), default="safetensors", help="of the weights (new)")
    add_loop_flags(parser, TRANSFORMERS)


def check_understanding(args: argparse.Namespace) -> None:
    """What can be told from the flags of :func:`add_understanding_flags` alone.

    Raises:
        UserError: they contradict one another, or ask for nothing.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
    if args.evaluate_during_training and not args.do_train:
        raise UserError("--evaluate_during_training needs --do_train")
    if args.eval_all_checkpoints and not args.do_eval:
        raise UserError("--eval_all_checkpoints needs --do_eval")
    if args.max_seq_length < 5:
        raise UserError("--max_seq_length must be at least 5")


def _add_optimiser_flags(parser: argparse.ArgumentParser, family: Family) -> None:
    add = parser.add_argument
    add("--per_gpu_train_batch_size", type=positive_int, default=8, help="examples of one process' forward pass")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes of an optimiser step")
    add("--learning_rate", type=positive_float, default=5e-5, help="its peak, from which it falls linearly to 0")
    decay = "of all weights but biases and LayerNorms"
    add("--weight_decay", type=non_negative_float, default=family.weight_decay, help=decay)
    add("--adam_epsilon", type=positive_float, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=positive_float, default=1.0, help="longer gradients are cut to this norm")
    steps = f"optimiser steps; by default {family.epochs[0]} counts"
    add(*family.steps, dest="num_training_steps", type=int, default=-1, metavar="N", help=steps)
    count, epochs = family.count, family.default_epochs
    seen = "times that all examples are seen"
    add(*family.epochs, dest="num_training_epochs", type=count, default=epochs, metavar="N", help=seen)
    warmup = "steps in which the learning rate rises from 0"
    add(*family.warmup, dest="num_warmup_steps", type=natural, default=0, metavar="N", help=warmup)
    add("--seed", type=seed, default=42, help="of all random numbers")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time (new)")


def _add_checkpoint_flags(parser: argparse.ArgumentParser, family: Family) -> None:
    add = parser.add_argument
    add("--logging_steps", type=positive_int, default=500, help="steps between progress lines (at least one a minute)")
    add("--log_dir", type=Path, help="TensorBoard's files; default: OUTPUT_DIR/runs if TensorBoard is installed")
    add("--save_steps", type=positive_int, default=family.save_steps, help="steps between checkpoints")
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
