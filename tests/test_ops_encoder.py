"""The fused layers of the encoder against their specification and against the operators they consist of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_checks import ISAS, assert_accurate, instruction_set, threads, wide

from minilm_fast import ops
from minilm_fast.ops import reference

FORMATS = ("fp32", "bf16", "int8")
EPS = 1e-12
# Sequences' lengths: one token, none, odd sizes, longer than a group and than a block of rows and of keys.
LENGTHS = ([1], [0, 3, 0, 17], [16, 128, 1, 33, 64, 200, 7], [530, 2])
LAYOUTS = {
    "bidirectional": ops.SequenceLayout.bidirectional([5, 40, 1]),
    "causal": ops.SequenceLayout.causal([9, 37]),
    "pseudo": ops.SequenceLayout.pseudo_masked([8, 20], [5, 16]),
}


def make(
    format: str, layers: int, hidden: int, inner: int, seed: int = 0
) -> tuple[list[ops.EncoderLayer], list[torch.Tensor], list[torch.Tensor]]:
    """Random layers, and their weights and vectors in the order of the operator."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    packed, weights, vectors = [], [], []
    for _ in range(layers):
        shapes = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
        w = [random(n, k, scale=k**-0.5) for n, k in shapes]
        v = [
            random(3 * hidden, scale=0.1),
            random(hidden, scale=0.1),
            1 + random(hidden, scale=0.1),
            random(hidden, scale=0.1),
            random(inner, scale=0.1),
            random(hidden, scale=0.1),
            1 + random(hidden, scale=0.1),
            random(hidden, scale=0.1),
        ]
        packed.append(ops.EncoderLayer(*(ops.pack_weight(x, format) for x in w), *v))
        weights += w
        vectors += v
    return packed, weights, vectors


