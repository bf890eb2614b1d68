"""The CUDA decode_attention and store_source, emulated on a CPU, against their specifications."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import decode_steps
import pytest
import torch
from decode_steps import NAN, Arguments, Shape
from emulated_cuda import kernel_before, operators, poisoned_results, running_backwards, written_late
from kernel_checks import assert_accurate

from minilm_fast.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _arguments(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """As for the CPU, and what no hypothesis descends from is NaN too."""
    arguments = decode_steps.arguments(shape, dtype, dtype, seed)
    for e, (slot, step) in enumerate(zip(arguments["slots"].tolist(), shape.steps, strict=True)):
        for j in range(step):
            seen = arguments["ancestry"][e, :, j].unique().long()
            unseen = torch.ones(shape.beams, dtype=torch.bool)
            unseen[seen] = False
            arguments["history_k"][slot, j, unseen] = NAN
            arguments["history_v"][slot, j, unseen] = NAN
    return arguments


def _run(arguments: Arguments) -> torch.Tensor:
    with poisoned_results():
        return operators().decode_attention(*arguments.values())


def _check(arguments: Arguments) -> None:
    mine, theirs = decode_steps.copy(arguments), decode_steps.copy(arguments)
    out, eager = _run(mine), reference.decode_attention(**theirs)
    exact = reference.decode_attention(**decode_steps.copy(arguments, torch.float64))
    assert_accurate(out, eager, exact)
    for name in ("history_k", "history_v", "source_k", "source_v"):
        assert torch.equal(decode_steps.bits(mine[name]), decode_steps.bits(theirs[name])), name
    again = decode_steps.copy(arguments)
    with running_backwards():
        assert torch.equal(decode_steps.bits(out), decode_steps.bits(_run(again)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bias", [None, 5])
def test_head_sizes(dtype: torch.dtype, size: int, bias: int | None) -> None:
    _check(_arguments(Shape(lengths=(0, 17, 90, 1), source=96, size=size, bias=bias), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [nullcontext, running_backwards])
def test_an_early_kernel_reads_no_queries_keys_and_values_before_the_others_end(
    dtype: torch.dtype, order: Callable[[], AbstractContextManager[None]]
) -> None:
    arguments = _arguments(Shape(lengths=(90, 0, 17), steps=(3, 0, 24), source=96), dtype)
    plain, early = decode_steps.copy(arguments), decode_steps.copy(arguments)
    expected = operators().decode_attention(*plain.values())
    empty, fill = written_late({name: early[name] for name in ("q", "k", "v")})
    with order(), kernel_before(fill):
        out = operators().decode_attention_early(*(early | empty).values())
    assert torch.equal(out, expected)
    assert torch.equal(decode_steps.bits(early["history_k"]), decode_steps.bits(plain["history_k"]))


@pytest.mark.parametrize("beams", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("rows", [1, 2])
def test_beams_and_rows(beams: int, rows: int) -> None:
    """Beyond 16 rows an example takes several blocks."""
    shape = Shape(lengths=(33, 0), steps=(5, 0), beams=beams, rows=rows, heads=1, history=6, bias=40)
    _check(_arguments(shape, torch.bfloat16, seed=beams))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tiles(dtype: torch.dtype) -> None:
    """More tiles than the warps take at first, and a history that is listed in several rounds."""
    shape = Shape(lengths=(700, 64), steps=(210, 99), beams=6, heads=1, source=704, history=211, bias=900)
    _check(_arguments(shape, dtype))


@pytest.mark.parametrize("seed", range(6))
def test_any_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    examples = draw(1, 3)
    shape = Shape(
        lengths=tuple(draw(0, 80) for _ in range(examples)),
        steps=tuple(draw(0, 24) for _ in range(examples)),
        beams=draw(1, 10),
        rows=draw(1, 2),
        heads=draw(1, 3),
        size=(32, 64, 128)[seed % 3],
        source=80,
        bias=draw(0, 60) if seed % 2 else None,
    )
    _check(_arguments(shape, DTYPES[draw(0, 2)], seed))


def test_results_depend_on_nothing_else() -> None:
    """Bitwise: whichever examples are decoded together, in whatever order."""
    arguments = _arguments(Shape(bias=9), torch.bfloat16)
    examples = _run(decode_steps.copy(arguments)).view(4, -1, 2, 32)
    for chosen in ([2], [3, 1]):
        part = decode_steps.copy(arguments)
        for name in ("q", "k", "v"):
            part[name] = part[name].reshape(4, -1, 2, 32)[chosen].flatten(0, 1)
        for name in ("ancestry", "slots", "steps"):
            part[name] = part[name][chosen].contiguous()
        assert torch.equal(_run(part).view(len(chosen), -1, 2, 32), examples[chosen])


def test_rows_that_are_not_aligned() -> None:
    arguments = _arguments(Shape(steps=(0, 3, 24, 11)), torch.float16)
    wide = torch.full((*arguments["k"].shape[:2], 33), NAN, dtype=torch.float16)
    wide[..., 1:] = arguments["k"]
    _check(arguments | {"k": wide[..., 1:]})


@pytest.mark.parametrize("examples", [0, 1])
def test_nothing_to_do(examples: int) -> None:
    shape = Shape(lengths=(5,) * examples, steps=(0,) * examples, beams=2, heads=1)
    assert _run(_arguments(shape, torch.float32)).shape == (4 * examples, 1, 32)


SMALL = Shape(lengths=(9, 16), steps=(3, 0), beams=2, source=16, history=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 2, 40)}, "head size of q must be 32, 64 or 128"),
        ({"q": torch.zeros(8, 2, 32, dtype=torch.float64)}, "q must be"),
        ({"k": torch.zeros(8, 2, 32, dtype=torch.float16)}, "k must be"),
        ({"v": torch.zeros(7, 2, 32)}, "v must have the shape"),
        ({"rows": 3}, "rows must be 1 or 2"),
        ({"rows": 1}, "q must have 4 rows"),
        ({"source_k": torch.zeros(4, 2, 32, 24)}, "capacity of source_k"),
        ({"source_k": torch.zeros(4, 2, 16, 32).transpose(2, 3)}, "source_k must be contiguous"),
        ({"source_v": torch.zeros(4, 2, 16, 32).half()}, "source_v must be"),
        ({"history_v": torch.zeros(4, 5, 2, 2, 32)}, "history_v must have the shape"),
        ({"ancestry": torch.zeros(2, 2, 5, dtype=torch.int32)}, "history_k must have the shape"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots must be"),
        ({"steps": torch.zeros(3, dtype=torch.int32)}, "steps must have the shape"),
        ({"source_lengths": torch.zeros(3, dtype=torch.int32)}, "source_lengths must have the shape"),
        ({"relative_bias": torch.zeros(2, 4)}, "relative_bias must have an odd number"),
    ],
)
def test_bad_arguments(changes: Arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"decode_attention: .*{message}"):
        _run(_arguments(SMALL, torch.float32) | changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_store_source(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    counts = torch.tensor([18, 0, 133, 1], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 20, 20, 155, 158], dtype=torch.int32)
    slots = torch.tensor([4, 0, 3, 1], dtype=torch.int32)
    k, v = torch.randn(158, 2, 3, size).to(dtype).unbind(1)
    theirs = [torch.full((5, 3, size, 144), 7.0, dtype=dtype), torch.full((5, 3, 144, size), 7.0, dtype=dtype)]
    theirs.append(torch.full((5,), -1, dtype=torch.int32))
    mine = [x.clone() for x in theirs]
    operators().store_source(k, v, cu_seqlens, counts, slots, *mine)
    reference.store_source(k, v, cu_seqlens, counts, slots, *theirs)
    for ours, expected in zip(mine, theirs, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(7, 2, 48)}, "head size of k"),
        ({1: torch.zeros(7, 2, 32).half()}, "v must be"),
        ({0: torch.zeros(7, 32, 2).transpose(1, 2)}, "the last dimension of k"),
        ({2: torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens must have the shape"),
        ({4: torch.tensor([2], dtype=torch.int32)}, "slots must have the shape"),
        ({5: torch.zeros(3, 2, 32, 8)}, "capacity of source_k"),
        ({6: torch.zeros(3, 2, 32, 32)}, "source_v must have the shape"),
        ({7: torch.zeros(3)}, "source_lengths must be"),
    ],
)
def test_bad_store(changes: dict[int, torch.Tensor], message: str) -> None:
    arguments = [
        *(torch.zeros(7, 2, 32), torch.zeros(7, 2, 32)),
        *(torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 7], [4, 2], [2, 0])),
        *(torch.zeros(3, 2, 32, 16), torch.zeros(3, 2, 16, 32), torch.zeros(3, dtype=torch.int32)),
    ]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=f"store_source: .*{message}"):
        operators().store_source(*arguments)
