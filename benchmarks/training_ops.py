"""Speed of the trained fusions, forward and backward, against eager PyTorch and torch.compile.

    python benchmarks/training_ops.py --threads 1,2 --json training_ops.json

The systems take turns in every round and the best round of each counts: CPU time with one thread, else the clock. The
peak memory of the loss is that of a process of its own for each system, above what its inputs take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from linear import best_of
from report import table

if TYPE_CHECKING:
    import torch

SMOOTHING = 0.1
DROPOUT = 0.1
EPS = 1e-12
DTYPES = ("float32", "bfloat16")
PEAK_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}
COPY_BYTES = 1 << 28
NOTE = (
    "ms of forward and backward together. Limit: for the fusions the bytes that each tensor takes read or written once "
    "a pass, over the bandwidth of a large copy; for the loss the three products that it cannot do without, over the "
    "peak of large square products. Eager does what autocast does: parameters are cast to the activations' dtype, "
    "logits are made fp32 for the loss."
)
Function = Callable[..., "torch.Tensor"]


@dataclass(frozen=True)
class Sizes:
    """Rows of the layers and of the loss, channels, intermediate size, words of the vocabulary."""

    rows: int
    loss_rows: int
    channels: int
    intermediate: int
    vocabulary: int


@dataclass
class Case:
    """An operator at one size: its inputs, the systems that compute it, and the work that it takes."""

    name: str
    dtype: str
    inputs: list[torch.Tensor]
    systems: dict[str, Function]
    bytes: int = 0
    operations: int = 0


@dataclass
class Timing:
    """Seconds of each system at one case, and of the machine's limit."""

    name: str
    dtype: str
    threads: int
    seconds: dict[str, float]
    limit: float


def norm_case(sizes: Sizes, dtype: str) -> Case:
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    kind, shape, seed = getattr(torch, dtype), (sizes.rows, sizes.channels), torch.tensor([1])
    inputs = [torch.randn(shape).to(kind), torch.randn(shape).to(kind), *torch.randn(3, sizes.channels).unbind()]

    def ours(x: Any, residual: Any, weight: Any, bias: Any, x_bias: Any) -> torch.Tensor:
        return ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, DROPOUT, seed, x_bias)

    def eager(x: Any, residual: Any, weight: Any, bias: Any, x_bias: Any) -> torch.Tensor:
        total = F.dropout(x + x_bias.to(kind), DROPOUT) + residual
        return F.layer_norm(total, (sizes.channels,), weight.to(kind), bias.to(kind), EPS)

    moved = 8 * inputs[0].numel() * inputs[0].element_size()
    return Case(f"dropout_add_layer_norm {shape[0]} x {shape[1]}", dtype, inputs, {"ours": ours, "eager": eager}, moved)


def gelu_case(sizes: Sizes, dtype: str) -> Case:
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    kind, shape = getattr(torch, dtype), (sizes.rows, sizes.intermediate)
    inputs = [torch.randn(shape).to(kind), torch.randn(sizes.intermediate)]

    def eager(x: Any, bias: Any) -> torch.Tensor:
        return F.gelu(x + bias.to(kind))

    moved = 5 * inputs[0].numel() * inputs[0].element_size()
    systems = {"ours": ops.bias_gelu, "eager": eager}
    return Case(f"bias_gelu {shape[0]} x {shape[1]}", dtype, inputs, systems, moved)