def by_operators(x: torch.Tensor, layers: list[ops.EncoderLayer], layout: ops.SequenceLayout, heads: int):
    """The layers as a chain of the other operators."""
    format = layers[0].projection.format
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    for layer in layers:
        q, k, v = ops.linear(x, layer.projection, layer.projection_bias).to(dtype).view(len(x), 3, heads, -1).unbind(1)
        context = ops.attention(q, k, v, layout)[0].flatten(1)
        y = ops.linear(context.float(), layer.attention_output, layer.attention_output_bias)
        x = ops.add_layer_norm(y, x, layer.attention_norm_weight, layer.attention_norm_bias, EPS)
        y = ops.linear(x, layer.intermediate, layer.intermediate_bias, "gelu").to(dtype).float()
        y = ops.linear(y, layer.output, layer.output_bias)
        x = ops.add_layer_norm(y, x, layer.output_norm_weight, layer.output_norm_bias, EPS)
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_operators(isa: str, format: str, lengths: list[int]) -> None:
    """Bit for bit, but for the GELU of bf16 and int8, which is as exact as bf16 needs."""
    layers, _, _ = make(format, 2, 96, 200)
    layout = ops.SequenceLayout.bidirectional(lengths)
    x = torch.randn(layout.total, 96, generator=torch.Generator().manual_seed(1))
    with instruction_set(isa):
        out, chain = ops.encoder_layers(x, layers, layout, 3, EPS), by_operators(x, layers, layout, 3)
    if format == "fp32":
        assert torch.equal(out, chain)
    else:
        assert (out - chain).abs().max() < (0.03 if format == "bf16" else 0.15)
        assert (out - chain).square().mean().sqrt() < (3e-3 if format == "bf16" else 2e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_accuracy(isa: str, format: str, kind: str) -> None:
    """The error against fp64 is at most twice that of eager PyTorch with the same roundings."""
    layers, weights, vectors = make(format, 3, 64, 160)
    layout = LAYOUTS[kind]
    x = torch.randn(layout.total, 64, generator=torch.Generator().manual_seed(2))
    arguments = (layout, 2, format, EPS)
    exact = reference.encoder_layers(x.double(), wide(*weights), wide(*vectors), layout, 2, "fp32", EPS)
    eager = reference.encoder_layers(x, weights, vectors, *arguments)
    with instruction_set(isa):
        out = ops.encoder_layers(x, layers, layout, 2, EPS)
    assert_accurate(out, eager, exact)


@pytest.mark.parametrize("format", FORMATS)
def test_relative_bias(format: str) -> None:
    layers, weights, vectors = make(format, 1, 64, 96)
    layout = ops.SequenceLayout.bidirectional([3, 50])
    generator = torch.Generator().manual_seed(3)
    x, bias = torch.randn(53, 64, generator=generator), torch.randn(4, 21, generator=generator)
    at = torch.cat([torch.arange(3), torch.arange(50)]).int()
    out = ops.encoder_layers(x, layers, layout, 4, EPS, relative_bias=bias, position_ids=at)
    eager = reference.encoder_layers(x, weights, vectors, layout, 4, format, EPS, bias, at)
    exact = reference.encoder_layers(
        x.double(), wide(*weights), wide(*vectors), layout, 4, "fp32", EPS, bias.double(), at
    )
    assert_accurate(out, eager, exact)


@pytest.mark.parametrize("format", FORMATS)
def test_neighbours_and_threads_change_nothing(format: str) -> None:
    layers, _, _ = make(format, 2, 64, 128)
    lengths = [3, 128, 1, 250, 40, 40, 129]
    layout = ops.SequenceLayout.bidirectional(lengths)
    x = torch.randn(layout.total, 64, generator=torch.Generator().manual_seed(4))
    whole = ops.encoder_layers(x, layers, layout, 2, EPS)
    with threads(3):
        assert torch.equal(ops.encoder_layers(x, layers, layout, 2, EPS), whole)
    for part, expected in zip(x.split(lengths), whole.split(lengths), strict=True):
        alone = ops.SequenceLayout.bidirectional([len(part)])
        assert torch.equal(ops.encoder_layers(part, layers, alone, 2, EPS), expected)


def test_no_layers_and_no_tokens() -> None:
    layers, _, _ = make("bf16", 1, 64, 128)
    layout = ops.SequenceLayout.bidirectional([4])
    x = torch.randn(4, 64)
    assert torch.equal(ops.encoder_layers(x, [], layout, 2, EPS), x)
    empty = ops.SequenceLayout.bidirectional([])
    assert ops.encoder_layers(x[:0], layers, empty, 2, EPS).shape == (0, 64)


def test_wrong_arguments() -> None:
    layers, _, _ = make("bf16", 1, 64, 128)
    other, _, _ = make("fp32", 1, 64, 128)
    layout = ops.SequenceLayout.bidirectional([4])
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"x must be fp32 \[4, hidden\]"):
        ops.encoder_layers(x[:3], layers, layout, 2, EPS)
    with pytest.raises(ValueError, match="x must be fp32"):
        ops.encoder_layers(x.bfloat16(), layers, layout, 2, EPS)
    with pytest.raises(ValueError, match="packed in one format"):
        ops.encoder_layers(x, [*layers, *other], layout, 2, EPS)
    with pytest.raises(ValueError, match="all rows of the layout must ask"):
        ops.encoder_layers(x, layers, layout.with_queries([1]), 2, EPS)
    with pytest.raises(RuntimeError, match="cannot be shared among 5 heads"):
        ops.encoder_layers(x, layers, layout, 5, EPS)
    with pytest.raises(RuntimeError, match="bias must have the shape"):
        ops.encoder_layers(x, [replace(layers[0], output_bias=x[0, :3])], layout, 2, EPS)


def test_opcheck() -> None:
    layers, _, _ = make("bf16", 1, 64, 128)
    layout = ops.SequenceLayout.bidirectional([4, 3])
    arguments = (
        torch.randn(7, 64),
        [weight.data for weight in layers[0].weights()],
        layers[0].vectors(),
        layout.cu_seqlens,
        layout.segments,
        layout.max_seqlen,
        2,
        128,
        1,
        EPS,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.minilm_fast.encoder_layers.default, arguments)
