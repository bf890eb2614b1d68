"""What the Triton kernels share: checks of arguments, the random numbers of dropout, precisions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that differ from call to call: none of their values is worth a kernel of its own.
UNSPECIALIZED = ["queries", "low", "high", "threshold"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(condition: bool, message: str) -> None:
    """As TORCH_CHECK in the C++ operators."""
    if not condition:
        raise RuntimeError(message)


def check_dtype(op: str, name: str, x: torch.Tensor) -> None:
    check(x.dtype in DTYPES, f"{op}: {name} must be fp16, bf16 or fp32, got {x.dtype}")


def check_vector(op: str, name: str, x: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """A contiguous fp32 tensor of one shape on the device of the others, or nothing."""
    if x is None:
        return
    check(x.dtype == torch.float32, f"{op}: {name} must be fp32, got {x.dtype}")
    check(x.device == device, f"{op}: {name} must be on {device}, got {x.device}")
    check(x.shape == shape, f"{op}: {name} must have the shape {list(shape)}, got {list(x.shape)}")
    check(x.is_contiguous(), f"{op}: {name} must be contiguous")


def check_rows(op: str, name: str, x: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    check_dtype(op, name, x)
    check(x.device == device, f"{op}: {name} must be on {device}, got {x.device}")
    check(x.shape == shape, f"{op}: {name} must have the shape {list(shape)}, got {list(x.shape)}")
    check(x.shape[-1] <= 1 or x.stride(-1) == 1, f"{op}: the last dimension of {name} must be contiguous")


def check_sequences(
    op: str,
    tokens: int,
    device: torch.device,
    cu_seqlens: torch.Tensor,
    segments: torch.Tensor,
    cu_queries: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> None:
    """Shapes and types only: that the numbers add up could not be seen without waiting for the GPU."""
    batch = segments.shape[0]
    shapes = {
        "cu_seqlens": (cu_seqlens, (batch + 1,)),
        "segments": (segments, (batch, 3)),
        "cu_queries": (cu_queries, (batch + 1,)),
        "position_ids": (position_ids, (tokens,)),
    }
    for name, (x, shape) in shapes.items():
        if x is None:
            continue
        check(x.dtype == torch.int32, f"{op}: {name} must be int32, got {x.dtype}")
        check(x.device == device, f"{op}: {name} must be on {device}, got {x.device}")
        check(x.shape == shape, f"{op}: {name} must have the shape {list(shape)}, got {list(x.shape)}")
        check(x.is_contiguous(), f"{op}: {name} must be contiguous")


def with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """A gradient comes from anywhere, expanded for instance."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Of the dot products of fp32 numbers: TF32 only where the user asked PyTorch for it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def capability() -> int:
    """Of the current device, 90 for 9.0; that of the interpreter is 90."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


class Dropout:
    """The arguments of a kernel that draws the dropout of ``minilm_fast.ops.dropout``.

    Attributes:
        low, high: the halves of the seed as signed numbers, so that every seed has the same type in a kernel.
        threshold: a half word below it is dropped; 0: nothing is.
        factor: of what is kept.
    """

    def __init__(self, op: str, probability: float, seed: torch.Tensor | None) -> None:
        check(0 <= probability < 1, f"{op}: dropout must be at least 0 and below 1, got {probability}")
        check(probability == 0 or seed is not None, f"{op}: dropout needs a seed")
        self.threshold = round(65536 * probability)
        value = 0
        if self.threshold and seed is not None:
            check(seed.dtype == torch.int64 and seed.shape == (1,), f"{op}: seed must be int64 [1]")
            check(seed.device.type == "cpu", f"{op}: seed must be on the CPU, got {seed.device}")
            value = int(seed)
        self.low, self.high = (((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for word in (value, value >> 32))
        self.factor = 65536 / (65536 - self.threshold) if self.threshold < 65536 else 0.0


@triton.jit
def _halves(word, threshold):
    return tl.join((word & 0xFFFF) >= threshold, (word >> 16) >= threshold)


@triton.jit
def dropout_keep(low, high, threshold, stream, row, first_column, COLUMNS: tl.constexpr):
    """Which elements are kept: int1 ``[rows, COLUMNS]`` from column ``first_column`` on.

    One Philox call gives 8 elements of a row, 16 apart; joining them needs no more than moving bits.

    Args:
        row: int32 ``[rows]``.
        first_column: a multiple of ``COLUMNS`` or of 128.
        COLUMNS: 32, 64 or a multiple of 128 that is a power of two.
    """
    ROWS: tl.constexpr = row.shape[0]
    BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    lane = first_column // 128 * 16 + tl.arange(0, 16 * BLOCKS)
    c0 = tl.broadcast_to(lane[None, :], ROWS, 16 * BLOCKS).to(tl.uint32)
    c1 = tl.broadcast_to(row[:, None], ROWS, 16 * BLOCKS).to(tl.uint32)
    c2 = tl.zeros([ROWS, 16 * BLOCKS], tl.uint32) + stream.to(tl.uint32)
    k0 = low.to(tl.uint32, bitcast=True)
    k1 = high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, tl.zeros_like(c0), k0, k1, 7)
    bound = threshold.to(tl.uint32)
    if COLUMNS == 32:
        word = first_column // 32 % 4
        one = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        return tl.reshape(tl.permute(_halves(one, bound), (0, 2, 1)), ROWS, 32)
    elif COLUMNS == 64:
        upper = first_column // 64 % 2 == 1
        pair = tl.join(_halves(tl.where(upper, w2, w0), bound), _halves(tl.where(upper, w3, w1), bound))
        return tl.reshape(tl.permute(pair, (0, 3, 2, 1)), ROWS, 64)
    else:
        even = tl.join(_halves(w0, bound), _halves(w2, bound))
        odd = tl.join(_halves(w1, bound), _halves(w3, bound))
        # Columns of a block of 128 are 64 * upper word + 32 * odd word + 16 * half + lane.
        bits = tl.reshape(tl.join(even, odd), ROWS, BLOCKS, 16, 2, 2, 2)
        return tl.reshape(tl.permute(bits, (0, 1, 4, 5, 3, 2)), ROWS, COLUMNS)


@triton.jit
def dropout_keep_one(low, high, threshold, stream, row, column):
    """Whether single elements are kept: int1 of the shape of ``row`` and ``column``, int32 of one shape."""
    c0 = (column // 128 * 16 + column % 16).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream.to(tl.uint32)
    k0 = low.to(tl.uint32, bitcast=True)
    k1 = high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(c0, row.to(tl.uint32), c2, tl.zeros_like(c0), k0, k1, 7)
    word = column // 32 % 4
    one = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    half = tl.where(column // 16 % 2 == 1, one >> 16, one & 0xFFFF)
    return half >= threshold.to(tl.uint32)


@triton.jit
def visible_prefix(row, source, target):
    """How many of a sequence's first columns a row sees (ops/layout.py); a pseudo row sees itself besides.

    All masks of the family are such a prefix: a target row's ends with itself, a pseudo row's before the target it
    stands for.
    """
    end = source + target
    return tl.where(row < source, source, tl.where(row < end, row + 1, tl.minimum(row - target, end)))


@triton.jit
def visible_columns(row, length, source, target):
    """Of a tile's rows: which are inside the sequence, each one's prefix, the longest prefix and the shortest."""
    inside = row < length
    prefix = visible_prefix(row, source, target)
    return inside, prefix, tl.max(tl.where(inside, prefix, 0), 0), tl.min(tl.where(inside, prefix, length), 0)


@triton.jit
def load_rows(base, row, stride, inside, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """``[rows, PADDED]`` of a matrix whose rows have SIZE numbers: zeros where not ``inside`` and beyond SIZE."""
    dim = tl.arange(0, PADDED)
    mask = inside[:, None]
    if PADDED > SIZE:
        mask = mask & (dim < SIZE)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, stride, inside, x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The converse of ``load_rows``."""
    dim = tl.arange(0, PADDED)
    mask = inside[:, None]
    if PADDED > SIZE:
        mask = mask & (dim < SIZE)[None, :]
    tl.store(base + row.to(tl.int64)[:, None] * stride + dim[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def overlap(begin, end, least):
    """A range without what lies before ``least``; its end is not before its begin."""
    begin = tl.maximum(begin, least)
    return begin, tl.maximum(begin, end)


@triton.jit
def rows_that_see(first, last, row_begin, source, target, length, PARTIAL: tl.constexpr):
    """The rows that see all of the columns ``[first, last)`` as part of their prefix, or, PARTIAL, some but not all.

    Three ranges, of source, target and pseudo rows, without the rows before ``row_begin``.
    """
    end = source + target
    pseudo_full = tl.where(last <= end, tl.minimum(tl.maximum(last + target, end), length), length)
    target_full = tl.minimum(tl.maximum(last - 1, source), end)
    if PARTIAL:
        a, a_end = overlap(0, tl.where((first < source) & (last > source), source, 0), row_begin)
        b, b_end = overlap(tl.maximum(first, source), target_full, row_begin)
        c, c_end = overlap(tl.maximum(first + target + 1, end), tl.where(first < end, pseudo_full, 0), row_begin)
    else:
        a, a_end = overlap(0, tl.where(last <= source, source, 0), row_begin)
        b, b_end = overlap(target_full, end, row_begin)
        c, c_end = overlap(pseudo_full, length, row_begin)
    return a, a_end, b, b_end, c, c_end


@triton.jit
def tile_of(index, a, a_end, b, b_end, c, c_end, ROWS: tl.constexpr):
    """First row and end of the range of tile ``index``, when each of three ranges is cut into tiles of ROWS."""
    of_a = tl.cdiv(a_end - a, ROWS)
    of_b = tl.cdiv(b_end - b, ROWS)
    if index < of_a:
        start = a + index * ROWS
        stop = a_end
    elif index < of_a + of_b:
        start = b + (index - of_a) * ROWS
        stop = b_end
    else:
        start = c + (index - of_a - of_b) * ROWS
        stop = c_end
    return start, stop


@triton.jit
def attended_sequence(cu_seqlens, segments, cu_queries):
    """Of this program's sequence: first token, length, source, target, the row of q that its row 0 has or would have,
    and its first row that asks."""
    index = tl.program_id(2)
    first = tl.load(cu_seqlens + index)
    length = tl.load(cu_seqlens + index + 1) - first
    source = tl.load(segments + 3 * index)
    target = tl.load(segments + 3 * index + 1)
    shift = first
    row_begin = length - length
    if cu_queries is not None:
        end = tl.load(cu_queries + index + 1)
        shift = end - length
        row_begin = length - (end - tl.load(cu_queries + index))
    return first, length, source, target, shift, row_begin


@triton.jit
def distance_bias(relative_bias, head, limit, row_position, column_position):
    """The bias of ``[rows, columns]`` in units of powers of two."""
    distance = column_position[None, :] - row_position[:, None]
    index = tl.minimum(tl.maximum(distance, -limit), limit) + limit
    return tl.load(relative_bias + head * (2 * limit + 1) + index) * LOG2E
