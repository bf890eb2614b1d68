"""Decode a file with fine-tuned sequence-to-sequence checkpoints: ``python -m minilm_fast.decode``."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast import __version__
from minilm_fast.cli import ArgumentParser, check_threads, guarded, leave, say
from minilm_fast.decoding import fingerprint
from minilm_fast.decoding.inputs import STANDARD, Source, digest, mixture, read_sources
from minilm_fast.decoding.journal import Header, Record
from minilm_fast.decoding.options import DTYPES, SearchOptions
from minilm_fast.decoding.output import Destination
from minilm_fast.decoding.progress import Progress
from minilm_fast.decoding.results import JournalResults, MemoryResults, Results
from minilm_fast.decoding.sharding import Group, set_threads
from minilm_fast.decoding.trace import padded_lengths, write_traces
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast.decoding.result import GenerationResult
    from minilm_fast.modeling.model import Model

# Options that an answer depends on; the others change only how fast it comes.
_ANSWER_OPTIONS = (
    "beam_size",
    "max_seq_length",
    "max_tgt_length",
    "length_penalty",
    "min_len",
    "forbid_duplicate_ngrams",
    "ngram_size",
    "forbid_ignore_word",
    "pos_shift",
    "need_score_traces",
)
_ORIGINAL_BATCH_SIZE = 4
_KEPT = ("text", "source_length", "truncated", "unknown")


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are the original's unless a flag says otherwise."""
    parser = ArgumentParser(
        prog="minilm_fast.decode",
        description="Decode a file with fine-tuned sequence-to-sequence checkpoints. Results are kept in "
        "OUTPUT.partial.jsonl as they finish; the output appears, whole, at the end. Under torchrun the processes "
        "share the input.",
    )
    _add_model(parser.add_argument_group("checkpoint"))
    _add_files(parser.add_argument_group("input and output"))
    _add_search(parser.add_argument_group("search"))
    _add_running(parser.add_argument_group("running"))
    ignored = parser.add_argument_group("accepted without effect, as in the original")
    for name in ("tokenized_input", "s2s_special_token", "s2s_add_segment", "s2s_share_segment"):
        ignored.add_argument(f"--{name}", action="store_true", help="no effect")
    ignored.add_argument("--seed", type=int, default=123, help="no effect: decoding draws no random numbers")
    ignored.add_argument(
        "--mode", choices=("s2s", "l2r"), default="s2s", help="no effect: the original decodes as s2s either way"
    )
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_type", help="bert, minilm, unilm, roberta, xlm-roberta or electra (default: what the checkpoint says)")
    add(
        "--model_path",
        required=True,
        help="checkpoint folder; * and ? match several, which are decoded one after the other; or a weights file, or "
        "a hub id",
    )
    add("--config_path", help="configuration in place of the checkpoint's own")
    add("--tokenizer_name", help="vocabulary file, folder or hub id (default: the checkpoint's own)")
    add("--do_lower_case", action="store_true", default=None, help="uncased vocabulary")
    add("--cache_dir", help="where downloads from the hub are kept")


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input_file",
        required=True,
        help="JSON lines whose 'src' is a text or a list of tokens, plain, gzip or xz; - for standard input",
    )
    add("--subset", type=int, default=0, help="decode the first SUBSET lines only (default: all)")
    add("--output_file", help="default: MODEL_PATH.SPLIT; - for standard output")
    add("--split", default="", help="names the output where there is no --output_file")
    add(
        "--resume",
        action="store_true",
        help="go on where a killed run of the same command stopped; without it a run starts anew and overwrites the "
        "OUTPUT.partial.jsonl that it finds",
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max_seq_length", type=int, default=512, help="tokens of source and target together (default: 512)")
    add("--max_tgt_length", type=int, default=128, help="tokens of the target (default: 128)")
    add("--beam_size", type=int, default=1, help="hypotheses a sentence; 1 is greedy search (default: 1)")
    add("--length_penalty", type=float, default=0.0, help="with beams, if positive: favour longer targets (default: 0)")
    add("--min_len", type=int, default=1, help="with beams: no end in the first MIN_LEN steps (default: 1)")
    add("--forbid_duplicate_ngrams", action="store_true", help="with beams: never repeat an n-gram")
    add("--ngram_size", type=int, default=3, help="its size (default: 3)")
    add("--forbid_ignore_word", help="words joined by | that n-gram blocking overlooks; [..] is upper-cased")
    add("--pos_shift", action="store_true", help="the checkpoint was trained to predict at the last token")
    add("--need_score_traces", action="store_true", help="with beams: write every step's scores to OUTPUT.trace.pickle")


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--no_cuda", action="store_true", help="decode on the CPU even where there is a GPU")
    add(
        "--dtype", choices=DTYPES, help="format of the linear layers' weights; int8 on a CPU, fp16 on a GPU only (fp32)"
    )
    add(
        "--fp16",
        action="store_true",
        help="the original's half precision: stands for --dtype fp16 on a GPU and for --dtype bf16 on a CPU",
    )
    add(
        "--batch_size",
        type=int,
        help="sentences decoded side by side; changes no answer, only the padding of traces (default: 32, and traces "
        "as with the original's default of 4)",
    )
    add("--threads", type=int, help="of this process (default: all cores, shared among the processes of torchrun)")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar (default: if standard error is a terminal)",
    )


