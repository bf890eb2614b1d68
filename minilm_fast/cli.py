"""The console script ``minilm-fast``, and what all command lines share: one line for an error, an exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from minilm_fast.errors import Terminated, UserError, is_out_of_memory

if TYPE_CHECKING:
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer

# Subcommand: its module and what it does.
COMMANDS = {
    "decode": ("minilm_fast.decode", "decode a file with a fine-tuned sequence-to-sequence checkpoint"),
    "encode": ("minilm_fast.encode", "embed a file of texts: one vector a line"),
    "gen-seq-from-trace": ("minilm_fast.gen_seq_from_trace", "choose outputs anew from saved score traces"),
    "evaluate": ("minilm_fast.evaluate", "score generated texts with the metrics of the paper's tables"),
    "evaluate-qa": ("minilm_fast.evaluate_qa", "score extracted answers as SQuAD, MLQA and XQuAD do"),
    "distill": ("minilm_fast.distill", "distil a smaller model from a teacher: MiniLM v1 and v2"),
    "export-onnx": ("minilm_fast.export_onnx", "write an encoder with its head as an ONNX file"),
    "glue": ("minilm_fast.run_glue", "fine-tune and measure on a GLUE task"),
    "squad": ("minilm_fast.run_squad", "fine-tune and measure on SQuAD, MLQA or XQuAD: answers out of a text"),
    "xnli": ("minilm_fast.run_xnli", "fine-tune on XNLI in one language, measure in up to 15"),
    "train": ("minilm_fast.run_seq2seq", "fine-tune an encoder as a sequence-to-sequence model"),
}
USAGE_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
MOST_THREADS = 1024
"""More are a slip of the keyboard: the system may not give them, and the process would end without a word."""


class _Help(argparse.HelpFormatter):
    """Says a flag's default where its description does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unsaid = action.default in (None, False, "", argparse.SUPPRESS) or action.dest == "local_rank"
        return text if unsaid or "default" in text or "no effect" in text else f"{text} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line and whose help says every default."""

    def __init__(self, **options: Any) -> None:
        description = options.pop("description", "").replace("``", "")
        super().__init__(**{"formatter_class": _Help, "description": description, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}\n")


def guarded(run: Callable[[], None], hint: Callable[[], str] = str, batch_flag: str = "--batch_size") -> int:
    """Runs a command; what a user can cause becomes one line on standard error.

    Args:
        run: the command.
        hint: says what to do next after a run was cut short; may be empty.
        batch_flag: what to lower where memory does not suffice.

    Returns:
        The exit status: 0, 2 after a :class:`UserError` or where the system refuses a file, 130 after Ctrl-C, 143
        after ``SIGTERM``.
    """
    with _terminable(), _one_line_warnings():
        try:
            run()
        except UserError as error:
            return _fail(f"{error}{hint()}", USAGE_ERROR)
        except KeyboardInterrupt:
            return _fail(f"interrupted{hint()}", INTERRUPTED)
        except Terminated:
            return _fail(f"terminated{hint()}", TERMINATED)
        except OSError as error:
            if error.filename is None:
                raise
            return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}{hint()}", USAGE_ERROR)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _fail(f"not enough memory; a lower {batch_flag} needs less{hint()}", USAGE_ERROR)
    return 0


def run_understanding(
    args: argparse.Namespace,
    make_trainer: Callable[[argparse.Namespace, World], Trainer],
    check: Callable[[argparse.Namespace], None],
) -> int:
    """What the scripts for understanding tasks do: ``--do_train``, ``--do_eval`` and ``--do_predict``.

    Args:
        args: with the flags of :func:`minilm_fast.training.flags.add_understanding_flags`.
        make_trainer: reads the data and makes the trainer of an
            :class:`minilm_fast.training.understanding.UnderstandingTask`; it is also made where nothing is trained.
        check: as for :func:`run_training`.

    Returns:
        The exit status.
    """

    def finish(trainer: Trainer) -> None:
        from minilm_fast.training import understanding

        understanding.finish(args, trainer)

    return run_training(args, make_trainer, check, train=args.do_train, finish=finish)


def run_training(
    args: argparse.Namespace,
    make_trainer: Callable[[argparse.Namespace, World], Trainer],
    check: Callable[[argparse.Namespace], None],
    *,
    train: bool = True,
    finish: Callable[[Trainer], None] | None = None,
) -> int:
    """What every training program does with its arguments: processes, output folder, resume, training.

    Args:
        args: with the flags of :func:`minilm_fast.training.flags.add_loop_flags` and ``output_dir``.
        make_trainer: reads the data and makes the trainer.
        check: raises :class:`UserError` where flags are wrong, before anything is read or written.
        train: whether there is anything to train.
        finish: what is to be done after training.

    Returns:
        The exit status.
    """
    trainer: Trainer | None = None

    def run() -> None:
        nonlocal trainer
        check(args)
        from minilm_fast.training.checkpointing import run_folder
        from minilm_fast.training.distributed import World

        world = World(local_rank=args.local_rank, cuda=not args.no_cuda)
        with _logging(logging.INFO if world.is_main else logging.ERROR):
            world.connect()
            with run_folder(world, args.output_dir) as folder:
                trainer = make_trainer(args, world)
                if train:
                    trainer.prepare(folder, overwrite=args.overwrite_output_dir)
                    trainer.train()
                if finish is not None:
                    finish(trainer)
            world.close()

    return guarded(run, lambda: trainer.hint() if trainer else "", "--per_gpu_train_batch_size")


def check_threads(threads: int | None) -> None:
    """Make sure of ``--threads``; None is not given.

    Raises:
        UserError: it is out of range.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(f"--threads must be from 1 to {MOST_THREADS}, got {threads}")


def leave(status: int) -> NoReturn:
    """Ends the process with a status.

    After an error the threads that talk to the other processes of a group are still at work, and an interpreter that
    takes itself apart under them may abort; such a process ends at once.
    """
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def say(kind: str, message: str) -> None:
    """Prints one line on standard error."""
    print(f"{kind}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def _fail(message: str, status: int) -> int:
    # Under torchrun every process may fail; which one did is said but for the first.
    rank = os.environ.get("RANK", "0")
    say("error", message if rank == "0" else f"process {rank}: {message}")
    return status


@contextlib.contextmanager
def _logging(level: int) -> Iterator[None]:
    """Within the block what the package logs goes to standard error, with the time before it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("minilm_fast")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block ``SIGTERM`` raises :class:`Terminated`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *details: object, **more: object) -> None:
        say("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """``minilm-fast COMMAND ...``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    from minilm_fast import __version__

    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{about}" for name, (_, about) in COMMANDS.items())
    parser = ArgumentParser(
        prog="minilm-fast",
        description="Fast fine-tuning and decoding of MiniLM, UniLM and other BERT-family Transformers.",
        epilog=f"commands:\n{listing}\n\nminilm-fast COMMAND --help describes a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minilm_fast {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.parse_args(arguments[:1])
    return 0


def console() -> NoReturn:
    """The console script."""
    leave(main())


if __name__ == "__main__":
    console()
