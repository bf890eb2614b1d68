"""Several processes that train one model, on one machine over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_files import NO_DROPOUT, RUN, arguments, copy_model, write_examples

from minilm_fast import checkpoint
from minilm_fast.errors import UserError
from minilm_fast.run_seq2seq import main
from minilm_fast.training import checkpointing
from minilm_fast.training.distributed import World

PREAMBLE = (
    "import json, os, sys, torch\nfrom minilm_fast.run_seq2seq import main\nfrom minilm_fast.training import seq2seq\n"
)
SEVERAL_RUNS = """
for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    assert main(words) == 0
"""
ONE_RUN = "sys.exit(main(json.loads(sys.argv[1])))"
ACROSS = {"average_tokens_across_batches": True, "per_gpu_train_batch_size": 2}


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _group(size: int, script: str, argument: object) -> list[subprocess.Popen[str]]:
    """Starts processes as a launcher does, but does not end them together."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(argument)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | address | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def _finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    outcomes = []
    for process in processes:
        _, err = process.communicate(timeout=timeout)
        outcomes.append((process.returncode, err))
    return outcomes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model without dropout and data."""
    folder = tmp_path_factory.mktemp("distributed")
    copy_model(folder / "model", **NO_DROPOUT)
    write_examples(folder / "train.jsonl")
    return folder


def _words(place: Path, out: str, **flags: object) -> list[str]:
    dev = {"dev_file": place / "train.jsonl"}
    return arguments(place, place / "model", **(RUN | dev | {"output_dir": place / out} | flags))


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """Runs of two processes: ``two-mean`` under torchrun, ``two-across`` and ``two-bf16`` started by hand."""
    (place / "one.py").write_text(PREAMBLE + ONE_RUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, str(place / "one.py"), json.dumps(_words(place, "two-mean", per_gpu_train_batch_size=2))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved ") == 2
    runs = [
        (_free_port(), _words(place, "two-across", **ACROSS, gradient_accumulation_steps=2)),
        (_free_port(), _words(place, "two-bf16", per_gpu_train_batch_size=2, bf16=True, num_training_steps=3)),
    ]
    for status, err in _finish(_group(2, PREAMBLE + SEVERAL_RUNS, runs)):
        assert status == 0, err
    return place


def _assert_close(first: Path, second: Path, tolerance: float = 2e-6) -> None:
    one, other = (checkpoint.load(folder).state for folder in (first, second))
    for name, tensor in one.items():
        # The gradient of a key's bias is zero but for rounding, which Adam makes large.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


def test_two_processes_equal_accumulation(two: Path) -> None:
    assert main(_words(two, "one-mean", per_gpu_train_batch_size=2, gradient_accumulation_steps=2)) == 0
    _assert_close(two / "two-mean" / "ckpt-6", two / "one-mean" / "ckpt-6")
    first, second = (json.loads((two / name / "history.json").read_text()) for name in ("two-mean", "one-mean"))
    for record, other in zip(first["records"], second["records"], strict=True):
        assert record == pytest.approx(other, rel=1e-5)


def test_two_processes_equal_one_large_batch(two: Path) -> None:
    large = ACROSS | {"per_gpu_train_batch_size": 8}
    assert main(_words(two, "one-across", **large)) == 0
    _assert_close(two / "two-across" / "ckpt-6", two / "one-across" / "ckpt-6", tolerance=1e-4)


def test_another_number_of_processes_goes_on(two: Path) -> None:
    """Two processes up to step 3, then one with the same global batch."""
    folder = two / "two-across" / "ckpt-6"
    folder.rename(two / "kept")
    assert main(_words(two, "two-across", **ACROSS, gradient_accumulation_steps=4)) == 0
    _assert_close(two / "kept", folder, tolerance=1e-4)


def test_bf16(two: Path) -> None:
    state = checkpoint.load(two / "two-bf16" / "ckpt-3").state
    start = checkpoint.load(two / "model").state
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert not torch.equal(state["cls.predictions.bias"], start["cls.predictions.bias"])


# Step 4 happens in the second process only.
AT_STEP_4 = (
    PREAMBLE
    + """
whole = seq2seq.Seq2SeqTask.step_data
def step_data(task, step):
    if step == 3 and os.environ["RANK"] == "1":
        act()
    return whole(task, step)
seq2seq.Seq2SeqTask.step_data = step_data
"""
)


@pytest.mark.parametrize(
    ("act", "status", "message"),
    [
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, None),
        ("raise seq2seq.UserError('a broken batch')", 2, "process 1: a broken batch"),
    ],
    ids=["killed", "error"],
)
def test_a_process_that_fails_ends_all(act: str, status: int, message: str | None, place: Path) -> None:
    out = f"fail-{abs(status)}"
    script = AT_STEP_4 + f"def act():\n    {act}\n" + ONE_RUN
    (main_status, main_err), (other_status, other_err) = _finish(_group(2, script, _words(place, out)))
    assert other_status == status
    assert message is None or message in other_err
    assert main_status == 2
    assert "error: another process has ended early" in main_err and "goes on after step 3" in main_err
    assert checkpointing.latest_step(place / out) == 3


def test_an_error_while_saving_ends_all(place: Path) -> None:
    script = PREAMBLE + (
        "from minilm_fast.training import checkpointing\n"
        "def full(*a): raise OSError(28, 'No space left on device')\n"
        "assert callable(checkpointing.write_archive)\n"
        "checkpointing.write_archive = full\n"
    )
    outcomes = _finish(_group(2, script + ONE_RUN, _words(place, "full")))
    assert [status for status, _ in outcomes] == [2, 2]
    assert all("No space left on device" in err and "Traceback" not in err for _, err in outcomes)


def test_a_signal_to_one_process_saves_in_all(place: Path) -> None:
    script = AT_STEP_4 + "def act():\n    os.kill(os.getpid(), 15)\n" + ONE_RUN
    start = time.perf_counter()
    outcomes = _finish(_group(2, script, _words(place, "signal", num_training_steps=100_000)))
    assert [status for status, _ in outcomes] == [143, 143]
    assert checkpointing.latest_step(place / "signal") == 4
    assert "goes on after step 4" in outcomes[0][1]
    assert time.perf_counter() - start < 100


def test_alone() -> None:
    world = World({})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather(3) == [3] and world.on_main(lambda: 4) == 4
    assert world.sum(torch.tensor(5.0)).item() == 5
    module = torch.nn.Linear(2, 2)
    assert world.distribute(module) is module


def test_only_connections_become_errors_of_the_user() -> None:
    with pytest.raises(RuntimeError, match="gloo"), World({}).watching():
        raise RuntimeError("gloo: not of interest to a single process")
    world = World({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(UserError, match="another process has ended early"), world.watching():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nstack")
    with pytest.raises(RuntimeError, match="shape"), world.watching():
        raise RuntimeError("shape mismatch")
