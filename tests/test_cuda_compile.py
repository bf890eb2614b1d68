"""Every CUDA kernel compiles for sm_80 and sm_90a, and the compiler's report says that all fits into registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
TARGETS = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
KERNELS = {
    "attention_forward_kernel": 24,
    "attention_row_gradients_kernel": 36,
    "attention_column_gradients_kernel": 24,
    "relation_kl_forward_kernel": 10,
    "relation_kl_backward_kernel": 10,
    "decode_attention_kernel": 9,
    "store_source_kernel": 2,
    "lm_head_kernel": 6,
    "merge_slices_kernel": 2,
    "ban_ngrams_kernel": 1,
    "advance_beams_kernel": 1,
    "step_linear_kernel": 16,
    "step_norm_kernel": 2,
    "step_embedding_kernel": 2,
}
"""Each kernel and its number of instances."""

BLOCKS = {
    "attention_forward_kernel": (128, 2),
    "attention_row_gradients_kernel": (128, 2),
    "attention_column_gradients_kernel": (128, 2),
    "relation_kl_forward_kernel": (128, 2),
    "relation_kl_backward_kernel": (128, 2),
    "decode_attention_kernel": (128, 2),
    "store_source_kernel": (256, 4),
    "lm_head_kernel": (128, 3),
    "merge_slices_kernel": (128, 4),
    "ban_ngrams_kernel": (128, 4),
    "advance_beams_kernel": (128, 4),
    "step_linear_kernel": (256, 2),
    "step_norm_kernel": (128, 4),
    "step_embedding_kernel": (128, 4),
}
"""Threads of a block, and how many blocks are to fit on a multiprocessor at a time, as far as registers go."""

ROWS_OF_ATTENTION = ("attention_forward_kernel", "attention_row_gradients_kernel")

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What the compiler says of an instance of a kernel; bytes and registers of a thread."""

    kernel: str
    instance: str
    target: str
    registers: int
    stack: int
    spilled: int


def _compile(source: Path, target: str, folder: Path) -> str:
    assert NVCC is not None
    output = folder / f"{source.stem}.{target}.cubin"
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{ROOT / 'csrc' / 'include'}"]
    done = subprocess.run(
        [NVCC, *flags, f"-gencode={TARGETS[target]}", "-cubin", str(source), "-o", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{source.name} for {target}: {done.stderr}"
    return done.stderr


def _usages(report: str) -> list[Usage]:
    found = []
    for match in REPORT.finditer(report):
        kernel = next(kernel for kernel in KERNELS if kernel in match["name"])
        arguments = re.match(r"I(\w+?)E+v", match["name"].rsplit(kernel, 1)[1])
        instance = arguments[1] if arguments else ""
        spilled = int(match["stores"]) + int(match["loads"])
        found.append(Usage(kernel, instance, match["target"], int(match["registers"]), int(match["stack"]), spilled))
    return found


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    if NVCC is None:
        pytest.skip("there is no nvcc on this machine")
    folder = tmp_path_factory.mktemp("cuda")
    work = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        reports = pool.map(lambda pair: _compile(*pair, folder), work)
        return [usage for report in reports for usage in _usages(report)]


def test_every_instance_is_compiled(usages: list[Usage]) -> None:
    for target in TARGETS:
        found = [usage.kernel for usage in usages if usage.target == target]
        assert {kernel: found.count(kernel) for kernel in KERNELS} == KERNELS


def test_nothing_spills(usages: list[Usage]) -> None:
    assert [usage for usage in usages if usage.spilled or usage.stack] == []


def test_several_blocks_fit_on_a_multiprocessor(usages: list[Usage]) -> None:
    """Its 65536 registers are given out 8 at a time a thread."""
    for usage in usages:
        threads, blocks = BLOCKS[usage.kernel]
        if usage.kernel == "decode_attention_kernel" and usage.instance.endswith(("halfLi32", "bfloat16Li32")):
            blocks = 4
        elif usage.kernel in ROWS_OF_ATTENTION and re.search(r"Li32ELb[01]ELb0", usage.instance):
            blocks = 3
        elif usage.kernel.startswith("relation_kl") and not usage.instance.endswith(("Li64ELi64", "Li128ELi128")):
            blocks = 4 if usage.instance.endswith("Li16ELi16") else 3
        assert -(-usage.registers // 8) * 8 * threads * blocks <= 65536, usage


def test_operators_compile_against_pytorch() -> None:
    """Without an object: a build of PyTorch without CUDA has its headers (but for one) and not its libraries."""
    if NVCC is None:
        pytest.skip("there is no nvcc on this machine")
    emulation = ROOT / "tests" / "cuda_emulation"
    includes = (f"-I{ROOT / 'csrc' / 'include'}", f"-I{emulation / 'headers'}")
    host = ("-Xcompiler", f"-isystem,{Path(torch.__file__).parent / 'include'},-fsyntax-only")
    command = [NVCC, "-std=c++17", *includes, *host, "-c", str(emulation / "operators.cpp"), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_report_of_a_kernel_that_spills() -> None:
    """The reading of the report, on one that has what the kernels must not have."""
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4cuda16lm_head_kernelI6__halfLi8EEEvNS0_6LmHeadE' for 'sm_90a'
ptxas info    : Function properties for _ZN4cuda16lm_head_kernelI6__halfLi8EEEvNS0_6LmHeadE
    64 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
    assert _usages(report) == [Usage("lm_head_kernel", "6__halfLi8", "sm_90a", 255, 64, 28)]
