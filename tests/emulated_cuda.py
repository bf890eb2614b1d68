"""The CUDA C++ operators on a CPU: their very sources, compiled with a model of CUDA (``cuda_emulation/``).

``load()`` gives the operators as ``torch.ops.minilm_fast_emulated``, with the schemas of ``minilm_fast``. What they
show is that a kernel computes what it should; a GPU has never run it for that.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import minilm_fast.ops  # noqa: F401 (defines the schemas)

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
OPERATORS = (
    *("attention", "attention_backward", "projected_attention", "projected_attention_backward"),
    *("relation_kl", "relation_kl_backward"),
    *("decode_attention", "store_source", "lm_head_topk", "ban_repeated_ngrams", "advance_beams"),
    *("step_linear", "step_norm", "step_embedding", "decode_attention_early"),
)
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DMINILM_FAST_EMULATE_CUDA"),
    # A checked longjmp takes a change of stacks for an error.
    *("-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    *(f"-I{EMULATION}", f"-I{ROOT / 'csrc' / 'include'}"),
)


def _sources() -> list[Path]:
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATION / "emulation.cpp", EMULATION / "operators.cpp"]


def _digest() -> str:
    """Names a build: everything that goes into it."""
    include = ROOT / "csrc" / "include"
    files = [*(ROOT / "csrc" / "cuda").iterdir(), *EMULATION.iterdir(), include / "checks.h", include / "projection.h"]
    files += [*include.glob("*.cuh"), *include.glob("*cuda*.h")]
    digest = hashlib.sha256(f"{torch.__version__} {COMPILER} {FLAGS} {os.getuid()}".encode())
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    includes = [
        f"-isystem{torch_folder / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        objects, running = [], []
        # The one with PyTorch's headers takes longest.
        for source in reversed(_sources()):
            objects.append(f"{folder}/{source.stem}.o")
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            command = [COMPILER, *FLAGS, *includes, *language, "-c", str(source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for process in running:
            text, _ = process.communicate()
            assert process.returncode == 0 and "warning" not in text, text
        link = [COMPILER, "-shared", *objects, "-o", f"{folder}/library.so", f"-L{torch_folder / 'lib'}"]
        subprocess.run([*link, "-ltorch_cpu", "-lc10"], check=True)
        shutil.copy(f"{folder}/library.so", f"{library}.new")
        os.replace(f"{library}.new", library)


@cache
def load() -> Any:
    """Builds the emulated operators unless the same sources were built before, and loads them."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    folder = Path(tempfile.gettempdir())
    name = f"minilm_fast-emulated-{_digest()}"
    library = folder / f"{name}.so"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    fragment = torch.library.Library("minilm_fast_emulated", "DEF")
    for operator in OPERATORS:
        schema = getattr(torch.ops.minilm_fast, operator).default._schema
        fragment.define(str(schema).removeprefix("minilm_fast::"))
    torch.ops.load_library(str(library))
    return torch.ops.minilm_fast_emulated, ctypes.CDLL(str(library)), fragment


def operators() -> Any:
    return load()[0]


@contextmanager
def schedule(*, backwards: bool = False, far: bool = False, early: bool = False) -> Iterator[None]:
    """What a GPU leaves open, otherwise than by default, so that races change results.

    Args:
        backwards: threads and blocks run from the last to the first in the block.
        far: a warp runs to where it waits for another before the next one does anything.
        early: asynchronous copies are carried out where they start, not where they are waited for.
    """
    library = load()[1]
    library.emulation_set_schedule(backwards, far, early)
    try:
        yield
    finally:
        library.emulation_set_schedule(False, False, False)


def running_backwards() -> AbstractContextManager[None]:
    """Everything otherwise than by default."""
    return schedule(backwards=True, far=True, early=True)


@contextmanager
def kernel_before(function: Callable[[], None]) -> Iterator[None]:
    """The kernel before one that is launched early does ``function``, as late as that one waits for it."""
    called = []

    def run() -> None:
        called.append(True)
        function()

    callback = ctypes.CFUNCTYPE(None)(run)
    library = load()[1]
    library.emulation_set_kernel_before(callback)
    try:
        yield
    finally:
        library.emulation_set_kernel_before(None)
    assert called == [True], "no kernel was launched early"


def written_late(tensors: dict[str, torch.Tensor | None]) -> tuple[dict[str, torch.Tensor | None], Callable[[], None]]:
    """Tensors full of NaN in the place of these, and what fills them in, for :func:`kernel_before`."""
    empty = {name: None if x is None else torch.full_like(x, float("nan")) for name, x in tensors.items()}

    def fill() -> None:
        for name, x in tensors.items():
            if x is not None:
                empty[name].copy_(x)

    return empty, fill


@contextmanager
def poisoned_results() -> Iterator[None]:
    """Fresh tensors are full of NaN, or of the largest integer, instead of uninitialised."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
