"""Which elements dropout keeps: random numbers that depend on a seed and the element's place, on nothing else.

So a kernel can draw them again in its backward pass, in any order, on any device and with any number of threads.
Element ``(row, column)`` of matrix ``stream`` (a head; 0 where there is one matrix only) is decided by 16 bits of the
generator Philox4x32 with 7 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11)::

    counter = (16 * (column // 128) + column % 16, row, stream, 0)
    key     = (seed mod 2**32, seed // 2**32)
    word    = philox(counter, key)[column // 32 % 4]
    half    = word's upper 16 bits if column // 16 % 2 else its lower 16 bits
    factor  = 0 if half < round(65536 * probability) else 65536 / (65536 - round(65536 * probability))

The chance to be dropped is thus ``probability`` rounded to a multiple of 2**-16, and the mean factor is exactly 1.
"""

from __future__ import annotations

import torch

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of ``x * by``; int64 tensors that hold unsigned 32-bit numbers."""
    low, high = by * (x & 0xFFFF), by * (x >> 16)
    upper = (high + (low >> 16)) >> 16
    return upper, ((high << 16) + low) & _LOW


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7: four int64 tensors of one shape that hold unsigned 32-bit numbers, to four of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def dropout_factors(
    probability: float,
    seed: torch.Tensor,
    rows: int,
    columns: int,
    streams: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Factors of whole matrices (module docstring); the specification, the kernels never build them.

    Args:
        probability: chance to be dropped, ``0 <= probability < 1``.
        seed: int64 ``[1]``, not negative.

    Returns:
        fp32 ``[streams, rows, columns]``, each 0 or ``1 / (1 - probability)``.
    """
    value = int(seed)
    column = torch.arange(columns, device=device)
    row = torch.arange(rows, device=device)[:, None]
    stream = torch.arange(streams, device=device)[:, None, None]
    shape = (streams, rows, columns)
    lane = (16 * (column // 128) + column % 16).expand(shape)
    words = philox((lane, row.expand(shape), stream.expand(shape), torch.zeros_like(lane)), (value & _LOW, value >> 32))
    word = torch.stack(words).gather(0, (column // 32 % 4).expand(1, *shape))[0]
    half = torch.where(column // 16 % 2 == 1, word >> 16, word & 0xFFFF)
    threshold = round(65536 * probability)
    return (half >= threshold).float() * (65536 / max(1, 65536 - threshold))


def draw_seeds(count: int) -> torch.Tensor:
    """``count`` seeds from PyTorch's CPU generator, so that :func:`torch.manual_seed` and its saved state rule them.

    Returns:
        int64 ``[count]`` on the CPU.
    """
    return torch.randint(2**62, (count,))
