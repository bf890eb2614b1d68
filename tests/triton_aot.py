"""Compiles the Triton kernels for GPUs that are not there, as the operators would launch them; prints what they use.

The host functions run as they are, on small tensors of the CPU; only the launch itself is replaced by a compilation.
So every specialisation, block size and number of warps is one that a GPU would get. Run as a program, without
``TRITON_INTERPRET``: ``python tests/triton_aot.py [--arch 80 90] [--only NAME] [--everything]``. Prints JSON lines::

    {"case", "kernel", "arch", "registers", "stack", "local", "shared", "warps", "exponentials", "stores"}

``exponentials`` and ``stores`` are instructions of the program: exponentials, and stores to shared memory. ``stack``
and ``local`` are bytes of local memory for each thread: spilled registers and arrays with variable indices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from minilm_fast.ops import _triton

SEED = torch.tensor([12345])
ROWS = 1024


class Driver:
    """What Triton asks of a driver before it compiles; a device is its compute capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, local and static shared memory of the kernel in a cubin."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise SystemExit("error: no cuobjdump, neither Triton's own nor on the PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(numbers["REG"]), "stack": int(numbers["STACK"]), "local": int(numbers["LOCAL"])}


def norm_cases(everything: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    module = _triton.kernels("norm")
    for channels, dtype in ((384, torch.bfloat16), (1024, torch.float32), (8192, torch.float16))[
        : 3 if everything else 2
    ]:
        x, row = torch.zeros(ROWS, channels, dtype=dtype), torch.zeros(ROWS)
        vector, name = torch.zeros(channels), f"{channels} {dtype}"
        yield f"gelu {name}", lambda x=x, v=vector: module.bias_gelu(x, v)
        yield f"gelu backward {name}", lambda x=x, v=vector: module.bias_gelu_backward(x, x, v)
        for p in (0.0, 0.1):
            yield (
                f"norm {name} dropout {p}",
                lambda x=x, v=vector, p=p: module.dropout_add_layer_norm(x, x, v, v, 1e-5, p, SEED, v),
            )
            yield (
                f"norm backward {name} dropout {p}",
                lambda x=x, v=vector, r=row, p=p: module.dropout_add_layer_norm_backward(x, x, x, v, r, r, p, SEED, v),
            )


def attention_cases(everything: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    module = _triton.kernels("attention")
    cu = torch.tensor([0, ROWS], dtype=torch.int32)
    segments = torch.tensor([[ROWS - 64, 32, 32]], dtype=torch.int32)
    positions = torch.arange(ROWS, dtype=torch.int32)
    # Dropout and relative bias each compile the kernels anew.
    some = {
        (32, torch.bfloat16): ("plain", "dropout", "bias"),
        (64, torch.float16): ("dropout",),
        (128, torch.bfloat16): ("plain",),
        (32, torch.float32): ("dropout",),
    }
    for size, dtype in itertools.product((32, 64, 128), (torch.bfloat16, torch.float16, torch.float32)):
        for kind in ("plain", "dropout", "bias") if everything else some.get((size, dtype), ()):
            projection = torch.zeros(ROWS, 3, 12, size, dtype=dtype)
            lse = torch.zeros(12, ROWS)
            bias = torch.zeros(12, 257) if kind == "bias" else None
            dropout = 0.0 if kind == "plain" else 0.1
            options = (cu, segments, None, ROWS, size**-0.5, bias, None if bias is None else positions, dropout, SEED)

            def forward(x: torch.Tensor = projection, options: Any = options) -> None:
                module.projected_attention(x, None, *options)

            def backward(x: torch.Tensor = projection, lse: torch.Tensor = lse, options: Any = options) -> None:
                y = x[:, 0].contiguous()
                module.projected_attention_backward(y, x, None, y, lse, *options, options[5] is not None)

            yield f"attention {size} {dtype} {kind}", forward
            yield f"attention backward {size} {dtype} {kind}", backward


def loss_cases(everything: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    module = _triton.kernels("loss")
    for dtype, smoothing in ((torch.bfloat16, 0.1), (torch.float32, 0.0)):
        hidden, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(4097, 8, dtype=dtype)
        row, operands = torch.zeros(4), (hidden, weight, torch.zeros(4097), torch.zeros(4, dtype=torch.int64))
        yield f"loss {dtype}", lambda o=operands, s=smoothing: module.label_smoothed_cross_entropy(*o, s)
        yield (
            f"loss backward {dtype}",
            lambda o=operands, s=smoothing, r=row: module.label_smoothed_cross_entropy_backward(
                r, *o, r, s, True, True, True
            ),
        )


def relation_cases(everything: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    module = _triton.kernels("relation_kl")
    cu, segments = torch.tensor([0, ROWS], dtype=torch.int32), torch.tensor([[ROWS, 0, 0]], dtype=torch.int32)
    some = [(64, 32, torch.bfloat16), (128, 8, torch.float16), (32, 32, torch.float32)]
    more = [(t, s, d) for t in (8, 32, 64, 128) for s in (8, 32, 64, 128) for d in (torch.bfloat16, torch.float32)]
    for teacher, student, dtype in more if everything else some:
        a, b = (torch.zeros(ROWS, 12, size, dtype=dtype) for size in (teacher, student))
        options = (cu, segments, ROWS, teacher**-0.5, student**-0.5, "batch_mean")
        lse, grad = torch.zeros(12, ROWS, dtype=torch.float64), torch.zeros(())
        yield f"relation {teacher} {student} {dtype}", lambda a=a, b=b, o=options: module.relation_kl(a, a, b, None, *o)
        for other in (None, b):
            yield (
                f"relation backward {teacher} {student} {dtype}",
                lambda a=a, b=b, c=other, o=options, n=lse, g=grad: module.relation_kl_backward(
                    g, a, a, b, c, n, n, *o
                ),
            )


def polynomial_cases(everything: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Cases of head size 32 with one exponential in 4, or in 8, by a polynomial."""
    module = _triton.kernels("exponential")

    def shared(call: Callable[[], Any], share: int) -> None:
        module.ONE_IN.update({(operator, size): share for operator in module.OPERATORS for size in module.SIZES})
        try:
            call()
        finally:
            module.ONE_IN.clear()

    for name, call in dict((*attention_cases(False), *relation_cases(False))).items():
        if name.endswith(("32 torch.bfloat16 plain", "64 32 torch.bfloat16")):
            for share in (4, 8) if everything else (4,):
                yield f"{name}, one in {share}", lambda call=call, share=share: shared(call, share)


CASES = (norm_cases, attention_cases, loss_cases, relation_cases, polynomial_cases)


def compile_all(archs: list[int], only: str, everything: bool) -> Iterator[dict[str, Any]]:
    """Every kernel once for each case and architecture."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    seen = set()
    for arch in archs:
        driver.set_active(Driver(arch))
        for case, call in (pair for cases in CASES for pair in cases(everything)):
            if only not in case:
                continue
            compiled.clear()
            call()
            for kernel, binary in compiled:
                if binary.hash in seen:
                    continue
                seen.add(binary.hash)
                numbers = usage(binary.asm["cubin"])
                metadata, program = binary.metadata, binary.asm["ptx"]
                yield (
                    {"case": case, "kernel": kernel, "arch": arch}
                    | numbers
                    | {
                        "shared": metadata.shared,
                        "warps": metadata.num_warps,
                        "exponentials": program.count("ex2.approx"),
                        "stores": program.count("st.shared"),
                    }
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--everything", action="store_true", help="all types and sizes, not only a choice of them")
    arguments = parser.parse_args()
    for line in compile_all(arguments.arch, arguments.only, arguments.everything):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
