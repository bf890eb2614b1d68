"""Speed and memory of the distillation loss of a relation, forward and backward, against plain PyTorch.

    python benchmarks/relation_kl.py --batch 16 --length 512 --threads 1,2 --json relation_kl.json

Every system's loss and gradients are compared with fp64 before it is timed; one that is wrong ends the run. Memory is
measured in a process of its own for each length and system.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from linear import best_of
from report import table

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from minilm_fast.ops import SequenceLayout

OURS = ("fp32", "bf16")
RIVALS = ("dense", "dense bf16", "loop")
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
# Score matrices that dense PyTorch holds at its worst, about; it is not run where they would not fit.
DENSE_MATRICES = 8
NOTE = (
    "Milliseconds of forward and backward pass, best of interleaved rounds: CPU time of the thread with one thread, "
    "else the clock. dense: [batch, heads, length, length] scores of both sides, log_softmax, kl_div, padded; in bf16 "
    "the products are, the softmax is not. loop: the same scores, then one sample after the other cropped to its "
    "length, as public implementations of MiniLM do. In brackets: times as fast as dense and as loop in fp32, and "
    "of the peak, which is the best of torch's large square products in this run (bf16 peak for bf16). Operations are "
    "those of the scores of both sides and of the two products of the gradient, each once; of a symmetric relation "
    "(a = b) half of the scores and one product. Exponentials and what the backward pass computes again do not count."
)


@dataclass(frozen=True)
class Case:
    """A relation: lengths of the sequences, heads, head sizes of teacher and student, and whether b is a."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    teacher: int
    student: int
    symmetric: bool

    @property
    def operations(self) -> float:
        pairs = sum(n * n for n in self.lengths) * self.heads
        if self.symmetric:
            return pairs * (self.teacher + 3.0 * self.student)
        return pairs * (2.0 * self.teacher + 6.0 * self.student)


@dataclass
class Timing:
    """Seconds of each system at one case."""

    case: Case
    threads: int
    seconds: dict[str, float]


@dataclass
class Memory:
    """Bytes above the inputs at the peak of one forward and backward pass, for each system that ran."""

    length: int
    matrix: int
    peak: dict[str, int]


