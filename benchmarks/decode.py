"""Decoding side by side: minilm_fast and its peers on one CPU, in one run.

    python benchmarks/decode.py --shape l12-h384 --peers hf,ctranslate2 --dtypes fp32,bf16,int8 --threads 2

Beam search with a forced number of steps over random weights. See ``benchmarks/README.md`` for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import machine
import report
from harness import Series, Unsupported, Worker
from peers import PEERS
from peers.base import DecodeJob
from shapes import SHAPES, WORKLOADS, DecodeWorkload

from minilm_fast.cli import guarded
from minilm_fast.errors import UserError

OURS = "minilm_fast"
DTYPES = ("fp32", "bf16", "int8")


@dataclass
class Contestant:
    """One system in one dtype, its process and its figures."""

    name: str
    dtype: str
    worker: Worker
    version: str = ""
    settings: str = ""
    batch: Series = field(default_factory=Series)
    alone: Series = field(default_factory=Series)
    memory: int = 0
    breakdown: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        fields = ("name", "dtype", "version", "settings", "memory", "breakdown")
        return {
            **{name: getattr(self, name) for name in fields},
            "batch": self.batch.runs,
            "alone": self.alone.runs,
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--shape", default="l12-h384", choices=sorted(SHAPES), help="model shape")
    parser.add_argument(
        "--workload", default="summarisation", choices=sorted(WORKLOADS), help="where the next four start from"
    )
    parser.add_argument("--batch", type=_positive, help="sources decoded together")
    parser.add_argument("--beam", type=_positive, help="hypotheses a source")
    parser.add_argument("--source", type=_positive, help="tokens a source, special tokens counted")
    parser.add_argument("--steps", type=_positive, help="forced decoding steps")
    parser.add_argument("--dtypes", default="fp32,bf16,int8", type=_names(DTYPES), help="comma-separated")
    parser.add_argument(
        "--peers",
        default="hf,ctranslate2",
        type=_names([name for name in PEERS if name not in (OURS, "original")]),
        help="comma-separated; empty for none",
    )
    parser.add_argument("--original", type=Path, metavar="PATH", help="also the original: a checkout of s2s-ft")
    parser.add_argument("--only-peers", action="store_true", help="leave minilm_fast itself out")
    parser.add_argument("--threads", type=_positive, default=2)
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved runs of each system")
    parser.add_argument("--original-rounds", type=int, default=1, help="rounds that the original, slow, takes part in")
    parser.add_argument("--no-alone", action="store_true", help="do not measure one sequence alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def workload(options: argparse.Namespace) -> DecodeWorkload:
    """The named workload with the command line's changes.

    Raises:
        UserError: source and target together are longer than the model's table of positions.
    """
    changes = {name: getattr(options, name) for name in ("batch", "beam", "source", "steps")}
    load = replace(WORKLOADS[options.workload], **{name: value for name, value in changes.items() if value})
    shape = SHAPES[options.shape]
    if load.source + load.steps > shape.positions:
        raise UserError(
            f"--source {load.source} and --steps {load.steps} need {load.source + load.steps} positions, "
            f"{shape.name} has {shape.positions}"
        )
    if load.source < 3:
        raise UserError(f"--source {load.source}: two special tokens and at least one word are needed")
    return load


def contestants(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and dtypes in the order in which a round runs them."""
    wanted = [] if options.only_peers else [(OURS, dtype) for dtype in options.dtypes]
    wanted += [(peer, dtype) for peer in options.peers for dtype in options.dtypes]
    if options.original is not None:
        wanted.append(("original", "fp32"))
    return wanted


class Benchmark:
    """One run: the children, the rounds, and what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = SHAPES[options.shape]
        self.load = workload(options)
        self.systems: list[Contestant] = []
        self.left_out: dict[str, str] = {}
        self.peaks: list[dict[str, dict[str, float]]] = []

    def run(self) -> None:
        """Measure everything.

        Raises:
            WorkerError: a child failed.
        """
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minilm-fast-bench-")))
            self._prepare(folder)
            peak = stack.enter_context(Worker("peak", self.options.threads))
            for name, dtype in contestants(self.options):
                self._start(stack, folder, name, dtype)
            for number in range(self.options.rounds):
                self._round(number, peak)
            for system in self.systems:
                system.memory = system.worker.ask("memory")["peak"]
            for system in self.systems:
                if system.name == OURS:
                    say(f"breakdown: {system.label}")
                    system.breakdown = system.worker.ask("breakdown")["seconds"]
            if not self.options.no_alone:
                self._one_alone()

    def _prepare(self, folder: Path) -> None:
        formats = [peer for peer in self.options.peers if peer in ("hf", "ctranslate2")]
        say("preparing models")
        with Worker("prepare", self.options.threads) as worker:
            worker.ask("prepare", shape=asdict(self.shape), seed=self.options.seed, folder=str(folder), formats=formats)

    def _start(self, stack: contextlib.ExitStack, folder: Path, name: str, dtype: str) -> None:
        job = DecodeJob(
            shape=self.shape,
            load=self.load,
            dtype=dtype,
            threads=self.options.threads,
            seed=self.options.seed,
            folder=folder,
            original=self.options.original,
        )
        say(f"building {name} {dtype}")
        worker = stack.enter_context(Worker(f"{name} {dtype}", self.options.threads))
        try:
            built = worker.ask("build", name=name, job=job.to_json())
        except Unsupported as error:
            worker.close()
            self.left_out[f"{name} {dtype}"] = str(error)
            return
        self.systems.append(Contestant(name, dtype, worker, built["version"], built["settings"]))

    def _round(self, number: int, peak: Worker) -> None:
        self.peaks.append(peak.ask("peak", threads=self.options.threads)["peak"])
        for system in self.systems:
            if system.name == "original" and number >= self.options.original_rounds:
                continue
            run = system.worker.ask("run")
            system.batch.runs.append(run)
            cpu = run["cpu"] / run["sequences"]
            say(f"round {number + 1}/{self.options.rounds}: {system.label}: {cpu:.3f} cpu-s a sequence")

    def _one_alone(self) -> None:
        """One sequence by itself, from text to text where the system has a tokenizer; interleaved again."""
        systems = [system for system in self.systems if system.name != "original"]
        for system in systems:
            system.worker.ask("alone", as_text=system.name == OURS)
        for number in range(self.options.rounds):
            for system in systems:
                system.alone.runs.append(system.worker.ask("run"))
            say(f"one sequence alone: round {number + 1}/{self.options.rounds}")

    def peak(self) -> dict[str, dict[str, float]]:
        """The best that any round saw, by dtype."""
        return {
            dtype: {key: max(peak[dtype][key] for peak in self.peaks) for key in ("wall", "cpu")}
            for dtype in self.peaks[0]
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": machine.describe(),
            "shape": asdict(self.shape),
            "workload": asdict(self.load),
            "threads": self.options.threads,
            "rounds": self.options.rounds,
            "peak_operations_per_second": self.peak(),
            "systems": [system.to_json() for system in self.systems],
            "left_out": self.left_out,
        }


def say(text: str) -> None:
    """Progress, on standard error: standard output is the table's."""
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> None:
    """Measures, reports and writes what was asked for."""
    for path in (options.json, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    benchmark = Benchmark(options)
    benchmark.run()
    if not benchmark.systems:
        raise UserError("nothing could be measured: " + "; ".join(benchmark.left_out.values()))
    results = benchmark.to_json()
    print(report.text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        report.plot(results, options.plot)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: run(options), batch_flag="--batch")


if __name__ == "__main__":
    sys.exit(main())
