"""Every Triton kernel compiles for sm_80 and sm_90 as it would be launched, and keeps to its registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = {
    *("_gelu_forward", "_gelu_backward", "_norm_forward", "_norm_backward"),
    *("_attention_forward", "attention_delta", "attention_backward_rows", "attention_backward_columns"),
    *("_loss_rows", "_loss_gradient"),
    *("_relation_kl_forward", "_relation_kl_backward_rows", "_relation_kl_backward_columns"),
}
# What a block may have, bytes (CUDA programming guide, technical specifications of the compute capabilities).
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).parent / "triton_aot.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    for arch in MOST_SHARED:
        assert {line["kernel"] for line in compiled if line["arch"] == arch} == KERNELS


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [line for line in compiled if line["stack"] or line["local"]] == []


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    assert [line for line in compiled if line["shared"] > MOST_SHARED[line["arch"]]] == []


def test_registers_fit(compiled: list[dict[str, Any]]) -> None:
    """A block's threads share 65536 registers."""
    assert [line for line in compiled if line["registers"] * 32 * line["warps"] > 65536] == []


def test_a_share_of_the_exponentials_is_polynomials(compiled: list[dict[str, Any]]) -> None:
    """One in 4 of those of a thread's tiles, and no number moves between threads for it."""
    whole = {(line["arch"], line["case"], line["kernel"]): line for line in compiled}
    compared = set()
    for line in compiled:
        case, _, share = line["case"].partition(", one in ")
        if share:
            other = whole[line["arch"], case, line["kernel"]]
            assert line["stores"] == other["stores"], line
            # What stays are those of a row: the correction of its sums, and what a pseudo row sees of itself.
            in_tiles = other["exponentials"] // 64 * 64
            assert other["exponentials"] - line["exponentials"] == in_tiles // 4, line
            compared.add((line["arch"], line["kernel"]))
    kernels = {
        *("_attention_forward", "attention_backward_rows", "attention_backward_columns"),
        *("_relation_kl_forward", "_relation_kl_backward_rows", "_relation_kl_backward_columns"),
    }
    # On sm_80 the rows of relation_kl's backward take none.
    assert compared == {(arch, kernel) for arch in (80, 90) for kernel in kernels} - {
        (80, "_relation_kl_backward_rows")
    }
