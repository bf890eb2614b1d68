"""Speed of the packed linear layers and of the vocabulary projection against torch, MKL and oneDNN.

    python benchmarks/linear.py --shape l12-h384 --rows 10,320,466,4096 --threads 1,2 --json linear.json

Each product is timed over the weights of all layers in turn, as a model uses them: by the time a weight comes round
again, it has left the second-level cache. ``--layers 1`` times it from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from report import table
from shapes import SHAPES, ModelShape

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    import torch

FORMATS = ("fp32", "bf16", "int8")
CANDIDATES = 5
NOTE = (
    "Gop/s, the best of interleaved rounds: CPU time of the thread with one thread, else the clock. All take and give "
    "fp32, conversions included, and do what the line says (bias, GELU). F.linear is MKL; oneDNN has packed weights. "
    "In brackets: over the faster of F.linear and oneDNN fp32 for fp32, over oneDNN bf16 for bf16 and int8; and of the "
    "peak, which is the best of large square products, torch's and ours, in this run."
)


@dataclass(frozen=True)
class Product:
    """``[rows, inputs]`` times ``[inputs, outputs]``, with the erf-GELU where the model has it."""

    rows: int
    inputs: int
    outputs: int
    gelu: bool

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.inputs} -> {self.outputs}{' GELU' if self.gelu else ''}"


@dataclass
class Timing:
    """Operations per second of each system at one product."""

    product: Product
    threads: int
    rates: dict[str, float]


def products(shape: ModelShape, rows: Sequence[int]) -> list[Product]:
    d, f = shape.hidden, shape.intermediate
    layers = ((d, 3 * d, False), (d, d, False), (d, f, True), (f, d, False))
    return [Product(m, k, n, gelu) for m in rows for k, n, gelu in layers]


def measure_linear(product: Product, layers: int, formats: Sequence[str], rounds: int, threads: int) -> Timing:
    """Times every system at one product, its weights taken in turn."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    x = torch.randn(product.rows, product.inputs)
    weights = [torch.randn(product.outputs, product.inputs) / product.inputs**0.5 for _ in range(layers)]
    bias = torch.randn(product.outputs)
    activation = "gelu" if product.gelu else "none"

    def plain() -> None:
        for weight in weights:
            y = F.linear(x, weight, bias)
            if product.gelu:
                F.gelu(y)

    def ours(format: str) -> Callable[[], None]:
        packed = [ops.pack_weight(weight, format) for weight in weights]

        def run() -> None:
            for weight in packed:
                ops.linear(x, weight, bias, activation)

        return run

    systems: dict[str, Callable[[], None]] = {"F.linear": plain}
    for dtype, name in ((torch.float32, "oneDNN fp32"), (torch.bfloat16, "oneDNN bf16")):
        packed = onednn(x, weights, bias, activation, dtype)
        if packed is not None:
            systems[name] = packed
    systems |= {format: ours(format) for format in formats}
    seconds = best_of(systems, rounds, threads)
    return Timing(product, threads, {name: product.operations * layers / s for name, s in seconds.items()})


def onednn(
    x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor, activation: str, dtype: torch.dtype
) -> Callable[[], None] | None:
    """oneDNN with packed weights, through torch's private operators; None where this torch lacks them."""
    import torch

    try:
        pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        packed = [pack(weight.to(dtype), x.shape[0]) for weight in weights]
        cast_bias = bias.to(dtype)
        multiply(x.to(dtype), packed[0], cast_bias, activation, [], "none")
    except (AttributeError, RuntimeError):
        return None

    def run() -> None:
        for weight in packed:
            multiply(x.to(dtype), weight, cast_bias, activation, [], "none").float()

    return run


def measure_head(shape: ModelShape, rows: int, formats: Sequence[str], rounds: int, threads: int) -> Timing:
    """Times the projection to the vocabulary with log-softmax and the choice of the best candidates."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    x = torch.randn(rows, shape.hidden) * 3
    weight, bias = torch.randn(shape.vocab, shape.hidden) / shape.hidden**0.5, torch.randn(shape.vocab)

    def plain() -> None:
        torch.topk(torch.log_softmax(F.linear(x, weight, bias), -1), CANDIDATES)

    def ours(format: str) -> Callable[[], None]:
        packed = ops.pack_weight(weight, format)

        def run() -> None:
            ops.lm_head_topk(x, packed, bias, CANDIDATES)

        return run

    systems = {"F.linear": plain} | {format: ours(format) for format in formats}
    product = Product(rows, shape.hidden, shape.vocab, False)
    seconds = best_of(systems, rounds, threads)
    return Timing(product, threads, {name: product.operations / s for name, s in seconds.items()})


def best_of(systems: dict[str, Callable[[], None]], rounds: int, threads: int) -> dict[str, float]:
    """Least seconds of each system over interleaved rounds, after one that is not counted."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(systems, float("inf"))
    for counted in [False] + [True] * rounds:
        for name, run in systems.items():
            begin = clock()
            run()
            if counted:
                best[name] = min(best[name], clock() - begin)
    return best