def cases(batch: int, length: int) -> list[Case]:
    """Teacher of width 768, student of width 384: MiniLM's heads and MiniLMv2's 48 relation heads."""
    import torch

    generator = torch.Generator().manual_seed(0)
    mixed = tuple(torch.randint(max(1, length // 8), length + 1, (batch,), generator=generator).tolist())
    full = (length,) * batch
    span = f"{min(mixed)}-{max(mixed)}"
    return [
        Case(f"q-k, 12 heads, {length}", full, 12, 64, 32, False),
        Case(f"v-v, 12 heads, {length}", full, 12, 64, 32, True),
        Case(f"q-k, 12 heads, {span}", mixed, 12, 64, 32, False),
        Case(f"v-v, 12 heads, {span}", mixed, 12, 64, 32, True),
        Case(f"q-q, 48 heads, {length}", full, 48, 16, 8, True),
    ]


class Relation:
    """Packed inputs of a case, the ways to its loss, and their gradients."""

    def __init__(self, case: Case) -> None:
        import torch

        from minilm_fast.ops import SequenceLayout

        generator = torch.Generator().manual_seed(0)
        tokens = sum(case.lengths)
        self.case = case
        self.layout: SequenceLayout = SequenceLayout.bidirectional(list(case.lengths))
        self.teacher, self.student = (
            torch.randn(tokens, 2, case.heads, size, generator=generator) for size in (case.teacher, case.student)
        )

    def leaves(self, dtype: torch.dtype, tensor: torch.Tensor, grad: bool = False) -> list[torch.Tensor]:
        a, b = (x.detach().requires_grad_(grad) for x in tensor.to(dtype).unbind(1))
        return [a, a] if self.case.symmetric else [a, b]

    def ours(self, dtype: torch.dtype, reference: bool = False) -> Callable[[], list[torch.Tensor]]:
        import torch

        from minilm_fast import ops

        teacher, student = self.leaves(dtype, self.teacher), self.leaves(dtype, self.student, True)
        wanted = student[:1] if self.case.symmetric else student

        def run() -> list[torch.Tensor]:
            with ops.backend("reference" if reference else None):
                loss = ops.relation_kl(*teacher, *student, self.layout)
                return [loss.detach(), *torch.autograd.grad(loss, wanted)]

        return run

    def dense(self, dtype: torch.dtype, loop: bool = False) -> Callable[[], list[torch.Tensor]]:
        """On padded inputs; the padding and the mask are made beforehand."""
        import torch

        lengths = torch.tensor(self.case.lengths)
        valid = torch.arange(self.layout.max_seqlen)[None] < lengths[:, None]
        pads = None if bool(valid.all()) else ~valid
        sides = []
        for tensor, grad in ((self.teacher, False), (self.student, True)):
            padded = tensor.new_zeros(*valid.shape, *tensor.shape[1:])
            padded[valid] = tensor
            a, b = (x.transpose(1, 2).contiguous().requires_grad_(grad) for x in padded.to(dtype).unbind(2))
            sides.append([a, a] if self.case.symmetric else [a, b])
        wanted = sides[1][:1] if self.case.symmetric else sides[1]
        loss_of = _loop_loss if loop else _dense_loss

        def run() -> list[torch.Tensor]:
            with torch.no_grad():
                teacher = _scores(*sides[0])
            loss = loss_of(teacher, _scores(*sides[1]), lengths, pads)
            return [loss.detach(), *torch.autograd.grad(loss, wanted)]

        self.valid = valid
        return run

    def pack(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Padded gradients to packed ones."""
        return [results[0], *(grad.transpose(1, 2)[self.valid] for grad in results[1:])]

    def systems(self) -> dict[str, Callable[[], Any]]:
        """All systems, each compared with fp64."""
        import torch

        found: dict[str, Callable[[], list[torch.Tensor]]] = {
            "fp32": self.ours(torch.float32),
            "bf16": self.ours(torch.bfloat16),
            "dense": self.dense(torch.float32),
            "dense bf16": self.dense(torch.bfloat16),
            "loop": self.dense(torch.float32, loop=True),
        }
        exact = self.exact()
        for name, run in found.items():
            results = run()
            check(name, self.pack(results) if name in RIVALS else results, exact)
        return {name: _discard(run) for name, run in found.items()}

    def exact(self) -> list[torch.Tensor]:
        """In fp64, a sequence at a time: all at once would take more memory than the rivals."""
        import torch

        results: list[list[torch.Tensor]] = []
        for begin, end in itertools.pairwise(self.layout.cu_seqlens.tolist()):
            part = Relation(Case("", (end - begin,), *_sizes(self.case)))
            part.teacher, part.student = self.teacher[begin:end], self.student[begin:end]
            results.append(part.ours(torch.float64)())
        count = len(results)
        loss = torch.stack([r[0] for r in results]).mean()
        return [loss, *(torch.cat([r[i] for r in results]) / count for i in range(1, len(results[0])))]


def _sizes(case: Case) -> tuple[int, int, int, bool]:
    return case.heads, case.teacher, case.student, case.symmetric


def _scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5).float()


def _dense_loss(
    teacher: torch.Tensor, student: torch.Tensor, lengths: torch.Tensor, pads: torch.Tensor | None
) -> torch.Tensor:
    import torch.nn.functional as F

    if pads is not None:
        # Not -infinity: its differences would be NaN.
        teacher, student = (x.masked_fill(pads[:, None, None], -1e4) for x in (teacher, student))
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum((1, 3))
    if pads is not None:
        rows = rows.masked_fill(pads, 0.0)
    return (rows.sum(1) / (lengths * teacher.shape[1])).mean()


def _loop_loss(
    teacher: torch.Tensor, student: torch.Tensor, lengths: torch.Tensor, pads: torch.Tensor | None
) -> torch.Tensor:
    import torch.nn.functional as F

    losses = []
    for p, q, length in zip(teacher, student, lengths, strict=True):
        n = int(length)
        target, log_q = F.softmax(p[:, :n, :n], -1), F.log_softmax(q[:, :n, :n], -1)
        losses.append(F.kl_div(log_q, target, reduction="sum") / (n * p.shape[0]))
    return sum(losses[1:], losses[0]) / len(losses)


def check(name: str, results: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    tolerance = TOLERANCE["bf16" if "bf16" in name else "fp32"]
    for result, right in zip(results, exact, strict=True):
        error = ((result.double() - right).abs().max() / right.abs().max()).item()
        if not error <= tolerance:
            raise UserError(f"{name} is wrong by {error:.2g} of the largest: nothing is timed")


def _discard(run: Callable[[], Any]) -> Callable[[], None]:
    def discarding() -> None:
        run()

    return discarding


def growth(system: str, case: Case, threads: int) -> int:
    """Bytes by which one pass of a system raises this process's memory above what its inputs take."""
    import torch

    torch.set_num_threads(threads)
    small = Relation(Case("", (16,), *_sizes(case)))
    relation = Relation(case)
    dtype = torch.bfloat16 if system == "bf16" else torch.float32
    if system == "dense":
        small.dense(dtype)()
        run = relation.dense(dtype)
    else:
        small.ours(dtype)()
        run = relation.ours(dtype)
    before = _reset_peak()
    run()
    return machine.peak_memory() - before


def _reset_peak() -> int:
    """Lowers the recorded peak to what the process takes now, where the system can; returns the peak."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return machine.peak_memory()


def measure_memory(batch: int, length: int, symmetric: bool, threads: int) -> Memory:
    import psutil

    case = Case("", (length,) * batch, 12, 64, 32, symmetric)
    matrix = batch * case.heads * length * length * 4
    peak = {}
    for system in (*OURS, "dense"):
        if system == "dense" and DENSE_MATRICES * matrix > 0.5 * psutil.virtual_memory().available:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak[system] = pool.apply(growth, (system, case, threads))
    return Memory(length, matrix, peak)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": machine.describe(), "peak": {}, "timings": [], "memory": []}
    for threads in options.threads:
        rates = machine.measure_peak(threads)
        results["peak"][threads] = {n: p["cpu" if threads == 1 else "wall"] for n, p in rates.items()}
        for case in cases(options.batch, options.length):
            print(f"{threads} threads: {case.name}", file=sys.stderr)
            seconds = best_of(Relation(case).systems(), options.rounds, threads)
            results["timings"].append(Timing(case, threads, seconds))
    for length in options.memory_lengths:
        print(f"memory: length {length}", file=sys.stderr)
        results["memory"].append(measure_memory(options.batch, length, False, max(options.threads)))
    return results


def report(results: dict[str, Any]) -> str:
    parts = []
    for threads, peak in results["peak"].items():
        plural = "s" if threads > 1 else ""
        parts.append(
            f"{threads} thread{plural}; peak of torch's products, Gop/s: fp32 {peak['fp32'] / 1e9:.0f}, "
            f"bf16 {peak['bf16'] / 1e9:.0f}"
        )
        rows = [_timing_row(t, peak) for t in results["timings"] if t.threads == threads]
        parts.append(table(["relation_kl, ms", *RIVALS, *OURS], rows))
    header = ["memory, MB", *OURS, "bytes a token, fp32", "dense", "one score matrix"]
    parts.append(table(header, [_memory_row(m) for m in results["memory"]]))
    return "\n\n".join([*parts, NOTE])


def _timing_row(timing: Timing, peak: dict[str, float]) -> list[str]:
    seconds, operations = timing.seconds, timing.case.operations
    ours = [
        f"{1e3 * seconds[n]:.1f} ({seconds['dense'] / seconds[n]:.1f}x, {seconds['loop'] / seconds[n]:.1f}x, "
        f"{operations / seconds[n] / peak[n]:.0%})"
        for n in OURS
    ]
    return [timing.case.name, *(f"{1e3 * seconds[n]:.1f}" for n in RIVALS), *ours]


def _memory_row(memory: Memory) -> list[str]:
    megabytes = {name: f"{peak / 1e6:.1f}" for name, peak in memory.peak.items()}
    batch_tokens = memory.matrix / (12 * 4 * memory.length)
    return [
        f"length {memory.length}",
        *(megabytes[n] for n in OURS),
        f"{memory.peak['fp32'] / batch_tokens:.0f}",
        megabytes.get("dense", "not run"),
        f"{memory.matrix / 1e6:.1f}",
    ]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of whole numbers: {text!r}") from None
    if not numbers or any(n < 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"must be at least 1: {text!r}")
    return numbers


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest sequence, for the times")
    parser.add_argument("--memory_lengths", type=_numbers, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--threads", type=_numbers, default=[1], help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", help="lower the instruction set of minilm_fast (default, avx2, avx512)")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args(arguments)
    for name in ("batch", "length", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        import torch  # noqa: F401 (its libraries are the extension's)

        from minilm_fast import _C

        if options.isa is not None:
            _C.set_isa(options.isa)
        results = measure(options)
    except (ImportError, ValueError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(results))
    if options.json is not None:
        results |= {key: [asdict(item) for item in results[key]] for key in ("timings", "memory")}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
