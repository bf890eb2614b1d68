"""Without a GPU, Triton interprets its kernels; it reads the variable when it is imported, which any test may do."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import threads
from training_files import copy_model, write_examples

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a whole module, its own fixtures included: the bits of a sum depend on the number of threads."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and data to train it."""
    folder = tmp_path_factory.mktemp("training")
    copy_model(folder / "model")
    write_examples(folder / "train.jsonl")
    return folder


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Without a GPU, tests that are marked as running on one get the simulated one; the others None."""
    if request.node.get_closest_marker("gpu") is None or torch.cuda.is_available():
        yield None
        return
    from simulated_gpu import simulated_gpu

    with simulated_gpu() as gpu:
        yield gpu
