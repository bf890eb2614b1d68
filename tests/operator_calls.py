"""A call of every operator that has a kernel for GPUs, for ``torch.library.opcheck``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import beam_cases
import decode_steps
import torch
from decode_steps import Shape

from minilm_fast.ops import SequenceLayout

Call = tuple[str, list[Any]]
SEED = torch.tensor([12345])


def check_calls(calls: Iterable[Call]) -> None:
    """``opcheck`` of each call."""
    for name, arguments in calls:
        torch.library.opcheck(_operator(name).default, arguments)


def _operator(name: str) -> Any:
    return getattr(torch.ops.minilm_fast, name)


def training_calls(prefix: str, device: str) -> Iterator[Call]:
    """The operators of training with their backward passes; ``prefix`` is ``"triton_"`` or empty."""
    yield from _attention_calls(prefix, device)
    yield from _relation_calls(prefix, device)
    x, residual, upstream = torch.randn(3, 7, 40, device=device)
    weight, bias = torch.randn(2, 40, device=device)
    options = [0.25, SEED, bias]
    name = f"{prefix}dropout_add_layer_norm"
    arguments = [x, residual, weight, bias, 1e-5, *options]
    yield name, [*(_leaf(x) for x in arguments[:4]), *arguments[4:]]
    _, mean, rstd = _operator(name)(*arguments)
    yield f"{name}_backward", [upstream, x, residual, weight, mean, rstd, *options]
    yield f"{prefix}bias_gelu", [_leaf(x), _leaf(bias)]
    yield f"{prefix}bias_gelu_backward", [upstream, x, bias]
    vocabulary, labels = torch.randn(20, 40, device=device), torch.arange(7, device=device)
    name = f"{prefix}label_smoothed_cross_entropy"
    head = [x, vocabulary, torch.randn(20, device=device)]
    yield name, [*map(_leaf, head), labels, 0.1]
    _, lse = _operator(name)(*head, labels, 0.1)
    yield f"{name}_backward", [torch.randn(7, device=device), *head, labels, lse, 0.1, True, True, True]


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def _attention_calls(prefix: str, device: str) -> Iterator[Call]:
    layout = SequenceLayout.pseudo_masked([9, 4], [3, 2], device)
    sequences = [layout.cu_seqlens, layout.segments, None, layout.max_seqlen]
    positions = torch.arange(layout.total, dtype=torch.int32, device=device)
    bias = torch.randn(2, 9, device=device)
    projection = torch.randn(layout.total, 3, 2, 32, device=device)
    upstream = torch.randn(layout.total, 2, 32, device=device)
    options = [*sequences, 0.3, bias, positions, 0.2, SEED]
    parts = list(projection.unbind(1))
    yield f"{prefix}attention", [*map(_leaf, parts), *sequences, 0.3, _leaf(bias), positions, 0.2, SEED]
    results = _operator(f"{prefix}attention")(*parts, *options)
    yield f"{prefix}attention_backward", [upstream, *parts, *results, *options, True]
    name = f"{prefix}projected_attention"
    yield name, [_leaf(projection), None, *options]
    yield f"{name}_backward", [upstream, projection, None, *results, *options, False]


def _relation_calls(prefix: str, device: str) -> Iterator[Call]:
    layout = SequenceLayout.bidirectional([9, 4], device)
    teacher, student = torch.randn(13, 2, 16, device=device), torch.randn(13, 2, 8, device=device)
    options = [layout.cu_seqlens, layout.segments, layout.max_seqlen, 0.3, 0.4, "batch_mean"]
    name = f"{prefix}relation_kl"
    yield name, [teacher, None, _leaf(student), None, *options]
    _, *statistics = _operator(name)(teacher, None, student, None, *options)
    grad = torch.tensor(2.0, device=device)
    yield f"{name}_backward", [grad, teacher, None, student, None, *statistics, *options]


def decoding_calls(device: str) -> Iterator[Call]:
    """The operators of decoding."""
    arguments = decode_steps.arguments(Shape(lengths=(9, 16), steps=(3, 0), beams=2, source=16, history=4, bias=3))
    arguments["source_lengths"].clamp_(max=16)
    # The checker compares whole tensors, so none may hold NaN.
    for name in ("source_k", "source_v", "history_k", "history_v"):
        arguments[name].nan_to_num_()
    arguments["ancestry"].clamp_(min=0)
    for name in ("decode_attention", "decode_attention_early"):
        yield name, [_moved(x, device) for x in arguments.values()]
    counts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 7], [4, 2], [2, 0])]
    caches = [torch.zeros(3, 2, 32, 16), torch.zeros(3, 2, 16, 32), torch.zeros(3, dtype=torch.int32)]
    yield "store_source", [_moved(x, device) for x in (*torch.randn(2, 7, 2, 32), *counts, *caches)]
    x, weight, bias = torch.randn(5, 64), torch.randn(40, 64), torch.randn(40)
    packed = torch.ops.minilm_fast.pack_weight(weight, 0) if device == "cpu" else weight
    banned = torch.randint(-1, 40, (5, 3), dtype=torch.int32)
    head = [x, packed, bias, 40, 0, 4, banned, 3, torch.arange(5) % 2 == 0]
    yield "lm_head_topk", [_moved(x, device) for x in head]
    tokens, lengths = torch.randint(0, 4, (6, 12), dtype=torch.int32), torch.full((6,), 12, dtype=torch.int32)
    ignored = torch.tensor([1], dtype=torch.int32)
    yield "ban_repeated_ngrams", [_moved(x, device) for x in (tokens, lengths, 2, ignored)]
    step = beam_cases.arguments(beam_cases.BeamCase(rows=3, traced=True))
    yield "advance_beams", [_moved(x, device) for x in step.values()]
    yield from _step_calls(device)


def _step_calls(device: str) -> Iterator[Call]:
    rows, weight = torch.randn(5, 64), torch.randn(40, 64).bfloat16()
    bias, norm, residual = torch.randn(40), list(torch.randn(2, 64)), torch.randn(5, 40).bfloat16()
    yield "step_linear", [_moved(x, device) for x in (rows, weight, bias, residual, *norm, 1e-5, 1, True, False)]
    plain = [rows.bfloat16(), weight, None, None, None, None, 0.0, 0, False, False]
    yield "step_linear", [_moved(x, device) for x in plain]
    yield "step_norm", [_moved(x, device) for x in (rows, *norm, 1e-5, torch.bfloat16, False)]
    ids = torch.arange(4, dtype=torch.int32).view(2, 2)
    tables = [*torch.randn(2, 9, 64), torch.randn(2, 64), 1]
    embedding = [ids, 4, ids[0].contiguous(), ids[1].contiguous(), ids.view(-1), *tables, *norm, 1e-5, torch.bfloat16]
    yield "step_embedding", [_moved(x, device) for x in embedding]


def _moved(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, torch.Tensor) else x
