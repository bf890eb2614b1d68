"""Powers of two, some of them computed by multiplication and addition.

At head size 32 the exponentials of a tile take longer than its products: a multiprocessor of compute capability 8.0 or
9.0 has 16 special functions a clock, and 64 or 128 multiplications with addition. So a share of the numbers goes to a
polynomial: ``2^x = 2^n p(f)`` with ``n`` the nearest integer and ``f = x - n`` (Cody and Waite, Software Manual for the
Elementary Functions, 1980), as FlashAttention-4 does on later devices. How large a share pays has to be measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

OPERATORS = ("attention", "attention_backward", "relation_kl", "relation_kl_backward")
SIZES = (16, 32, 64, 128)
ONE_IN: dict[tuple[str, int], int] = {}
"""How many exponentials there are to one that a polynomial computes: 2, 4 or 8, by one of OPERATORS and one of SIZES.

The size of ``relation_kl`` is the larger head size, rounded up to a power of two. Without an entry there is no
polynomial.
"""

# Adding it to a number leaves the nearest integer in the last bits of the sum, which are shifted to be an exponent.
_ROUNDER = tl.constexpr(1.5 * 2**23 + 127)


def one_in(operator: str, size: int, dtype: torch.dtype) -> int:
    """The entry of :data:`ONE_IN`, or 0; with fp32 it is 0, as products without tensor cores take longer."""
    return 0 if dtype == torch.float32 else ONE_IN.get((operator, size), 0)


@triton.jit
def exp2_polynomial(x):
    """``2^x`` of fp32 numbers below 128: 0 where it would be less than 2^-126.5, NaN of NaN.

    The relative error is at most 2.4e-7, that of the special function; one degree less would make it 2.7e-6. The
    coefficients are those of the least relative error on [-0.5, 0.5].
    """
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    sum = x + _ROUNDER
    f = x - (sum - _ROUNDER)
    p = f * 0.0013276471992820628 + 0.009675541334460627
    p = p * f + 0.05550713273497147
    p = p * f + 0.24022119723839813
    p = p * f + 0.6931469670647609
    p = p * f + 1.0000000716546849
    power = (sum.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return p * power


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """``2^x`` of ``[rows, columns]``, of which one number in SHARE is computed by ``exp2_polynomial``; 0: none.

    Halves are told apart by bit 3 of the column: a thread holds both in the layout of a product's result, so that no
    number moves. Of few columns the share is larger: 16 can be halved once.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if SHARE == 0:
        return tl.exp2(x)
    elif SHARE == 1 or COLUMNS < 16:
        return exp2_polynomial(x)
    else:
        parts = tl.permute(tl.reshape(x, ROWS, COLUMNS // 16, 2, 8), (0, 1, 3, 2))
        a, b = tl.split(parts)
        a = tl.exp2(a)
        b = tl.reshape(exp2(tl.reshape(b, ROWS, COLUMNS // 2), SHARE // 2), ROWS, COLUMNS // 16, 8)
        return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), ROWS, COLUMNS)
