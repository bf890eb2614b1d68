"""The C++ decode_attention and store_source against their specifications."""

from __future__ import annotations

import pytest
import torch
from decode_steps import Arguments, Shape
from decode_steps import arguments as _arguments
from decode_steps import bits as _bits
from decode_steps import copy as _copy
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, ISAS, assert_accurate, instruction_set, threads

from minilm_fast import ops
from minilm_fast.ops import reference


def _check(arguments: Arguments, tolerance: float | None = None, rounded: bool = False) -> None:
    """Holds the error to twice eager's, or where there are too few numbers for that to a tolerance.

    ``rounded``: to that of eager in bf16.
    """
    mine, theirs = _copy(arguments), _copy(arguments)
    out, eager = ops.decode_attention(**mine), reference.decode_attention(**theirs)
    if rounded:
        eager = reference.decode_attention(**_copy(arguments, torch.bfloat16)).to(out.dtype)
    exact = reference.decode_attention(**_copy(arguments, torch.float64))
    if tolerance is None:
        assert_accurate(out, eager, exact)
    else:
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for name in ("history_k", "history_v", "source_k", "source_v"):
        assert torch.equal(_bits(mine[name]), _bits(theirs[name])), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 32, 33, 64, 128])
@pytest.mark.parametrize("bias", [None, 5])
def test_head_sizes(isa: str, dtype: torch.dtype, cache: torch.dtype, size: int, bias: int | None) -> None:
    # Matrix tiles multiply bf16 alone.
    on_tiles = isa == "amx" and cache == torch.bfloat16 and size % 32 == 0 and bias is None
    with instruction_set(isa):
        _check(_arguments(Shape(size=size, bias=bias), dtype, cache), rounded=on_tiles)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", DTYPES)
