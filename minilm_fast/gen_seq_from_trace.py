"""Choose outputs anew from saved score traces: ``python -m minilm_fast.gen_seq_from_trace``."""

from __future__ import annotations

import argparse
import glob
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast.cli import ArgumentParser, guarded, leave, say
from minilm_fast.decoding.output import TRACE_SUFFIX, Destination
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast.tokenization import Tokenizer


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are the original's."""
    parser = ArgumentParser(
        prog="minilm_fast.gen_seq_from_trace",
        description="Choose outputs anew from the score traces that decoding with --need_score_traces has saved, "
        "under other length criteria. Writes INPUT.<criteria>, for example INPUT.alp0.9.",
    )
    add = parser.add_argument
    add("--input", required=True, help=f"output of decoding, with INPUT{TRACE_SUFFIX} beside it; may hold * and ?")
    add("--model_type", required=True, help="bert, minilm, unilm, roberta, xlm-roberta or electra")
    add("--tokenizer_name", required=True, help="vocabulary file, folder or hub id")
    add("--do_lower_case", action="store_true", default=None, help="uncased vocabulary")
    add("--cache_dir", help="where downloads from the hub are kept")
    add("--alpha", type=_finite, help="divide a score by ((5 + length) / 6) ** ALPHA; not used with --length_penalty")
    add("--length_penalty", type=_finite, help="add this to a score for every token")
    add("--expect", type=_finite, help="with --length_penalty: subtract it for every token more or less than EXPECT")
    add("--min_len", type=int, help="changes only the name of the output file, as in the original")
    return parser


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def output_name(input_name: str, args: argparse.Namespace) -> str:
    """The original's name for the output: the criteria are added to the name of the input."""
    parts = {"lenp": args.length_penalty, "exp": args.expect, "alp": args.alpha, "minl": args.min_len}
    return f"{input_name}." + "".join(f"{name}{value}" for name, value in parts.items() if value)


def find_inputs(pattern: str) -> list[str]:
    """The names that the pattern matches and that have a trace file.

    Raises:
        UserError: there are none.
    """
    names = {pattern, *glob.glob(pattern)}
    names |= {name.removesuffix(TRACE_SUFFIX) for name in glob.glob(pattern + TRACE_SUFFIX)}
    found = [name for name in names if Path(name + TRACE_SUFFIX).exists()]
    if not found:
        raise UserError(f"--input {pattern}: there is no {pattern}{TRACE_SUFFIX}")
    return sorted(found)


def choose(name: str, tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[str]:
    """The text of every trace of a file, under the criteria of the command line.

    Raises:
        UserError: the trace file is damaged or holds more than plain data.
    """
    from minilm_fast.decoding.trace import best_sequence, trim_punctuation
    from minilm_fast.safe_pickle import load_traces

    ends = {tokenizer.sep_token, tokenizer.pad_token}
    path = name + TRACE_SUFFIX
    for number, trace in enumerate(load_traces(path), 1):
        try:
            ids = best_sequence(
                trace,
                tokenizer.sep_id,
                tokenizer.pad_id,
                length_penalty=args.length_penalty,
                alpha=args.alpha,
                expect=args.expect,
            )
        except IndexError as error:
            raise UserError(f"{path}: trace {number}: {error}") from None
        except OverflowError:
            raise UserError(f"--alpha {args.alpha} is too large") from None
        tokens = tokenizer.convert_ids_to_tokens(ids)
        length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        yield " ".join(trim_punctuation(tokenizer.detokenize(tokens[:length]).split(" ")))


def run(args: argparse.Namespace) -> None:
    """Writes an output for every input.

    Raises:
        UserError: a file or a flag is wrong; the outputs written before are whole.
    """
    names = find_inputs(args.input)
    outputs = [Destination(output_name(name, args)) for name in names]
    for output in outputs:
        output.check()
    from minilm_fast.tokenization import Tokenizer

    tokenizer = Tokenizer.from_pretrained(
        args.tokenizer_name,
        model_type=args.model_type,
        do_lower_case=args.do_lower_case,
        cache_dir=args.cache_dir,
    )
    for name, output in zip(names, outputs, strict=True):
        output.write(choose(name, tokenizer, args))
        say("done", output.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    leave(main())
