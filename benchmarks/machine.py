"""The machine a benchmark runs on: what it is, what it can do, and who else is using it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")
PEAK_SIZES = (1024, 2048)
PEAK_REPEATS = 5


def describe() -> dict[str, Any]:
    """Name, usable cores and vector extensions of the CPU, memory in bytes, operating system."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "extensions": [flag for flag in INTERESTING_FLAGS if flag in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    ``VmHWM`` where Linux gives it: unlike ``ru_maxrss`` it does not start with the size of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def busy_seconds() -> float:
    """CPU-seconds that the whole machine has been busy for, all cores summed."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def measure_peak(threads: int) -> dict[str, dict[str, float]]:
    """Operations per second of large square products in torch, the best of a few sizes and repeats.

    Returns:
        For ``fp32``, ``bf16`` and ``int8`` (int32 sums): ``wall``, operations per second on the clock with
        ``threads`` threads, and ``cpu``, operations per CPU-second.
    """
    import torch

    torch.set_num_threads(threads)
    best: dict[str, dict[str, float]] = {name: {"wall": 0.0, "cpu": 0.0} for name in ("fp32", "bf16", "int8")}
    for size in PEAK_SIZES:
        a, b = torch.randn(size, size), torch.randn(size, size)
        for name, product in _products(a, b).items():
            product()
            for _ in range(PEAK_REPEATS):
                wall, cpu = time.perf_counter(), time.process_time()
                product()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                best[name]["wall"] = max(best[name]["wall"], 2 * size**3 / wall)
                best[name]["cpu"] = max(best[name]["cpu"], 2 * size**3 / cpu)
    return best


def _products(a: Any, b: Any) -> dict[str, Callable[[], Any]]:
    import torch

    a16, b16 = a.bfloat16(), b.bfloat16()
    a8, b8 = (a * 30).clamp(-127, 127).to(torch.int8), (b * 30).clamp(-127, 127).to(torch.int8)
    return {"fp32": lambda: a @ b, "bf16": lambda: a16 @ b16, "int8": lambda: torch._int_mm(a8, b8)}
