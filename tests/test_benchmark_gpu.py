"""The GPU benchmark and its script, as far as they run without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm_fast.errors import UserError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--device", "cpu", "--shape", "tiny", "--batch", "4", "--source", "12", "--target", "4", "--beams", "2"]
# Inductor's compiler would take minutes.
TINY += ["--steps", "3", "--rounds", "1", "--dtype", "fp32", "--compiler", "aot_eager"]
sys.path.insert(0, str(BENCHMARKS))
_ATTENTION = ("eager", "SDPA, dense mask", "SDPA calls composed")
_ORIGINAL = "the original's algorithm"
EVERYTHING = {
    "attention": (*_ATTENTION, "FlexAttention, compiled", _ORIGINAL),
    "attention, forward and backward": (*_ATTENTION, _ORIGINAL),
    "attention with dropout and bias, forward and backward": (),
    "relation_kl, three relations": ("eager, vectorised", "torch.compile", "a loop over samples"),
    "decode_attention, 2 layers, batch 2": ("SDPA, history gathered before",),
    "decode_attention, 2 layers, batch 1": ("SDPA, history gathered before",),
    "layers of a step, 8 rows": ("cuBLAS and Triton",),
    "layers of a step, 4 rows": ("cuBLAS and Triton",),
    "lm_head_topk": ("product, log-softmax, top-k",),
    "advance_beams": ("one PyTorch operator after the other",),
    "decoding, batch 2": (_ORIGINAL, "Hugging Face, static cache", "Hugging Face, growing cache"),
    "decoding, batch 1": (_ORIGINAL, "Hugging Face, static cache", "Hugging Face, growing cache"),
    "training step": ("torch.compile and SDPA", "SDPA", _ORIGINAL),
}
"""The cases with the peers that run on a CPU."""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_case_runs_on_a_cpu(tmp_path: Path) -> None:
    """Its systems agree with fp64, or the script would end."""
    record = tmp_path / "gpu.json"
    done = _run(*TINY, "--json", str(record))
    assert done.returncode == 0, done.stderr
    results = {r["case"]: r for r in json.loads(record.read_text())["results"]}
    assert {name: tuple(r["seconds"]) for name, r in results.items()} == {
        name: ("ours", *peers) for name, peers in EVERYTHING.items()
    }
    for name, result in results.items():
        assert all(value > 0 for value in result["seconds"].values())
        compared = [peer for peer in result["seconds"] if "Hugging Face" not in peer]
        assert all(result["errors"][peer] < 1e-4 for peer in compared), name
    assert "FlexAttention, compiled was not run" in done.stdout
    assert "(missed)" in done.stdout and "the goals are for an H200" in done.stdout


def _result(**changes: object) -> dict[str, Any]:
    result = {
        "case": "it",
        "seconds": {"ours": 0.004, "ours, another": 0.002, "them": 0.006},
        "peak_bytes": {"ours": 1, "ours, another": 5_000_000, "them": 9},
        "limit_seconds": 0.001,
        "units": 4.0,
    }
    return result | changes


@pytest.mark.parametrize(
    ("kind", "bound", "found", "met"),
    [
        ("ms", 0.6, 0.5, True),
        ("ms", 0.4, 0.5, False),
        ("a second", 1900, 2000, True),
        ("a second", 2100, 2000, False),
        ("of the limit", 0.5, 0.5, True),
        ("of the limit", 0.6, 0.5, False),
        ("times", 3, 3, True),
        ("times", 3.1, 3, False),
        ("peak MB", 5, 5, True),
        ("peak MB", 4, 5, False),
    ],
)
def test_goals_are_judged_by_the_fastest_of_ours(kind: str, bound: float, found: float, met: bool) -> None:
    from gpu import goal_rows, judge
    from gpu_case import Goal

    goal = Goal(kind, bound, "them" if kind == "times" else "")
    judged = judge(goal, _result())
    assert judged == {"found": pytest.approx(found), "met": met}
    (row,) = goal_rows(_result(goals=[{"goal": str(goal), **judged}]), judged=True)
    assert row[-1] == ("met" if met else "missed")


def test_goals_that_could_not_be_measured_stay_open() -> None:
    from gpu import judge
    from gpu_case import Goal

    assert judge(Goal("times", 2, "nobody"), _result())["met"] is None
    assert judge(Goal("peak MB", 2), _result(peak_bytes={"ours, another": None}))["met"] is None


def test_wrong_results_end_the_run() -> None:
    from gpu import usable_systems
    from gpu_case import Case, System

    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    systems = {"ours": System(lambda: lambda: right), "them": System(lambda: lambda: wrong)}
    with pytest.raises(UserError, match=r"them is wrong by 0\.058"):
        usable_systems(Case("it", systems, exact=lambda: [right]), 1e-3)
    usable, errors, _ = usable_systems(Case("it", systems, exact=lambda: [right], different=frozenset({"them"})), 1e-3)
    assert set(usable) == {"ours", "them"} and errors == {"ours": 0.0}


def test_peers_that_cannot_run_are_left_out() -> None:
    from gpu import usable_systems
    from gpu_case import Case, System

    def fail() -> torch.Tensor:
        raise NotImplementedError("no kernel\nfor this")

    systems = {"ours": System(lambda: lambda: torch.ones(1)), "them": System(lambda: fail)}
    assert usable_systems(Case("it", systems), 1e-3)[2] == {"them": "no kernel"}
    with pytest.raises(NotImplementedError):
        usable_systems(Case("it", {"ours": System(lambda: fail)}), 1e-3)


def test_unknown_case() -> None:
    done = _run("--cases", "everything")
    assert done.returncode != 0 and "everything" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--out", str(tmp_path / "out"), "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "finds no GPU: nothing was run" in done.stderr


def test_the_script_refuses_unknown_sections(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--out", str(tmp_path), "--sections", "build,all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no section all" in done.stderr


def test_shares_of_polynomials_end_with_the_run() -> None:
    pytest.importorskip("triton")
    from gpu_cases import with_share

    from minilm_fast.ops import _triton

    shares = _triton.kernels("exponential").ONE_IN
    before = dict(shares)
    found = with_share(8, lambda: dict(shares))()
    assert found[("attention", 32)] == found[("relation_kl_backward", 64)] == 8
    assert shares == before
