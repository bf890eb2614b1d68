"""The cases of ``gpu.py``: for each the systems that compute it, and what it takes at least.

A case gives functions without arguments that compute the same thing. A peer that cannot run (no kernel for the device,
a compiler that fails) is left out by ``gpu.py``, which prints why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from shapes import ModelShape

from minilm_fast import ops
from minilm_fast.ops import SequenceLayout

System = Callable[[], Any]


@dataclass
class Case:
    """Something to time.

    ``operations`` and ``bytes`` are what it takes at least; ``units`` (with their name) are what a rate is given of.
    """

    name: str
    systems: dict[str, System]
    operations: float = 0.0
    bytes: float = 0.0
    units: float = 0.0
    unit: str = ""
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """How large the cases are."""

    shape: ModelShape
    batch: int
    source: int
    target: int
    beams: int
    steps: int
    dtype: torch.dtype
    device: torch.device

    @property
    def head_size(self) -> int:
        return self.shape.hidden // self.shape.heads


def attention(size: Size) -> Iterator[Case]:
    """Source, target and pseudo tokens under the pseudo-masked mask; forward, then forward and backward."""
    b, s, t, h, d = size.batch, size.source, size.target, size.shape.heads, size.head_size
    length, scale = s + 2 * t, d**-0.5
    layout = SequenceLayout.pseudo_masked([s] * b, [t] * b, size.device)
    packed = torch.randn(b * length, 3, h, d, dtype=size.dtype, device=size.device)
    dense = SequenceLayout.pseudo_masked([s], [t], size.device).dense_mask()
    q, k, v = packed.view(b, length, 3, h, d).permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2) * scale).masked_fill(~dense, float("-inf")).softmax(-1) @ v

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    pseudo = dense[:, s + t :]

    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.bias import causal_lower_right

        first, second, third = q.split([s, t, t], dim=2)
        some_k, some_v = k[:, :, : s + t], v[:, :, : s + t]
        parts = [
            F.scaled_dot_product_attention(first, k[:, :, :s], v[:, :, :s]),
            F.scaled_dot_product_attention(second, some_k, some_v, attn_mask=causal_lower_right(t, s + t)),
            F.scaled_dot_product_attention(third, k, v, attn_mask=pseudo),
        ]
        return torch.cat(parts, dim=2)

    def flex() -> Callable[..., torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
            target = (row >= s) & (row < s + t) & (column <= row)
            masked = (row >= s + t) & ((column < row - t) | (column == row))
            return (column < s) | target | masked

        mask = create_block_mask(visible, None, None, length, length, device=size.device)
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    pairs = int(dense.sum()) * b
    rivals: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
        "eager": lambda: eager,
        "SDPA, dense mask": lambda: sdpa,
        "SDPA calls composed": lambda: composed,
        "FlexAttention": flex,
    }
    forward: dict[str, System] = {"ours": lambda: ops.attention(*packed.unbind(1), layout)[0]}
    both: dict[str, System] = {"ours": _ours_backward(packed, layout)}
    for name, make in rivals.items():
        forward[name] = _late(make, lambda f: lambda: f(q, k, v))
        both[name] = _late(make, lambda f: _backward(f, (q, k, v)))
    element = packed.element_size()
    yield Case("attention", forward, 4.0 * pairs * h * d, 4.0 * packed[:, 0].numel() * element)
    yield Case("attention, forward and backward", both, 14.0 * pairs * h * d, 8.0 * packed[:, 0].numel() * element)


def _late(make: Callable[[], Callable[..., Any]], bind: Callable[[Callable[..., Any]], System]) -> System:
    """A system that is built at its first call, so that one which cannot be is told apart from the others."""
    built: list[System] = []

    def run() -> Any:
        if not built:
            built.append(bind(make()))
        return built[0]()

    return run


def _backward(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> System:
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient: list[torch.Tensor] = []

    def run() -> Any:
        out = function(*leaves)
        if not gradient:
            # The systems lay their results out differently: only a constant is the same gradient for all.
            gradient.append(torch.ones_like(out))
        return torch.autograd.grad(out, leaves, gradient[0])

    return run


def _ours_backward(packed: torch.Tensor, layout: SequenceLayout) -> System:
    leaf = packed.detach().requires_grad_()
    gradient = torch.ones_like(packed[:, 0])

    def run() -> Any:
        return torch.autograd.grad(ops.projected_attention(leaf, layout)[0], leaf, gradient)

    return run


def relation_kl(size: Size) -> Iterator[Case]:
    """Three value relations, forward and backward; the teacher's heads are twice as wide."""
    b, s, h, ds = size.batch, size.source, size.shape.heads, size.head_size
    dt = 2 * ds
    layout = SequenceLayout.bidirectional([s] * b, size.device)
    teachers = [torch.randn(b * s, h, dt, dtype=size.dtype, device=size.device) for _ in range(3)]
    students = [torch.randn(b * s, h, ds, dtype=size.dtype, device=size.device) for _ in range(3)]

    def ours(*xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([ops.relation_kl(t, t, x, x, layout) for t, x in zip(teachers, xs, strict=True)]).sum()

    def one(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        p, q = (
            (x.view(-1, s, h, x.shape[-1]).transpose(1, 2).float() * x.shape[-1] ** -0.25) for x in (teacher, student)
        )
        log_p, log_q = ((x @ x.transpose(-1, -2)).log_softmax(-1) for x in (p, q))
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (b * h * s)

    def vectorised(*xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(t, x) for t, x in zip(teachers, xs, strict=True)]).sum()

    def loop(*xs: torch.Tensor) -> torch.Tensor:
        terms = []
        for t, x in zip(teachers, xs, strict=True):
            terms += [one(u, w) for u, w in zip(t.split(s), x.split(s), strict=True)]
        return torch.stack(terms).sum()

    inputs = tuple(students)
    makes: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
        "ours": lambda: ours,
        "eager": lambda: vectorised,
        "torch.compile": lambda: torch.compile(vectorised),
        "a loop over samples": lambda: loop,
    }
    systems = {name: _late(make, lambda f: _backward(f, inputs)) for name, make in makes.items()}
    # Two products forward, and as many again with the gradient's own backward.
    operations = 3.0 * b * h * s * s * 2 * (2 * (ds + dt) + 2 * ds)
    moved = 3.0 * b * s * h * (2 * dt + 3 * ds) * size.dtype.itemsize
    yield Case("relation_kl, three relations", systems, operations, moved)


