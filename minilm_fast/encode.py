"""Embed a file of texts: ``python -m minilm_fast.encode``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minilm_fast.atomic import atomic_write
from minilm_fast.cli import ArgumentParser, check_threads, guarded, leave, say
from minilm_fast.data.examples import decompressed, parse_record, reading, without_compression
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    import numpy as np

STANDARD = "-"
DTYPES = ("fp32", "bf16", "fp16", "int8")
FORMATS = ("auto", "txt", "jsonl")
# Of a .npy file: the size fits the header for any number of rows, so that it can be written last.
_HEADER_BYTES = 128


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="minilm_fast.encode",
        description="Embed texts: one vector a line of the input, as a fp32 matrix in numpy's .npy format, which "
        "numpy.load(FILE, mmap_mode='r') reads. Memory does not grow with the input, and the output appears, whole, at "
        "the end.",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint folder, weights file or hub id")
    add("--model_type", help="bert, minilm, unilm, roberta, xlm-roberta or electra (default: what the checkpoint says)")
    add("--config_path", help="configuration in place of the checkpoint's own")
    add("--tokenizer_name", help="vocabulary file, folder or hub id (default: the checkpoint's own)")
    add("--do_lower_case", action="store_true", default=None, help="uncased vocabulary")
    add("--cache_dir", help="where downloads from the hub are kept")
    add("--input_file", required=True, help="texts, one a line, plain, gzip or xz; - for standard input")
    add("--output_file", required=True, help="the matrix [lines, hidden size], a .npy file")
    add(
        "--input_format",
        choices=FORMATS,
        default="auto",
        help="txt: a line is a text, an empty line an empty one; jsonl: a line is an object with --text_key "
        "(default: jsonl if the name ends in .jsonl, else txt)",
    )
    add("--text_key", default="text", help="the key of the text in JSON lines (default: text)")
    add("--pooling", choices=("mean", "cls", "max"), help="default: what the checkpoint says, else mean")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="vectors of length 1 (default: what the checkpoint says, else yes)",
    )
    add("--prompt", help="what comes before each text (default: what the checkpoint says, else nothing)")
    add("--prompt_name", help="of one of the checkpoint's prompts, such as query")
    add("--max_seq_length", type=int, help="tokens of a text; longer ones are cut (default: what the checkpoint says)")
    add(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="format of the linear layers' weights (default: fp32; int8: on a CPU, fp16: on a GPU)",
    )
    add("--no_cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    add("--batch_size", type=int, default=64, help="texts computed together; changes no vector (default: 64)")
    add("--threads", type=int, help="that compute (default: all cores)")
    add("--num_proc", type=int, default=1, help="processes that tokenise (default: 1, a thread beside the others)")
    return parser


def read_texts(stream: IO[bytes] | BufferedIOBase, label: str, key: str | None) -> Iterator[str]:
    """The texts of a stream, one a line.

    Args:
        label: what the stream is called, for errors.
        key: of the text if lines are JSON objects, None if they are texts.

    Raises:
        UserError: the stream cannot be read to its end, or a line is wrong; it is named by its number.
    """
    with reading(label):
        for number, line in enumerate(stream, 1):
            where = f"{label}:{number}"
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text") from None
            yield text if key is None else _text_of(text, key, where)


def _text_of(line: str, key: str, where: str) -> str:
    if not line.strip():
        raise UserError(f'{where}: a blank line; an empty text is {{"{key}": ""}}')
    record = parse_record(line, where)
    if key not in record:
        raise UserError(f"{where}: has no {key!r}")
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key!r} must be a string, got {type(record[key]).__name__}")
    # Half a surrogate pair is no character: tokenizers cannot encode it.
    return record[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_matrix(stream: IO[bytes], blocks: Iterator[np.ndarray], columns: int) -> int:
    """Writes rows ``fp32 [*, columns]`` as a .npy file (version 1.0) as they come; returns their number."""
    stream.write(bytes(_HEADER_BYTES))
    rows = 0
    for block in blocks:
        stream.write(block.astype("<f4", copy=False).tobytes())
        rows += len(block)
    about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    stream.seek(0)
    stream.write(b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little"))
    stream.write(about.encode().ljust(_HEADER_BYTES - 11) + b"\n")
    return rows


@contextmanager
def _opened(name: str, label: str) -> Iterator[IO[bytes] | BufferedIOBase]:
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        stream = open(name, "rb")  # noqa: SIM115 - an error in the block is none of opening
    except OSError as error:
        raise UserError(f"cannot read {label}: {error.strerror}") from None
    with stream, closing(decompressed(stream)) as content:
        yield content


def _check(args: argparse.Namespace) -> None:
    check_threads(args.threads)
    output = Path(args.output_file)
    if output.suffix != ".npy":
        raise UserError(f"--output_file {output}: must end in .npy")
    source = None if args.input_file == STANDARD else Path(args.input_file)
    if source and source.exists() and output.exists() and output.samefile(source):
        raise UserError(f"--output_file {output}: is the input file")


def run(args: argparse.Namespace) -> None:
    """Embeds a file.

    Raises:
        UserError: a flag, a line or the checkpoint is wrong.
    """
    _check(args)
    label = "standard input" if args.input_file == STANDARD else args.input_file
    named_so = without_compression(label).endswith(".jsonl")
    json_lines = args.input_format == "jsonl" or (args.input_format == "auto" and named_so)
    with _opened(args.input_file, label) as stream, atomic_write(os.path.realpath(args.output_file)) as out:
        import torch

        from minilm_fast.modeling.model import Model

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model = Model.from_pretrained(
            args.model_path,
            config_name=args.config_path,
            tokenizer_name=args.tokenizer_name,
            model_type=args.model_type,
            do_lower_case=args.do_lower_case,
            cache_dir=args.cache_dir,
        )
        options: dict[str, Any] = {
            key: getattr(args, key)
            for key in (
                *("pooling", "normalize", "max_seq_length", "prompt", "prompt_name"),
                *("batch_size", "dtype", "num_proc"),
            )
        }
        if args.no_cuda:
            options["device"] = "cpu"
        texts = read_texts(stream, label, args.text_key if json_lines else None)
        started = time.monotonic()
        rows = write_matrix(out, model.encode_blocks(texts, **options), model.config.hidden_size)
        if rows == 0:
            raise UserError(f"{label} is empty")
        seconds = time.monotonic() - started
    say("done", f"{rows} texts in {seconds:.1f} s, {rows / seconds:.1f} a second: {args.output_file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    leave(main())
