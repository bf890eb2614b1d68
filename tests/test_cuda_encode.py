"""Embeddings and heads on the way of CUDA tensors, emulated on a CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import DEVICES, ON_GPU
from test_cuda_decode import emulated  # noqa: F401 (a fixture)
from test_embedding import LEAST_COSINE, TEXTS, model  # noqa: F401 (a fixture)
from test_heads import LENGTH, make_small
from test_heads_packed import TOLERANCES
from test_ops_pool import LENGTHS, hidden_of

from minilm_fast import Model, ops
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads.packed import PackedHead
from minilm_fast.ops import _cuda, reference
from minilm_fast.ops.pool import POOLINGS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:3]))
def test_pooling(lengths: list[int], pooling: str, normalize: bool, device: str) -> None:
    hidden, layout = hidden_of(lengths, 21), ops.SequenceLayout.bidirectional(lengths)
    out = _cuda.pool_sequences(hidden.to(device), layout.cu_seqlens.to(device), pooling, normalize)
    exact = reference.pool_sequences(hidden.double(), layout.cu_seqlens, pooling, normalize)
    assert out.shape == exact.shape
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_by_the_kernels_for_gpus(
    model: Model,  # noqa: F811
    pooling: str,
    dtype: str,
    request: pytest.FixtureRequest,
) -> None:
    expected = model.encode(TEXTS, pooling=pooling)
    request.getfixturevalue("emulated")
    # Another model, as the first one's weights are packed for the CPU.
    other = Model(model.config, model.state, model.tokenizer)
    found = other.encode(TEXTS, pooling=pooling, dtype=dtype)
    assert other.encoder(dtype).layers[0].projection.weight.backend == "cuda"
    assert found.dtype == np.float32
    assert (found * expected).sum(1).min() > LEAST_COSINE[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@ON_GPU
def test_vectors_of_a_gpu(model: Model, dtype: str) -> None:  # noqa: F811
    expected = model.encode(TEXTS, device="cpu")
    found = model.encode(TEXTS, dtype=dtype, device="cuda")
    assert found.dtype == np.float32
    assert (found * expected).sum(1).min() > LEAST_COSINE.get(dtype, LEAST_COSINE["bf16"])
    assert np.array_equal(found, model.encode(TEXTS, dtype=dtype))


def test_dtypes_of_other_devices(model: Model) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--dtype fp16 is not for a CPU"):
        model.encode(TEXTS, dtype="fp16", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda: PyTorch finds no GPU"):
            model.encode(TEXTS, device="cuda")


def _head(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A small model, input for it, and its logits."""
    torch.manual_seed(0)
    small, ids = make_small(name, initializer_range=0.3), torch.randint(5, 60, (3, LENGTH))
    with torch.no_grad():
        return small, ids, small(ids)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["SequenceClassifier", "QuestionAnswerer", "MaskedLM"])
def test_heads_by_the_kernels_for_gpus(name: str, dtype: str, emulated: None) -> None:  # noqa: F811
    small, ids, expected = _head(name)
    packed = PackedHead(small, dtype)
    assert packed._encoder.layers[0].projection.weight.backend == "cuda"
    found = packed(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["SequenceClassifier", "QuestionAnswerer", "MaskedLM"])
@ON_GPU
def test_heads_on_a_gpu(name: str, dtype: str) -> None:
    small, ids, expected = _head(name)
    found = small.cuda().packed(dtype)(ids.cuda())
    tolerance = TOLERANCES.get(dtype, TOLERANCES["bf16"]) * expected.abs().max().item()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)
    with pytest.raises(UserError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        small.packed("int8")
