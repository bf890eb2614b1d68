"""Speed of the operators, of decoding and of training on a GPU, each next to its peers in one run.

    python benchmarks/gpu.py --json gpu.json --plot gpu.png

Each result is compared with the first system's before anything is timed; one that differs ends the run. A peer that
cannot run here is left out with its reason. Rounds are interleaved, times are CUDA events' and their medians are shown.
``--device cpu`` with a small shape tries the script out without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import table
from shapes import SHAPES

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from gpu_cases import Case, System

CASES = ("attention", "relation_kl", "decode_attention", "vocabulary", "decoding", "training")
# Relative to the largest number of the result.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
WARM_UP = 2
NOTE = (
    "Medians of interleaved rounds, milliseconds. of the limit: what the bytes would take at the copy speed or the "
    "operations at the speed of large products, whichever is longer, both measured in this run, over what the fastest "
    "system of ours took."
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="l12-h384")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bf16")
    parser.add_argument("--batch", type=int, default=64, help="sequences; decoding takes half as many")
    parser.add_argument("--source", type=int, default=464)
    parser.add_argument("--target", type=int, default=48)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them")
    options = parser.parse_args(argv)
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}")
    return options


def seconds(run: System, device: torch.device) -> float:
    """One run's time: the device's own, or on a CPU the clock's."""
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large product."""
    import torch

    large = device.type == "cuda"
    a = torch.randn((1 << 28 if large else 1 << 22), device=device)
    b = torch.empty_like(a)
    side = 8192 if large else 512
    x = torch.randn(side, side, dtype=dtype, device=device)

    def best(run: Any) -> float:
        return min(seconds(run, device) for _ in range(5))

    return 2 * a.nbytes / best(lambda: b.copy_(a)), 2 * side**3 / best(lambda: x @ x)


def _tensors(result: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    return list(result) if isinstance(result, tuple) and all(isinstance(x, torch.Tensor) for x in result) else []


def usable_systems(case: Case, tolerance: float) -> tuple[dict[str, System], dict[str, str]]:
    """The systems that run and agree, after their warm-up, and why the others do not run.

    Raises:
        UserError: a result is wrong.
    """
    import torch

    usable: dict[str, System] = {}
    left_out: dict[str, str] = {}
    norms: list[float] = []
    for name, run in case.systems.items():
        try:
            results = _tensors(run())
            for _ in range(WARM_UP - 1):
                run()
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            if name == "ours":
                raise
            left_out[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            continue
        # Layouts of the systems differ; the norm of what they compute does not.
        found = [float(torch.linalg.vector_norm(torch.cat([x.double().flatten() for x in results])))] if results else []
        if norms and found and not abs(found[0] - norms[0]) <= tolerance * norms[0]:
            raise UserError(f"{case.name}: the norm of {name} is {found[0]:.6g}, that of ours {norms[0]:.6g}")
        norms = norms or found
        usable[name] = run
    return usable, left_out


def measure(
    case: Case, options: argparse.Namespace, device: torch.device, peaks: tuple[float, float]
) -> dict[str, Any]:
    """Times a case; what it found as plain data."""
    systems, left_out = usable_systems(case, TOLERANCE[options.dtype])
    runs: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, run in systems.items():
            runs[name].append(seconds(run, device))
    bandwidth, rate = peaks
    return {
        "case": case.name,
        "seconds": {name: statistics.median(values) for name, values in runs.items()},
        "all_seconds": runs,
        "left_out": left_out,
        "limit_seconds": max(case.bytes / bandwidth, case.operations / rate),
        "units": case.units,
        "unit": case.unit,
    }


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for one case."""
    ours = result["seconds"].get("ours")
    rows = []
    for name, value in result["seconds"].items():
        limit = result["limit_seconds"]
        rows.append(
            [
                result["case"],
                name,
                f"{value * 1e3:.3f}",
                f"{value / ours:.2f}" if ours else "",
                f"{limit / value:.0%}" if limit and name == "ours" else "",
                f"{result['units'] / value:.1f} {result['unit']}/s" if result["units"] else "",
            ]
        )
    return rows


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times as long as ours each system takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{r['case']}: {name}", value / r["seconds"]["ours"])
        for r in results
        for name, value in r["seconds"].items()
        if name != "ours"
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * max(1, len(bars))))
    axes.barh([name for name, _ in bars], [value for _, value in bars])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer over ours")
    figure.tight_layout()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gpu_cases import CASES as MAKERS
    from gpu_cases import Size

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU; --device cpu with a small shape tries the script out", file=sys.stderr)
        return 1
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    peaks = limits(device, dtype)
    results: list[dict[str, Any]] = []
    for name in options.cases.split(","):
        batch = options.batch if name in ("attention", "relation_kl", "training") else max(1, options.batch // 2)
        size = Size(
            *(SHAPES[options.shape], batch, options.source, options.target, options.beams, options.steps, dtype, device)
        )
        for case in MAKERS[name](size):
            result = measure(case, options, device, peaks)
            results.append(result)
            print(f"{case.name}: done", file=sys.stderr)
            for peer, reason in result["left_out"].items():
                print(f"{case.name}: {peer} was not run: {reason}")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "a CPU"
    print(f"{machine}, torch {torch.__version__}, {options.dtype}; copy {peaks[0] / 1e9:.0f} GB/s, "
          f"products {peaks[1] / 1e12:.2f} TFLOP/s")  # fmt: skip
    header = ["case", "system", "ms", "over ours", "of the limit", "rate"]
    print(table(header, [row for result in results for row in rows_of(result)]))
    print(NOTE)
    if options.json:
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": machine,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "options": {key: str(value) for key, value in vars(options).items()},
            "bytes_per_second": peaks[0],
            "operations_per_second": peaks[1],
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