@pytest.mark.parametrize("beams", [1, 2, 3, 6, 7, 13, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_beams_and_rows(isa: str, cache: torch.dtype, beams: int, rows: int) -> None:
    with instruction_set(isa):
        _check(_arguments(Shape(beams=beams, rows=rows, size=16, bias=40), cache=cache))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", DTYPES)
@pytest.mark.parametrize("bias", [None, 900])
def test_several_blocks_of_keys(isa: str, cache: torch.dtype, bias: int | None) -> None:
    shape = Shape(lengths=(1100, 512, 513), steps=(200, 0, 130), beams=6, source=1104, history=201, bias=bias)
    with instruction_set(isa):
        _check(_arguments(shape, torch.float32 if bias else cache, cache))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("beams", [1, 3, 8, 13])
@pytest.mark.parametrize("rows", [1, 2])
def test_bf16_without_bias(isa: str, size: int, beams: int, rows: int) -> None:
    """What matrix tiles take: sources and histories of any length, capacities of an odd number of half blocks."""
    shape = Shape(
        lengths=(0, 1, 31, 32, 33, 80),
        steps=(0, 40, 3, 0, 1, 17),
        beams=beams,
        rows=rows,
        size=size,
        source=80,
        history=41,
    )
    arguments = _arguments(shape, torch.bfloat16, torch.bfloat16)
    with instruction_set(isa):
        _check(arguments)
        with threads(1):
            together = ops.decode_attention(**_copy(arguments))
        with threads(3):
            assert torch.equal(together, ops.decode_attention(**_copy(arguments)))
        part = _copy(arguments)
        for name in ("q", "k", "v"):
            part[name] = part[name].unflatten(0, (6, -1))[[4, 1]].flatten(0, 1)
        for name in ("ancestry", "slots", "steps"):
            part[name] = part[name][[4, 1]].contiguous()
        assert torch.equal(ops.decode_attention(**part), together.unflatten(0, (6, -1))[[4, 1]].flatten(0, 1))


@given(
    st.lists(st.tuples(st.integers(0, 48), st.integers(0, 24)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 2),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 60)),
    st.sampled_from(ISAS),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_step(
    examples: list[tuple[int, int]], beams: int, rows: int, size: int, bias: int | None, isa: str, seed: int
) -> None:
    lengths, steps = zip(*examples, strict=True)
    shape = Shape(lengths=lengths, steps=steps, beams=beams, rows=rows, size=size, bias=bias)
    with instruction_set(isa):
        _check(_arguments(shape, seed=seed), tolerance=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", DTYPES)
def test_results_depend_on_nothing_else(isa: str, cache: torch.dtype) -> None:
    """Bitwise: whichever examples are decoded together, in whatever order, by however many threads."""
    arguments = _arguments(Shape(bias=9), cache=cache)
    with instruction_set(isa):
        with threads(1):
            together = ops.decode_attention(**_copy(arguments))
        with threads(3):
            assert torch.equal(together, ops.decode_attention(**_copy(arguments)))
        examples = together.view(4, -1, 2, 32)
        for chosen in ([2], [3, 1], [1, 2, 0]):
            part = _copy(arguments)
            for name in ("q", "k", "v"):
                part[name] = part[name].reshape(4, -1, 2, 32)[chosen].flatten(0, 1)
            for name in ("ancestry", "slots", "steps"):
                part[name] = part[name][chosen].contiguous()
            assert torch.equal(ops.decode_attention(**part).view(len(chosen), -1, 2, 32), examples[chosen])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", DTYPES)
def test_store_source(isa: str, size: int, dtype: torch.dtype, cache: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([18, 0, 48, 1], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 20, 20, 68, 71], dtype=torch.int32)
    slots = torch.tensor([4, 0, 3, 1], dtype=torch.int32)
    k, v = torch.randn(71, 2, 3, size).to(dtype).unbind(1)
    caches = [torch.full((5, 3, size, 48), 7.0, dtype=cache), torch.full((5, 3, 48, size), 7.0, dtype=cache)]
    lengths = torch.full((5,), -1, dtype=torch.int32)
    mine, theirs = [*(c.clone() for c in caches), lengths.clone()], [*(c.clone() for c in caches), lengths.clone()]
    with instruction_set(isa), threads(2):
        ops.store_source(k, v, cu_seqlens, counts, slots, *mine)
    reference.store_source(k, v, cu_seqlens, counts, slots, *theirs)
    assert torch.equal(mine[2], theirs[2])
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        assert torch.equal(mine[0][slot, :, :, :count], theirs[0][slot, :, :, :count])
        assert torch.equal(mine[1][slot, :, :count], theirs[1][slot, :, :count])
    assert (mine[0][2] == 7).all() and (mine[1][2] == 7).all()


def _store_arguments(**changes: object) -> list[object]:
    arguments: dict[str, object] = {
        "k": torch.randn(7, 2, 8),
        "v": torch.randn(7, 2, 8),
        "cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32),
        "source_counts": torch.tensor([4, 2], dtype=torch.int32),
        "slots": torch.tensor([2, 0], dtype=torch.int32),
        "source_k": torch.zeros(3, 2, 8, 16),
        "source_v": torch.zeros(3, 2, 16, 8),
        "source_lengths": torch.zeros(3, dtype=torch.int32),
    }
    return list((arguments | changes).values())


def test_opcheck() -> None:
    shape = Shape(lengths=(9, 16), steps=(3, 0), beams=2, size=8, source=16, history=4)
    arguments = _arguments(shape)
    arguments["source_lengths"].clamp_(max=16)
    # The checker compares whole tensors, so none may hold NaN.
    for name in ("source_k", "source_v", "history_k", "history_v"):
        arguments[name].nan_to_num_()
    torch.library.opcheck(torch.ops.minilm_fast.decode_attention.default, tuple(arguments.values()))
    torch.library.opcheck(torch.ops.minilm_fast.store_source.default, _store_arguments())


SMALL = Shape(lengths=(9, 16), steps=(3, 0), beams=2, size=8, source=16, history=4)


def _int(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 16)}, "q must be"),
        ({"q": torch.zeros(7, 2, 8)}, "k must have the shape"),
        ({"k": torch.zeros(8, 2, 8, dtype=torch.bfloat16)}, "k must be"),
        ({"rows": 3}, "rows must be 1 or 2"),
        ({"rows": 1}, "q must have 4 rows"),
        ({"source_k": torch.zeros(4, 2, 8, 17)}, "source_k must be a multiple of 16"),
        ({"source_k": torch.zeros(4, 2, 8, 16, dtype=torch.float64)}, "source_k must be"),
        ({"source_v": torch.zeros(4, 2, 8, 16)}, "source_v must have the shape"),
        ({"source_v": torch.zeros(4, 2, 16, 8, dtype=torch.bfloat16)}, "source_v must be"),
        ({"history_k": torch.zeros(4, 4, 3, 2, 8)}, "history_k must have the shape"),
        ({"history_v": torch.zeros(4, 5, 2, 2, 8)}, "history_v must have the shape"),
        ({"history_v": torch.zeros(4, 4, 2, 8, 2).transpose(3, 4)}, "history_v must be contiguous"),
        ({"source_lengths": torch.full((4,), 17, dtype=torch.int32)}, r"source_lengths\[\d\] is 17"),
        ({"source_lengths": torch.full((4,), -1, dtype=torch.int32)}, r"source_lengths\[\d\] is -1"),
        ({"ancestry": torch.zeros(2, 2, 5, dtype=torch.int32)}, "ancestry must have the shape"),
        ({"ancestry": torch.full((2, 2, 4), 2, dtype=torch.int32)}, r"ancestry\[0, 0, 0\] is 2"),
        ({"slots": _int(0, 4)}, r"slots\[1\] is 4"),
        ({"slots": _int(1, 1)}, "slots holds 1 twice"),
        ({"slots": torch.tensor([0, 1])}, "slots must be"),
        ({"steps": _int(4, 0)}, r"steps\[0\] is 4"),
        ({"steps": _int(0, -1)}, r"steps\[1\] is -1"),
        ({"relative_bias": torch.zeros(2, 4)}, "relative_bias must have an odd number"),
    ],
)
def test_bad_arguments(changes: Arguments, message: str) -> None:
    arguments = _arguments(SMALL) | changes
    with pytest.raises(RuntimeError, match=f"decode_attention: .*{message}"):
        torch.ops.minilm_fast.decode_attention(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(7, 16)}, "k must be"),
        ({"v": torch.zeros(7, 2, 9)}, "v must have the shape"),
        ({"cu_seqlens": _int(0, 4, 8)}, "cu_seqlens must ascend"),
        ({"cu_seqlens": _int(0, 4)}, "cu_seqlens must have the shape"),
        ({"source_counts": _int(4, 4)}, r"source_counts\[1\] is 4, the sequence has 3"),
        ({"slots": _int(0, 3)}, r"slots\[1\] is 3"),
        ({"slots": _int(0, 0)}, "slots holds 0 twice"),
        ({"source_k": torch.zeros(3, 2, 8, 0), "source_v": torch.zeros(3, 2, 0, 8)}, "source_k holds 0"),
        ({"source_v": torch.zeros(3, 2, 8, 16)}, "source_v must have the shape"),
        ({"source_lengths": torch.zeros(2, dtype=torch.int32)}, "source_lengths must have the shape"),
    ],
)
def test_bad_sources(changes: Arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"store_source: .*{message}"):
        torch.ops.minilm_fast.store_source(*_store_arguments(**changes))