def loss_case(sizes: Sizes, dtype: str) -> Case:
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    kind, words = getattr(torch, dtype), sizes.vocabulary
    labels = torch.randint(1, words, (sizes.loss_rows,))
    weight = torch.randn(words, sizes.channels).mul_(sizes.channels**-0.5)
    inputs = [torch.randn(sizes.loss_rows, sizes.channels).to(kind), weight, torch.randn(words)]

    def ours(hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        return ops.label_smoothed_cross_entropy(hidden, weight, bias, labels, SMOOTHING)

    def eager(hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        log = F.linear(hidden, weight.to(kind), bias.to(kind)).float().log_softmax(1)
        target = torch.full_like(log, SMOOTHING / (words - 2))
        target[:, 0] = 0.0
        target.scatter_(1, labels[:, None], 1 - SMOOTHING)
        return F.kl_div(log, target, reduction="none").sum(1)

    def built_in(hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        logits = F.linear(hidden, weight.to(kind), bias.to(kind)).float()
        return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="none")

    systems = {"ours": ours, "eager": eager, "F.cross_entropy": built_in}
    operations = 6 * sizes.loss_rows * sizes.channels * words
    name = f"label_smoothed_cross_entropy {sizes.loss_rows} x {sizes.channels} -> {words}"
    return Case(name, dtype, inputs, systems, operations=operations)


CASES = (norm_case, gelu_case, loss_case)


def step(function: Function, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A forward and backward pass whose gradients are thrown away by the next one."""
    import torch

    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*leaves))

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).backward(upstream)

    return run


def measure(sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    results: dict[str, Any] = {"machine": machine.describe(), "limits": {}, "timings": [], "memory": {}}
    for threads in options.threads:
        torch.set_num_threads(threads)
        peak = {name: p["cpu" if threads == 1 else "wall"] for name, p in machine.measure_peak(threads).items()}
        limits = {"bandwidth": measure_bandwidth(threads)} | {d: peak[f] for d, f in PEAK_FORMATS.items()}
        results["limits"][threads] = limits
        for make in CASES:
            for dtype in DTYPES:
                case = make(sizes, dtype)
                print(f"{threads} threads: {case.name} {dtype}", file=sys.stderr)
                systems = dict(case.systems)
                if options.compile:
                    systems["compiled"] = torch.compile(case.systems["eager"])
                runs = {name: step(function, case.inputs) for name, function in systems.items()}
                seconds = best_of(runs, options.rounds, threads)
                limit = case.operations / limits[dtype] if case.operations else case.bytes / limits["bandwidth"]
                results["timings"].append(Timing(case.name, dtype, threads, seconds, limit))
    for dtype in DTYPES:
        results["memory"][dtype] = {name: loss_memory(sizes, dtype, name) for name in loss_case(sizes, dtype).systems}
    return results


def measure_bandwidth(threads: int) -> float:
    """Bytes per second read and written by a copy that no cache holds."""
    import torch

    source, target = torch.randn(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    return 2 * COPY_BYTES / best_of({"copy": lambda: target.copy_(source)}, 5, threads)["copy"]


def loss_memory(sizes: Sizes, dtype: str, system: str) -> int:
    """Bytes that the loss takes at most above its inputs, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", system, "--dtype", dtype]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in asdict(sizes).items()]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(sizes: Sizes, dtype: str, system: str) -> None:
    import torch

    torch.set_num_threads(1)
    # The libraries' own buffers come with the first call, here a small one.
    small = loss_case(Sizes(1, 8, sizes.channels, 1, 256), dtype)
    step(small.systems[system], small.inputs)()
    case = loss_case(sizes, dtype)
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    before = machine.peak_memory()
    case.systems[system](*leaves).sum().backward()
    print(machine.peak_memory() - before)


def report(results: dict[str, Any]) -> str:
    parts = []
    for threads, limits in results["limits"].items():
        timings = [t for t in results["timings"] if t.threads == threads]
        names = list(dict.fromkeys(name for t in timings for name in t.seconds))
        rows = [
            [t.name, t.dtype, *(_cell(t, name) for name in names), f"{t.limit / t.seconds['ours']:.0%}"]
            for t in timings
        ]
        heading = f"{threads} thread{'s' if threads > 1 else ''}; copy {limits['bandwidth'] / 1e9:.1f} GB/s, peak " + (
            ", ".join(f"{name} {limits[name] / 1e9:.0f} Gop/s" for name in DTYPES)
        )
        parts.append(heading + "\n" + table(["operator", "dtype", *names, "of the limit"], rows))
    memory = [[dtype, *(f"{size / 1e6:.0f}" for size in sizes.values())] for dtype, sizes in results["memory"].items()]
    systems = next(iter(results["memory"].values()))
    parts.append("Peak memory of the loss in MB\n" + table(["dtype", *systems], memory))
    return "\n\n".join([*parts, NOTE])


def _cell(timing: Timing, name: str) -> str:
    if name not in timing.seconds:
        return ""
    seconds, ours = timing.seconds[name], timing.seconds["ours"]
    return f"{seconds * 1e3:.1f}" + ("" if name == "ours" else f" ({seconds / ours:.2f}x)")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a whole number: {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text!r}")
    return number


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=_positive, default=6000, help="rows of the fusions")
    parser.add_argument("--loss-rows", type=_positive, default=512, help="rows of the loss")
    parser.add_argument("--channels", type=_positive, default=384)
    parser.add_argument("--intermediate", type=_positive, default=1536, help="channels of bias_gelu")
    parser.add_argument("--vocabulary", type=_positive, default=30522)
    parser.add_argument("--threads", type=_positives, default=[1], help="numbers of threads")
    parser.add_argument("--rounds", type=_positive, default=7)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager functions as well")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    sizes = Sizes(options.rows, options.loss_rows, options.channels, options.intermediate, options.vocabulary)
    if options.memory_of is not None:
        print_memory(sizes, options.dtype, options.memory_of)
        return 0
    results = measure(sizes, options)
    print(report(results))
    if options.json is not None:
        results["timings"] = [asdict(t) for t in results["timings"]]
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
