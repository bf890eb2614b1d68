"""The case of ``gpu.py`` for the linear layers and norms of a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_case import CHECKED, OURS, Case, Size, System, replayed

from minilm_fast import backend
from minilm_fast.modeling import few_rows
from minilm_fast.modeling.few_rows import FewRows
from minilm_fast.modeling.last_layer import LastLayer
from minilm_fast.modeling.model import Model
from minilm_fast.modeling.packed_encoder import PackedEncoder, PackedLayer, PackedLinear, PackedNorm, WeightReader
from minilm_fast.ops import kernels_can_overlap


def step_layers(size: Size) -> Iterator[Case]:
    """All layers of a step without their attention, whose result the queries stand for; a batch and one sentence.

    One kernel for each linear layer, and one for the last norm, beside the operators that prefill runs.
    """
    config = size.shape.config()
    count, heads = config.num_hidden_layers, config.num_attention_heads
    # On a CPU the weights stay plain matrices.
    with backend("reference" if size.device.type == "cpu" else None):
        state = Model.from_config(config).state
        reader = WeightReader(config, state, size.format, device=size.device, activation_dtype=size.dtype)
        encoder, last = PackedEncoder(reader, count - 1), LastLayer(reader, count - 1, whole=True)
        transform, norm = (
            reader.linear("cls.predictions.transform.dense"),
            reader.norm("cls.predictions.transform"),
        )
    assert last.projection is not None
    few = FewRows(encoder.embed, encoder.layers, last, transform, norm, config.hidden_act, heads)
    layers = [*encoder.layers, PackedLayer(last.projection, last.block)]

    def separate(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            q = layer.projection(x).view(x.shape[0], 3, heads, -1)[:, 0]
            x = layer.block(q, x)
        return x

    weights = [linear.weight.data.nbytes for layer in layers for linear in _linears(layer)]
    for batch in dict.fromkeys((size.batch, 1)):
        rows, hidden = 2 * size.beams * batch, config.hidden_size
        x = torch.randn(rows, hidden, device=size.device).to(size.dtype)

        def ours(x: torch.Tensor = x) -> list[torch.Tensor]:
            return [few.layers(x, 1, lambda layer, q, k, v, early: q)]

        def apart(x: torch.Tensor = x) -> list[torch.Tensor]:
            return [separate(x)]

        def first(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [found[0][:CHECKED]]

        # Of a row and layer: its projection, context, sums, inner rows and normalised rows, written and read.
        moved = rows * (4 * hidden + config.intermediate_size) * size.dtype.itemsize + rows * 2 * hidden * 4
        yield Case(
            f"layers of a step, {rows} rows",
            {
                OURS: System(lambda run=ours: replayed(run, size.device), first),
                **overlapping(size, lambda run=ours: replayed(run, size.device), first),
                "cuBLAS and Triton": System(lambda run=apart: replayed(run, size.device), first),
            },
            exact=lambda x=x: [_exact(layers, x[:CHECKED].double())],
            operations=sum(2.0 * rows * _elements(linear) for layer in layers for linear in _linears(layer)),
            bytes=float(sum(weights) + 2 * count * moved),
            units=4 * count + 1,
            unit="kernels",
        )


def overlapping(
    size: Size, make: Callable[[], Callable[[], Any]], result: Callable[[Any], Sequence[torch.Tensor]]
) -> dict[str, System]:
    """The system that ``make`` gives, the kernels of a step overlapping, where the device can."""
    if not kernels_can_overlap(size.device):
        return {}

    def overlapped(run: Callable[[], Any]) -> Any:
        before, few_rows.OVERLAP = few_rows.OVERLAP, True
        try:
            return run()
        finally:
            few_rows.OVERLAP = before

    def made() -> Callable[[], Any]:
        run = overlapped(make)
        return lambda: overlapped(run)

    return {f"{OURS}, kernels overlap": System(made, result)}


def _linears(layer: PackedLayer) -> list[PackedLinear]:
    block = layer.block
    return [layer.projection, block.attention_output, block.intermediate, block.output]


def _elements(linear: PackedLinear) -> int:
    return linear.weight.in_features * linear.weight.out_features


def _exact(layers: Sequence[PackedLayer], x: torch.Tensor) -> torch.Tensor:
    def product(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, linear.weight.data.double(), linear.bias.double())

    def normalised(norm: PackedNorm, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[1:], norm.weight.double(), norm.bias.double(), norm.eps)

    for layer in layers:
        block = layer.block
        q = product(layer.projection, x)[:, : x.shape[1]]
        x = normalised(block.attention_norm, product(block.attention_output, q) + x)
        inner = F.gelu(product(block.intermediate, x))
        x = normalised(block.output_norm, product(block.output, inner) + x)
    return x
