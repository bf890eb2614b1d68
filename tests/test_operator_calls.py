"""``opcheck`` of every operator with a kernel for GPUs on a CPU; test_cuda_device.py has it on a GPU."""

from __future__ import annotations

from operator_calls import check_calls, decoding_calls, training_calls

from minilm_fast.ops import _cuda, _triton


def test_every_operator_is_called() -> None:
    assert {name for name, _ in decoding_calls("cpu")} == _cuda.KERNELS - _cuda.DIFFERENTIABLE
    names = {name for name, _ in training_calls("", "cpu")}
    assert names == {name + suffix for name in _triton.OPERATORS for suffix in ("", "_backward")}


def test_operators_of_decoding() -> None:
    check_calls(decoding_calls("cpu"))


def test_operators_of_training() -> None:
    check_calls(training_calls("", "cpu"))
