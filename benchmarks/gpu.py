"""Speed of the operators, of decoding and of training on a GPU, each next to its peers in one run.

    python benchmarks/gpu.py --json gpu.json --plot gpu.png

Each result is compared with fp64 before anything is timed; one that is wrong ends the run. A peer that cannot run here
is left out with its reason. Rounds are interleaved, times are CUDA events' and their medians are shown, and beside them
whether the goals are met, which hold for an H200 and the sizes that are taken by default. ``--device cpu`` with a small
shape tries the script out without a GPU.
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
    from gpu_case import Case, Goal, System

CASES = ("attention", "relation_kl", "decode_attention", "step", "vocabulary", "bookkeeping", "decoding", "training")
# Of a result against fp64: the norm of the difference over the norm.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
WARM_UP = 2
LEAST_ROUNDS = 3
SIZES = ("shape", "dtype", "batch", "source", "target", "beams", "steps")
"""The options that make the size of a case."""
GOAL_DEVICE = "H200"
NOTE = (
    "Medians of interleaved rounds, milliseconds. error: the norm of the difference from fp64 over the norm, the "
    "largest of the results compared, gradients too, of decoding that of the mean probability of a token; - where "
    "a system computes something else. peak: device memory of a run beyond what was taken before it. of the limit: "
    "what the bytes would take at the copy speed or the operations at the speed of large products, whichever is "
    "longer, both measured in this run, over what the fastest system of ours took."
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
    parser.add_argument("--seconds", type=float, default=10.0, help="a case makes no further rounds after so long")
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile for the peers")
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


def usable_systems(case: Case, tolerance: float) -> tuple[dict[str, System], dict[str, float], dict[str, str]]:
    """The systems that run and agree, after their warm-up; the errors of those compared; why the others do not run.

    Raises:
        UserError: a result is wrong.
    """
    from gpu_case import OURS

    usable: dict[str, System] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    exact = None if case.exact is None else list(case.exact())
    for name, system in case.systems.items():
        try:
            found = system.results()
            for _ in range(WARM_UP):
                system()
        except Exception as error:
            # Compilers and libraries raise what they like.
            if name.startswith(OURS):
                raise
            left_out[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            continue
        usable[name] = system
        if exact is not None and name not in case.different:
            errors[name] = largest_error(found, exact)
            if not errors[name] <= tolerance:
                raise UserError(f"{case.name}: {name} is wrong by {errors[name]:.2g}: nothing is timed")
    return usable, errors, left_out


def largest_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest relative error of the results; NaN if a result has one or another shape."""
    import torch

    errors = []
    for mine, right in zip(found, exact, strict=True):
        if mine.shape != right.shape:
            return float("nan")
        difference = mine.to(right.device, torch.float64) - right.double()
        errors.append(float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(right.double())))
    return float("nan") if any(error != error for error in errors) else max(errors)


def peak_bytes(run: System, device: torch.device) -> int | None:
    """Device memory that a run takes beyond what is taken; None on a CPU, where nothing counts it."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    case: Case, options: argparse.Namespace, device: torch.device, peaks: tuple[float, float]
) -> dict[str, Any]:
    """Times a case; what it found as plain data."""
    systems, errors, left_out = usable_systems(case, TOLERANCE[options.dtype])
    runs: dict[str, list[float]] = {name: [] for name in systems}
    start = time.perf_counter()
    for done in range(options.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > options.seconds:
            break
        for name, run in systems.items():
            runs[name].append(seconds(run, device))
    bandwidth, rate = peaks
    result = {
        "case": case.name,
        "seconds": {name: statistics.median(values) for name, values in runs.items()},
        "all_seconds": runs,
        "errors": errors,
        "peak_bytes": {name: peak_bytes(run, device) for name, run in systems.items()},
        "left_out": left_out,
        "limit_seconds": max(case.bytes / bandwidth, case.operations / rate),
        "units": case.units,
        "unit": case.unit,
    }
    result["goals"] = [{"goal": str(goal), **judge(goal, result)} for goal in case.goals]
    return result


def fastest_of_ours(result: dict[str, Any]) -> str:
    """The name of the fastest system of ours."""
    from gpu_case import OURS

    return min((name for name in result["seconds"] if name.startswith(OURS)), key=result["seconds"].__getitem__)


def judge(goal: Goal, result: dict[str, Any]) -> dict[str, Any]:
    """What was found for a goal (None: it could not be measured), and whether it is met."""
    name = fastest_of_ours(result)
    ours, units = result["seconds"][name], result["units"] or 1.0
    found: float | None
    at_least = True
    if goal.kind == "ms":
        found, at_least = 1e3 * ours / units, False
    elif goal.kind == "peak MB":
        peak = result["peak_bytes"][name]
        found, at_least = None if peak is None else peak / 1e6, False
    elif goal.kind == "a second":
        found = units / ours
    elif goal.kind == "of the limit":
        found = result["limit_seconds"] / ours
    elif goal.kind == "times":
        found = result["seconds"][goal.peer] / ours if goal.peer in result["seconds"] else None
    else:
        raise ValueError(f"a goal cannot be of the kind {goal.kind!r}")
    if found is None:
        return {"found": None, "met": None}
    return {"found": found, "met": found >= goal.bound if at_least else found <= goal.bound}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for one case."""
    best = fastest_of_ours(result)
    ours = result["seconds"][best]
    rows = []
    for name, value in result["seconds"].items():
        limit, peak, error = result["limit_seconds"], result["peak_bytes"][name], result["errors"].get(name)
        rows.append(
            [
                result["case"],
                name,
                f"{value * 1e3:.3f}",
                f"{value / ours:.2f}",
                "-" if error is None else f"{error:.1e}",
                "-" if peak is None else f"{peak / 1e6:.1f}",
                f"{limit / value:.0%}" if limit and name == best else "",
                f"{result['units'] / value:.1f} {result['unit']}/s" if result["units"] else "",
            ]
        )
    return rows


def goal_rows(result: dict[str, Any], judged: bool) -> list[list[str]]:
    """The lines of the table of goals; ``judged``: the device and the sizes are those that the goals are for."""
    rows = []
    for goal in result["goals"]:
        found = "not measured" if goal["found"] is None else f"{goal['found']:.4g}"
        verdict = {True: "met", False: "missed", None: "open"}[goal["met"]]
        rows.append([result["case"], goal["goal"], found, verdict if judged else f"({verdict})"])
    return rows


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times as long as ours each system takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{r['case']}: {name}", value / r["seconds"][best])
        for r, best in ((r, fastest_of_ours(r)) for r in results)
        for name, value in r["seconds"].items()
        if name != best
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
    from gpu_case import Size
    from gpu_cases import CASES as MAKERS

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
            *(
                SHAPES[options.shape],
                batch,
                options.source,
                options.target,
                options.beams,
                options.steps,
                dtype,
                device,
            ),
            options.compiler,
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
    header = ["case", "system", "ms", "over ours", "error", "peak MB", "of the limit", "rate"]
    print(table(header, [row for result in results for row in rows_of(result)]))
    print(NOTE)
    judged = GOAL_DEVICE in machine and all(getattr(options, name) == parse([]).__dict__[name] for name in SIZES)
    goals = [row for result in results for row in goal_rows(result, judged)]
    if goals:
        print(table(["case", "goal", "found", "verdict"], goals))
        if not judged:
            print(f"In brackets: the goals are for an {GOAL_DEVICE} and the sizes that are taken by default.")
    if options.json:
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": machine,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "judged": judged,
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
