"""Memory that does not suffice: one clear error, and what comes after it works."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pooled_search import SPECIAL, in_pool, random_sources, small_model
from training_files import RUN, arguments, copy_model

from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.search import BeamSearch
from minilm_fast.errors import NotEnoughMemory, enough_memory
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.run_seq2seq import build_parser, make_trainer
from minilm_fast.training.distributed import World

EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def _failing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, of which one call finds no memory."""
    count = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise torch.OutOfMemoryError(str(EXHAUSTED))
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("error", [MemoryError(), EXHAUSTED, RuntimeError("CUDA error: out of memory")])
def test_one_error_names_the_flag(error: BaseException) -> None:
    with pytest.raises(NotEnoughMemory, match=r"^not enough memory; less of --this$"), enough_memory("less of --this"):
        raise error


def test_the_error_of_a_capture_that_memory_broke() -> None:
    """A CUDA graph's capture ends with an error of its own after an allocation in it failed."""
    with pytest.raises(NotEnoughMemory), enough_memory("less"):
        try:
            raise EXHAUSTED
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a bug"), enough_memory("less"):
        raise RuntimeError("a bug")


def test_tensors_of_the_frames_that_failed_are_let_go() -> None:
    large: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        tensor = torch.zeros(3)
        large.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(str(EXHAUSTED))

    with pytest.raises(NotEnoughMemory) as caught, enough_memory("less"):
        fail()
    assert caught.value.__suppress_context__ and large[0]() is None


@pytest.mark.parametrize("what", ["new_cache", "prefill", "step", "predict"])
def test_a_search_can_be_used_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = InferenceEngine(*small_model())
    search = BeamSearch(engine, SearchOptions(batch_size=4, beam_size=2, max_tgt_length=12), SPECIAL)
    sources = random_sources()
    expected = dict(search.run(sources))
    with monkeypatch.context() as patch:
        patch.setattr(engine, what, _failing(getattr(engine, what), 1 if what == "new_cache" else 2))
        with pytest.raises(NotEnoughMemory, match="--batch_size or --beam_size"):
            dict(search.run(sources))
    assert dict(search.run(sources)) == expected
    assert in_pool(search, sources, 4) == expected


def test_a_training_step_changes_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_model(tmp_path / "model")
    flags = RUN | {"gradient_accumulation_steps": 2}
    trainer = make_trainer(
        build_parser().parse_args(arguments(tmp_path, model, **flags)), World(local_rank=-1, cuda=False)
    )
    trainer.task.module.train()
    before = {name: x.clone() for name, x in trainer.task.module.state_dict().items()}
    forward = trainer.task.module.forward
    # The first micro-batch has left its gradients when the second one fails.
    monkeypatch.setattr(trainer.task.module, "forward", _failing(forward, 2))
    with pytest.raises(NotEnoughMemory, match=r"--per_gpu_train_batch_size needs less, with more --gradient_acc"):
        trainer.train_step()
    assert trainer.step == 0
    assert all(parameter.grad is None for parameter in trainer.task.module.parameters())
    assert all(torch.equal(x, before[name]) for name, x in trainer.task.module.state_dict().items())
    assert trainer.train_step().losses and trainer.step == 1
