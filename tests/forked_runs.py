"""Runs of the training program in forked children, which need no imports: to kill many of them in little time.

    python forked_runs.py ARGUMENTS_FILE KILLS SEED

starts the run of the arguments (a JSON list) again and again, in the output folder that they name. ``KILLS`` children
are killed at random instants; then one is left alone. A run that ends before it is killed must have the right weights,
and is begun anew in an empty folder. Prints what happened as one JSON object. Every child has one thread: a forked
process cannot use the threads of its parent.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401 - imported here, before the fork, as are the next two
import torch
import torch._dynamo
import torch.utils.tensorboard

from minilm_fast.run_seq2seq import main
from minilm_fast.training import loop, seq2seq  # noqa: F401


def fork(arguments: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Start a child that runs the program; its process id. ``before`` runs in it first."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        if "FORKED_RUNS_LOG" not in os.environ:
            os.dup2(silence, 2)
        before()
        status = main(arguments)
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, delay: float) -> int:
    """Exit status of a child that is killed after ``delay`` seconds unless it has ended by then."""
    until = time.perf_counter() + delay
    while time.perf_counter() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def weights(folder: Path) -> dict[int, bytes]:
    """The weights of each checkpoint in an output folder."""
    return {int(f.parent.name[5:]): f.read_bytes() for f in folder.glob("ckpt-*/model.safetensors")}


def outcome(folder: Path) -> tuple[dict[int, bytes], bytes]:
    """The weights of each checkpoint, and the history."""
    return weights(folder), (folder / "history.json").read_bytes()


def difference(found: tuple[dict[int, bytes], bytes], expected: tuple[dict[int, bytes], bytes]) -> str:
    """What differs between the outcomes of two runs, in words."""
    (weights_1, history_1), (weights_2, history_2) = found, expected
    if sorted(weights_1) != sorted(weights_2):
        return f"checkpoints {sorted(weights_1)}, not {sorted(weights_2)}"
    if changed := [number for number in sorted(weights_1) if weights_1[number] != weights_2[number]]:
        return f"the weights of the checkpoints {changed}"
    return f"history {history_1.decode()}, not {history_2.decode()}"


def random_kills(arguments: list[str], kills: int, seed: int) -> dict[str, object]:
    """See the module."""
    output = Path(arguments[arguments.index("--output_dir") + 1])
    start = time.perf_counter()
    if wait(fork(arguments)) != 0:
        raise SystemExit("the undisturbed run failed")
    duration = time.perf_counter() - start
    expected = outcome(output)
    shutil.rmtree(output)
    rng = random.Random(seed)
    killed, finished, in_saving = 0, 0, 0
    steps: list[int] = []
    while True:
        child = fork(arguments)
        status = wait(child) if killed == kills else kill_after(child, rng.uniform(0, 0.7 * duration))
        if status == 0:
            finished += 1
            if (found := outcome(output)) != expected:
                raise SystemExit(f"after {killed} kills the run ended otherwise: {difference(found, expected)}")
            if killed == kills:
                break
            shutil.rmtree(output)
        elif status == -signal.SIGKILL:
            killed += 1
            in_saving += any(output.glob(".*.tmp"))
            steps.append(max(weights(output), default=0))
        else:
            raise SystemExit(f"after {killed} kills a run ended with status {status}")
    return {"killed": killed, "finished": finished, "in_saving": in_saving, "steps": steps, "seconds": duration}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = random_kills(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found))
