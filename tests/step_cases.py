"""Random arguments of the operators of a decoding step around its attention, and what is wanted of the results."""

from __future__ import annotations

from typing import Any

import torch

from minilm_fast.ops import reference

DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
EPS = 1e-5
Arguments = dict[str, Any]


def linear(
    rows: int, features: int, outputs: int, dtype: torch.dtype, *, norm: bool, residual: bool, gelu: bool, wide: bool
) -> Arguments:
    """Random arguments. Rows of x and of the residual are apart, with NaN between them."""
    torch.manual_seed(rows + features)
    x = torch.full((rows, 2, features), float("nan"), dtype=torch.float32 if norm else dtype)
    x[:, 0] = torch.randn(rows, features) * 3 + 1
    between = torch.full((rows, 2, outputs), float("nan"), dtype=dtype)
    between[:, 1] = torch.randn(rows, outputs)
    return {
        "x": x[:, 0],
        "weight": (torch.randn(outputs, features) * features**-0.5).to(dtype),
        "bias": torch.randn(outputs) if gelu or norm else None,
        "residual": between[:, 1] if residual else None,
        "norm_weight": torch.randn(features) if norm else None,
        "norm_bias": torch.randn(features) if norm else None,
        "eps": EPS if norm else 0.0,
        "activation": int(gelu),
        "wide": wide,
        "early": False,
    }


def check_linear(arguments: Arguments, out: torch.Tensor, normal: torch.Tensor) -> None:
    """The normalised rows against fp64, and the result against the product of what was found for them."""
    dtype, wide, norm = arguments["weight"].dtype, arguments["wide"], arguments["norm_weight"] is not None
    a = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    rows = a["x"]
    assert normal.dtype == dtype and normal.shape == (rows.shape[0] if norm else 0, rows.shape[1])
    if norm:
        check_norm(rows, a["norm_weight"], a["norm_bias"], normal)
        rows = normal.double()
    activation = ("none", "gelu")[a["activation"]]
    exact, _ = reference.step_linear(rows, a["weight"], a["bias"], a["residual"], None, None, 0.0, activation, True)
    assert out.dtype == (torch.float32 if wide else dtype) and out.shape == exact.shape
    size = rows.abs() @ a["weight"].abs().t() + 1
    assert ((out.double() - exact).abs() <= 1e-6 * size + ROUNDING[out.dtype] * exact.abs()).all()


def check_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """A norm against fp64."""
    exact = reference.step_norm(x.double(), weight.double(), bias.double(), EPS, torch.float64)
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= ROUNDING[out.dtype] * exact.abs() + 1e-5).all()


def embedding(channels: int, mask_id: int = 4, types: int = 2) -> Arguments:
    torch.manual_seed(channels)
    lengths = torch.full((5,), 10**9, dtype=torch.int32)
    lengths[[3, 1, 4]] = torch.tensor([7, 0, 2], dtype=torch.int32)
    return {
        "last_ids": torch.tensor([[0, 8], [3, 3], [1, 7]], dtype=torch.int32),
        "mask_id": mask_id,
        "slots": torch.tensor([3, 1, 4], dtype=torch.int32),
        "steps": torch.tensor([2, 0, 5], dtype=torch.int32),
        "source_lengths": lengths,
        "word": torch.randn(9, channels),
        "position": torch.randn(11, channels),
        "type": torch.randn(types, channels) if types else None,
        "type_id": 1,
        "weight": torch.randn(channels),
        "bias": torch.randn(channels),
        "eps": EPS,
        "dtype": torch.bfloat16,
    }


def check_embedding(arguments: Arguments, out: torch.Tensor) -> None:
    """Embeddings against fp64."""
    wide = {k: v.double() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    exact = reference.step_embedding(**(arguments | wide | {"dtype": torch.float64}))
    assert out.dtype == arguments["dtype"] and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= ROUNDING[out.dtype] * exact.abs() + 1e-5).all()