def decode_attention(size: Size) -> Iterator[Case]:
    """One layer of a decoding step in the middle of an output."""
    from attention import Step, StepData

    torch.manual_seed(0)
    step = Step(size.batch, size.source, size.steps // 2, size.beams, 2, size.shape.heads, size.head_size)
    layers = size.shape.layers
    data = StepData(step, layers)
    calls = []
    for layer in range(layers):
        moved = [x.to(size.device) if isinstance(x, torch.Tensor) else x for x in data.arguments(layer, size.dtype)]
        moved[:3] = [x.to(size.dtype) for x in moved[:3]]
        calls.append(moved)

    def ours() -> None:
        for arguments in calls:
            ops.decode_attention(*arguments)

    yield Case(
        f"decode_attention, {layers} layers",
        {"ours": ours},
        layers * step.operations,
        layers * step.bytes(size.dtype.itemsize, data.entries),
        layers,
        "layers",
    )


def vocabulary(size: Size) -> Iterator[Case]:
    """The vocabulary projection with its best words, one row a hypothesis."""
    rows, hidden, words = size.batch * size.beams, size.shape.hidden, size.shape.vocab
    x = torch.randn(rows, hidden, dtype=size.dtype, device=size.device)
    weight = torch.randn(words, hidden, device=size.device)
    bias = torch.randn(words, device=size.device)
    format = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[size.dtype]
    packed, plain, plain_bias = ops.pack_weight(weight, format), weight.to(size.dtype), bias.to(size.dtype)
    yield Case(
        "lm_head_topk",
        {
            "ours": lambda: ops.lm_head_topk(x, packed, bias, size.beams),
            "product, log-softmax, top-k": lambda: torch.topk(
                F.linear(x, plain, plain_bias).float().log_softmax(-1), size.beams
            ),
        },
        2.0 * rows * hidden * words,
        float(plain.nbytes + x.nbytes),
    )


def decoding(size: Size) -> Iterator[Case]:
    """Whole outputs of a forced length, a batch and one sentence."""
    from minilm_fast.decoding.options import SearchOptions
    from minilm_fast.decoding.search import BeamSearch, SpecialIds
    from minilm_fast.modeling.inference import InferenceEngine
    from minilm_fast.modeling.model import Model

    shape = size.shape
    config = shape.config()
    format = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[size.dtype]
    engine = InferenceEngine(config, Model.from_config(config).state, format, size.device)
    for batch in dict.fromkeys((size.batch, 1)):
        options = SearchOptions(
            batch_size=batch,
            beam_size=size.beams,
            max_seq_length=shape.positions,
            max_tgt_length=size.steps,
            min_len=size.steps,
            forbid_duplicate_ngrams=True,
            early_exit=False,
        )
        sources = torch.randint(5, shape.vocab, (batch, size.source)).tolist()
        search = BeamSearch(engine, options, SpecialIds(sep=3, pad=0, mask=4))
        yield Case(
            f"decoding, batch {batch}",
            {"ours": lambda search=search, sources=sources: list(search.run(sources))},
            units=batch,
            unit="sequences",
        )


def training(size: Size) -> Iterator[Case]:
    """Forward and backward of sequence-to-sequence fine-tuning with pseudo masks."""
    from minilm_fast.modeling.encoder import Encoder

    shape, (b, s, t) = size.shape, (size.batch, size.source, size.target)
    config = shape.config(max_position_embeddings=max(shape.positions, s + 2 * t))
    encoder = Encoder(config).to(size.device).train()
    layout = SequenceLayout.pseudo_masked([s] * b, [t] * b, size.device)
    ids = torch.randint(5, shape.vocab, (layout.total,), device=size.device)
    positions = torch.cat([torch.arange(s + t), torch.arange(s, s + t)]).repeat(b).int().to(size.device)
    types = torch.zeros_like(positions)
    parameters = [p for p in encoder.parameters() if p.requires_grad]

    def ours() -> Any:
        with torch.autocast(size.device.type, size.dtype, enabled=size.dtype != torch.float32):
            hidden = encoder(ids, positions, layout, types)
        return torch.autograd.grad(hidden.float().square().mean(), parameters, allow_unused=True)

    yield Case("training, forward and backward of the encoder", {"ours": ours}, units=b, unit="sequences")


CASES: dict[str, Callable[[Size], Iterator[Case]]] = {
    "attention": attention,
    "relation_kl": relation_kl,
    "decode_attention": decode_attention,
    "vocabulary": vocabulary,
    "decoding": decoding,
    "training": training,
}
