"""Powers of two of which a share is computed by a polynomial: its error and how large it is."""

from __future__ import annotations

import pytest
import torch
from triton_checks import DEVICE

from minilm_fast.ops import _triton

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
module = _triton.kernels("exponential")
exp2 = module.exp2


@triton.jit
def _powers(x, y, COLUMNS: tl.constexpr, SHARE: tl.constexpr):
    place = tl.arange(0, 16)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(y + place, exp2(tl.load(x + place), SHARE))


def _run(x: torch.Tensor, share: int) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    _powers[(1,)](x, y, x.shape[1], share)
    return y


def _numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = -126 * torch.rand(16, 64, generator=generator)
    x[:8] /= 126
    x[8] = -torch.arange(64) / 2
    return x.to(DEVICE)


@pytest.mark.parametrize("share", [0, 1, 2, 4, 8])
def test_relative_error(share: int) -> None:
    x = _numbers()
    assert ((_run(x, share).double() / x.double().exp2() - 1).abs()).max() <= 2.4e-7


@pytest.mark.parametrize(("share", "columns"), [(2, 64), (4, 64), (8, 64), (8, 32)])
def test_the_share(share: int, columns: int) -> None:
    """Below 2^-126 the polynomial gives 0, the special function a smaller number."""
    x = torch.full((16, columns), -126.75, device=DEVICE)
    assert (_run(x, share) == 0).float().mean() == 1 / min(share, columns // 8)


@pytest.mark.parametrize("share", [1, 2])
def test_what_is_no_number_and_what_vanishes(share: int) -> None:
    x = _numbers()
    x[0], x[1], x[2] = -torch.inf, torch.nan, -1000.0
    y = _run(x, share)
    assert (y[0] == 0).all() and y[1].isnan().all() and (y[2] == 0).all()


def test_fp32_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ONE_IN, ("attention", 32), 4)
    assert module.one_in("attention", 32, torch.float32) == 0
    assert module.one_in("attention", 32, torch.float16) == 4
    assert module.one_in("attention", 64, torch.float16) == module.one_in("attention_backward", 32, torch.float16) == 0