def search_options(args: argparse.Namespace) -> SearchOptions:
    """The options of the search.

    Raises:
        UserError: a flag is out of range, or two do not go together.
    """
    options = {name: getattr(args, name) for name in _ANSWER_OPTIONS}
    if args.batch_size is not None:
        options["batch_size"] = args.batch_size
    return SearchOptions(**options)


def find_checkpoints(pattern: str) -> list[str]:
    """What ``--model_path`` means: folders in natural order (``ckpt-900`` before ``ckpt-1000``), or one name.

    Raises:
        UserError: the pattern matches no folder.
    """
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
    folders = [name for name in matches if os.path.isdir(name)]
    if folders:
        return sorted(folders, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    if matches == [pattern] or not glob.has_magic(pattern):
        return [pattern]
    raise UserError(f"--model_path {pattern}: matches no folder")


class Decoding:
    """One command.

    Args:
        args: the command line.
        group: the processes that share it.

    Raises:
        UserError: a flag is out of range, or two do not go together.
    """

    def __init__(self, args: argparse.Namespace, group: Group) -> None:
        self.args = args
        self.group = group
        self.options = search_options(args)
        self.device, self.dtype = "cpu", "fp32"
        check_threads(args.threads)
        self._opened: list[Results] = []

    def hint(self) -> str:
        """What to do after the run was cut short; may be empty."""
        return self._opened[-1].hint() if self._opened else ""

    def _choose_device(self) -> None:
        import torch

        if torch.cuda.is_available() and not self.args.no_cuda:
            self.device = f"cuda:{self.group.rank % self.group.local_size}"
        half = "bf16" if self.device == "cpu" else "fp16"
        self.dtype = self.args.dtype or (half if self.args.fp16 else "fp32")
        if self.args.fp16 and self.device == "cpu":
            self._note(f"half precision is for GPUs: the weights are held as {self.dtype}")

    def run(self) -> None:
        """Decodes with every checkpoint.

        Raises:
            UserError: a file or a flag is wrong.
        """
        checkpoints = find_checkpoints(self.args.model_path)
        outputs = self._outputs(checkpoints)
        sources = self._sources()
        self._choose_device()
        set_threads(self.args.threads, self.group)
        self.group.connect()
        try:
            for checkpoint, output in zip(checkpoints, outputs, strict=True):
                self._decode(checkpoint, output, sources)
            self.group.wait()
            # Only now: until all checkpoints are done, the journals tell a resumed run which of them are.
            if self.group.rank == 0:
                for results in self._opened:
                    results.remove()
        finally:
            for results in self._opened:
                results.close()
        self.group.close()

    def _outputs(self, checkpoints: Sequence[str]) -> list[Destination]:
        """Where the results of every checkpoint go, checked as far as can be told now."""
        args = self.args
        if args.output_file and len(checkpoints) > 1:
            raise UserError(
                f"--output_file {args.output_file}: is one file, and --model_path {args.model_path} matches "
                f"{len(checkpoints)} folders; leave it out to get FOLDER.{args.split}"
            )
        if not args.output_file and not os.path.exists(checkpoints[0]):
            raise UserError(f"--model_path {checkpoints[0]}: no such folder (with a hub id, give --output_file too)")
        outputs = [Destination(args.output_file or f"{checkpoint}.{args.split}") for checkpoint in checkpoints]
        for output in outputs:
            output.check()
            if not output.is_file:
                self._check_stream(output)
            elif output.path.exists() and args.input_file != STANDARD and _is_same(output.path, args.input_file):
                raise UserError(f"--output_file {output.name}: is the input file")
        return outputs

    def _check_stream(self, output: Destination) -> None:
        """An output that is no file has no place for other files beside it."""
        refused = {
            "--need_score_traces": self.args.need_score_traces,
            "--resume": self.args.resume,
            "several processes": self.group.size > 1,
        }
        for name, given in refused.items():
            if given:
                raise UserError(f"--output_file {output.name}: {name} and an output that is no file do not go together")

    def _sources(self) -> list[Source]:
        name = self.args.input_file
        if name == STANDARD and self.group.size > 1:
            raise UserError("--input_file -: several processes cannot share standard input; give a file")
        sources = read_sources(name, max(0, self.args.subset))
        kinds = mixture(sources)
        if kinds:
            label = "standard input" if name == STANDARD else name
            self._note(
                f"{label} mixes texts (first in line {kinds[0]}) and lists of tokens (first in line {kinds[1]}); each "
                f"line is read as what it is"
            )
        return sources

    def _note(self, message: str) -> None:
        if self.group.rank == 0:
            say("note", message)

    def _decode(self, checkpoint: str, output: Destination, sources: Sequence[Source]) -> None:
        """Decodes all sources with one checkpoint and writes its output."""
        model = self._load(checkpoint)
        results = self._open_results(model, output, sources)
        started = time.monotonic()
        done = set(results.done)
        pending = sorted((i for i in range(len(sources)) if i not in done), key=lambda i: -len(sources[i]))
        # The longest first and in turn, so that the processes end at about the same time.
        share = pending[self.group.rank :: self.group.size]
        before = len(done) if self.group.size == 1 else 0
        with Progress(len(share) + before, before, self._shows_progress, self._label(checkpoint)) as progress:
            self._decode_share(model, share, sources, results, progress)
        self.group.wait()
        if self.group.rank == 0:
            self._write(output, results)
            seconds = time.monotonic() - started
            rate = len(pending) / seconds
            say("done", f"{len(pending)} sentences in {seconds:.1f} s, {rate:.1f} a second: {output.name}")

    def _decode_share(
        self, model: Model, share: Sequence[int], sources: Sequence[Source], results: Results, progress: Progress
    ) -> None:
        if not share:
            return
        options = dataclasses.asdict(self.options)
        texts = [sources[i] for i in share]
        for place, result in model.generate_stream(texts, dtype=self.dtype, device=self.device, **options):
            results.append(_record(share[place], result, self.options.need_score_traces))
            progress.advance()

    @property
    def _shows_progress(self) -> bool:
        wanted = sys.stderr.isatty() if self.args.progress is None else self.args.progress
        return bool(wanted) and self.group.rank == 0

    def _label(self, checkpoint: str) -> str:
        share = f", process 0 of {self.group.size}" if self.group.size > 1 else ""
        return f"{os.path.basename(os.path.normpath(checkpoint))}{share}: "

    def _load(self, checkpoint: str) -> Model:
        from minilm_fast.modeling.model import Model

        try:
            return Model.from_pretrained(
                checkpoint,
                config_name=self.args.config_path,
                tokenizer_name=self.args.tokenizer_name,
                model_type=self.args.model_type,
                do_lower_case=self.args.do_lower_case,
                cache_dir=self.args.cache_dir,
            )
        except UserError as error:
            if os.path.exists(checkpoint):
                raise
            raise UserError(f"--model_path {checkpoint}: no such folder here, and on the hub: {error}") from None

    def _open_results(self, model: Model, output: Destination, sources: Sequence[Source]) -> Results:
        results: Results = MemoryResults()
        if output.is_file:
            header = self._header(model, sources)
            results = JournalResults(output.path, header, self.args.resume, self.group)
        self._opened.append(results)
        if results.note:
            self._note(results.note)
        return results

    def _header(self, model: Model, sources: Sequence[Source]) -> Header:
        """Everything that an answer depends on."""
        return {
            "version": __version__,
            "input_file": digest(sources),
            "examples": len(sources),
            "model": fingerprint.of_weights(model.state),
            "config": fingerprint.of_values(model.config.to_dict()),
            "tokenizer": fingerprint.of_values(model.tokenizer.record() if model.tokenizer else {}),
            "dtype": self.dtype,
            **{name: getattr(self.options, name) for name in _ANSWER_OPTIONS},
            "kernels": fingerprint.of_arithmetic() if self.device == "cpu" else "cuda",
        }

    def _write(self, output: Destination, results: Results) -> None:
        """Writes traces and output, and says what of the input was not read as it stands."""
        records = [{key: record[key] for key in _KEPT} for record in results.in_order()]
        if self.options.need_score_traces:
            lengths = [record["source_length"] for record in records]
            batch_size = self.args.batch_size or _ORIGINAL_BATCH_SIZE
            sizes = (batch_size, self.options.max_tgt_length, self.options.max_seq_length)
            traces = (record["trace"] for record in results.in_order())
            write_traces(output.trace_path, traces, padded_lengths(lengths, *sizes))
        output.write(record["text"] for record in records)
        limit = self.options.max_source_length
        self._report(records, "truncated", f"are longer than {limit} tokens and were cut")
        self._report(records, "unknown", "hold tokens that the vocabulary does not know")

    def _report(self, records: Sequence[Record], key: str, what: str) -> None:
        lines = [number for number, record in enumerate(records, 1) if record[key]]
        if lines:
            total = sum(record[key] for record in records)
            self._note(f"{len(lines)} of {len(records)} sources {what} ({total} tokens; first in line {lines[0]})")


def _record(index: int, result: GenerationResult, with_trace: bool) -> Record:
    record: Record = {
        "index": index,
        "text": result.text,
        "score": result.score,
        "source_length": result.source_length,
        "truncated": result.truncated,
        "unknown": result.unknown,
    }
    if with_trace:
        assert result.trace is not None
        record["trace"] = result.trace.padded(len(result.trace.scores))
    return record


def _is_same(path: Path, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    command: Decoding | None = None

    def run() -> None:
        nonlocal command
        command = Decoding(args, Group())
        command.run()

    return guarded(run, lambda: command.hint() if command else "")


if __name__ == "__main__":
    leave(main())