def measure_peak(threads: int) -> dict[str, float]:
    """Operations per second of the best of torch's and our large square products, for each format."""
    import torch

    from minilm_fast import ops

    peak = {name: p["cpu" if threads == 1 else "wall"] for name, p in machine.measure_peak(threads).items()}
    size = machine.PEAK_SIZES[-1]
    x, weight = torch.randn(2, size, size).unbind()
    for format in FORMATS:
        packed = ops.pack_weight(weight, format)

        def run(packed: ops.PackedWeight = packed) -> None:
            ops.linear(x, packed)

        seconds = best_of({format: run}, machine.PEAK_REPEATS, threads)
        peak[format] = max(peak[format], 2 * size**3 / seconds[format])
    return peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    shape = SHAPES[options.shape]
    results: dict[str, Any] = {"machine": machine.describe(), "peak": {}, "linear": [], "head": []}
    with torch.inference_mode():
        for threads in options.threads:
            results["peak"][threads] = measure_peak(threads)
            for product in products(shape, options.rows):
                print(f"{threads} threads: {product.name}", file=sys.stderr)
                timing = measure_linear(product, options.layers, options.formats, options.rounds, threads)
                results["linear"].append(timing)
            for rows in options.head_rows:
                print(f"{threads} threads: vocabulary, {rows} rows", file=sys.stderr)
                results["head"].append(measure_head(shape, rows, options.formats, options.rounds, threads))
    return results


def report(results: dict[str, Any], formats: Sequence[str]) -> str:
    parts = []
    for title, key in (("linear", "linear"), (f"vocabulary, best {CANDIDATES}", "head")):
        for threads, peak in results["peak"].items():
            timings = [t for t in results[key] if t.threads == threads]
            if not timings:
                continue
            peers = [n for n in ("F.linear", "oneDNN fp32", "oneDNN bf16") if n in timings[0].rates]
            rows = [
                [t.product.name, *(f"{t.rates[n] / 1e9:.0f}" for n in peers), *(_cell(t, f, peak) for f in formats)]
                for t in timings
            ]
            heading = f"{title}, {threads} thread{'s' if threads > 1 else ''}; peak " + ", ".join(
                f"{name} {rate / 1e9:.0f}" for name, rate in peak.items()
            )
            parts.append(heading + "\n" + table(["rows x inputs -> outputs", *peers, *formats], rows))
    return "\n\n".join([*parts, NOTE])


def _cell(timing: Timing, format: str, peak: dict[str, float]) -> str:
    rates = timing.rates
    in_fp32 = max(rates["F.linear"], rates.get("oneDNN fp32", 0.0))
    rival = in_fp32 if format == "fp32" else rates.get("oneDNN bf16", in_fp32)
    return f"{rates[format] / 1e9:.0f} ({rates[format] / rival:.2f}x, {rates[format] / peak[format]:.0%})"


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of whole numbers: {text!r}") from None
    if any(n < 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"must be at least 1: {text!r}")
    return numbers


def _formats(text: str) -> list[str]:
    formats = text.split(",")
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0]!r}: one of {', '.join(FORMATS)}")
    return formats


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="l12-h384", help="width, feed-forward and vocabulary"
    )
    parser.add_argument(
        "--rows", type=_numbers, default=[10, 320, 466, 4096], help="numbers of rows of the linear layers"
    )
    parser.add_argument("--head-rows", type=_numbers, default=[5, 160], help="rows at the vocabulary")
    parser.add_argument("--formats", type=_formats, default=list(FORMATS), help="formats of the packed weights")
    parser.add_argument("--threads", type=_numbers, default=[1], help="numbers of threads")
    parser.add_argument("--layers", type=int, default=12, help="weights that are used in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", help="lower the instruction set of minilm_fast, such as to avx2")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args(arguments)
    for name in ("layers", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def _use_instruction_set(name: str | None) -> None:
    try:
        import torch  # noqa: F401 (its libraries are the extension's)

        from minilm_fast import _C

        if name is not None:
            _C.set_isa(name)
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        _use_instruction_set(options.isa)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = measure(options)
    print(report(results, options.formats))
    if options.json is not None:
        results |= {key: [asdict(t) for t in results[key]] for key in ("linear", "head")}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
