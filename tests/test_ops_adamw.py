"""The fused AdamW update against its formula."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICES, ISAS, assert_accurate, instruction_set, threads

from minilm_fast import ops
from minilm_fast.ops import _cuda, backend, reference

SETTINGS = {"step_size": 0.03, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "decay": 0.98}


def _tensors(count: int) -> list[torch.Tensor]:
    torch.manual_seed(count)
    return [torch.randn(count), torch.randn(count), torch.randn(count), torch.rand(count)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 100, 70001])
def test_against_fp64(isa: str, count: int) -> None:
    given = _tensors(count)
    exact, eager, ours = (
        [x.to(dtype).clone() for x in given] for dtype in (torch.float64, torch.float32, torch.float32)
    )
    for tensors in (exact, eager):
        with backend("reference"):
            ops.adamw(*tensors, **SETTINGS)
    with instruction_set(isa), backend("cpu"):
        ops.adamw(*ours, **SETTINGS)
    assert torch.equal(ours[1], given[1])
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_accurate(mine, theirs, truth)


def test_result_does_not_depend_on_threads() -> None:
    results = []
    for count in (1, 2, 3):
        tensors = _tensors(100003)
        with threads(count), backend("cpu"):
            ops.adamw(*tensors, **SETTINGS)
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_where_they_are() -> None:
    tensors = _tensors(40)
    tensors[1][3], tensors[1][20] = float("nan"), float("inf")
    with backend("cpu"):
        ops.adamw(*tensors, **SETTINGS)
    assert (~torch.isfinite(tensors[0])).nonzero().flatten().tolist() == [3, 20]


def test_other_layouts_take_the_reference() -> None:
    given = _tensors(12)
    expected = [x.clone() for x in given]
    ops.adamw(*expected, **SETTINGS)
    strided = [torch.stack([x, x], dim=1)[:, 0] for x in given]
    ops.adamw(*strided, **SETTINGS)
    for mine, theirs in zip(strided, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wrong_shapes_are_named() -> None:
    tensors = _tensors(12)
    with pytest.raises(RuntimeError, match="adamw: square must be"):
        ops.adamw(*tensors[:3], tensors[3][:5], **SETTINGS)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.minilm_fast.adamw.default, (*_tensors(9), *SETTINGS.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_lists_are_updated_as_the_specification_says(device: str) -> None:
    given = [_tensors(count) for count in (7, 0, 70001, 64)]
    given[3] = [torch.stack([x, x], dim=1)[:, 0] for x in given[3]]
    ours = [[x.to(device) if x.is_contiguous() else x.clone().to(device) for x in tensors] for tensors in given]
    exact = [[x.double() for x in tensors] for tensors in given]
    eager = [[x.clone() for x in tensors] for tensors in given]
    _cuda.adamw(*(list(column) for column in zip(*ours, strict=True)), *SETTINGS.values())
    for tensors in (*exact, *eager):
        reference.adamw(*tensors, **SETTINGS)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        for x, y, z in zip(mine, theirs, truth, strict=True):
            assert_accurate(x.cpu(), y, z)


def test_many_are_updated_as_one_by_one() -> None:
    one, many = ([_tensors(count) for count in (7, 0, 100)] for _ in range(2))
    for tensors in one:
        ops.adamw(*tensors, **SETTINGS)
    ops.adamw_of_many(*(list(column) for column in zip(*many, strict=True)), **SETTINGS)
    assert all(
        torch.equal(x, y) for mine, theirs in zip(one, many, strict=True) for x, y in zip(mine, theirs, strict=True)
    )
    ops.adamw_of_many([], [], [], [], **SETTINGS)
    with pytest.raises(ValueError, match="shorter"):
        ops.adamw_of_many([many[0][0]], [], [], [], **SETTINGS)
