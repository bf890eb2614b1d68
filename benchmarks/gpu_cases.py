"""The cases of ``gpu.py`` for the operators of training, and the list of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_case import CHECKED, OURS, Case, Goal, Size, System, differentiated
from gpu_decoding import bookkeeping, decode_attention, decoding, vocabulary
from gpu_step import step_layers
from gpu_training import training

import minilm_fast
from minilm_fast import ops
from minilm_fast.ops import SequenceLayout, _dispatch, _triton, reference

Function = Callable[..., torch.Tensor]
SHARES = (4, 8)


def attention(size: Size) -> Iterator[Case]:
    """Source, target and pseudo tokens under the pseudo-masked mask; forward, then forward and backward."""
    b, s, t, h, d = size.batch, size.source, size.target, size.shape.heads, size.head_size
    length = s + 2 * t
    layout = SequenceLayout.pseudo_masked([s] * b, [t] * b, size.device)
    packed = torch.randn(b * length, 3, h, d, dtype=size.dtype, device=size.device)
    dense = SequenceLayout.pseudo_masked([s], [t], size.device).dense_mask()
    # Of the others: [batch, heads, length, size].
    q, k, v = packed.view(b, length, 3, h, d).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    gradient = torch.randn_like(q)
    packed_gradient = gradient.transpose(1, 2).reshape(b * length, h, d)

    def first(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [x[:CHECKED] for x in tensors]

    def of_ours(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        out, *gradients = tensors
        parts = [out, *(part for x in gradients for part in x.unbind(1))]
        return first([x.view(b, length, h, d).transpose(1, 2) for x in parts])

    few = [x[:CHECKED].double() for x in (q, k, v)]
    eager = _eager_attention(dense)
    rivals = _attention_rivals(size, dense)
    forward = {OURS: System(lambda: lambda: ops.attention(*packed.unbind(1), layout)[0], lambda x: of_ours([x]))}
    if _dispatch.unusable("cuda", "attention", size.device) is None:
        forward[f"{OURS}, CUDA C++"] = System(
            lambda: lambda: _on("cuda", lambda: ops.attention(*packed.unbind(1), layout)[0]), lambda x: of_ours([x])
        )
    ours = differentiated(lambda x: ops.projected_attention(x, layout)[0], [packed], packed_gradient)
    both = {OURS: System(lambda: ours, of_ours)}
    if _dispatch.unusable("cuda", "attention", size.device, True) is None:
        both[f"{OURS}, CUDA C++"] = System(lambda: lambda: _on("cuda", ours), of_ours)
    for name, share in _shares("attention", size):
        forward[name] = System(
            lambda share=share: with_share(share, lambda: ops.attention(*packed.unbind(1), layout)[0]),
            lambda x: of_ours([x]),
        )
        both[name] = System(lambda share=share: with_share(share, ours), of_ours)
    for name, make in rivals.items():
        forward[name] = System(lambda make=make: _bound(make(), q, k, v), lambda x: first([x]))
        both[name] = System(lambda make=make: differentiated(make(), (q, k, v), gradient), first)
    pairs = int(dense.sum()) * b
    moved = packed[:, 0].nbytes
    yield Case(
        "attention",
        forward,
        exact=lambda: [eager(*few)],
        operations=4.0 * pairs * h * d,
        bytes=4.0 * moved,
        goals=[Goal("ms", 0.085)],
    )
    yield Case(
        "attention, forward and backward",
        both,
        exact=differentiated(eager, few, gradient[:CHECKED].double()),
        operations=14.0 * pairs * h * d,
        bytes=8.0 * moved,
        goals=[Goal("times", 1.3, "SDPA calls composed"), Goal("times", 1.5, "FlexAttention, compiled")],
    )
    yield _training_attention(size, layout, packed, packed_gradient)


def _training_attention(size: Size, layout: SequenceLayout, packed: torch.Tensor, gradient: torch.Tensor) -> Case:
    """The same with dropout and a relative bias that is trained; no peer drops the same probabilities."""
    tokens = layout.total // size.batch * min(size.batch, CHECKED)
    few = SequenceLayout(layout.cu_seqlens[: CHECKED + 1], layout.segments[:CHECKED], layout.max_seqlen, tokens)
    bias = torch.randn(size.shape.heads, 257, device=size.device)
    lengths = layout.segments.sum(1)
    positions = torch.cat([torch.arange(int(x), dtype=torch.int32) for x in lengths.tolist()]).to(size.device)
    options = {"dropout": 0.1, "seed": torch.tensor([1])}

    def ours(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.projected_attention(x, layout, relative_bias=bias, position_ids=positions, **options)[0]

    def exact(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scale = size.head_size**-0.5
        places = {"relative_bias": bias, "position_ids": positions[:tokens]}
        return reference.attention(*x.unbind(1), few, scale=scale, **places, **options)[0]

    # The gradient of the bias is that of all sequences.
    def first(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [x[:tokens] for x in found[:2]]

    run = differentiated(ours, [packed, bias], gradient)
    systems = {OURS: System(lambda: run, first)}
    if _dispatch.unusable("cuda", "attention", size.device, True) is None:
        systems[f"{OURS}, CUDA C++"] = System(lambda: lambda: _on("cuda", run), first)
    checked = differentiated(exact, [packed[:tokens].double(), bias.double()], gradient[:tokens].double())
    return Case("attention with dropout and bias, forward and backward", systems, exact=lambda: first(checked()))


def _bound(function: Function, *arguments: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: function(*arguments)


def _on(backend: str, run: Callable[[], Any]) -> Any:
    with minilm_fast.backend(backend):
        return run()


def _shares(operator: str, size: Size) -> Iterator[tuple[str, int]]:
    """Shares of the exponentials that a polynomial may compute, where Triton runs the operator, with a name each."""
    if size.device.type == "cuda" and size.dtype != torch.float32 and not _triton.unusable(operator, size.device):
        for share in SHARES:
            yield f"{OURS}, one exponential in {share} by a polynomial", share


def with_share(share: int, run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that runs another with one exponential in ``share`` by a polynomial in the Triton kernels."""
    module = _triton.kernels("exponential")

    def shared() -> Any:
        before = dict(module.ONE_IN)
        module.ONE_IN.update({(operator, size): share for operator in module.OPERATORS for size in module.SIZES})
        try:
            return run()
        finally:
            module.ONE_IN.clear()
            module.ONE_IN.update(before)

    return shared


def _eager_attention(dense: torch.Tensor) -> Function:
    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~dense, float("-inf"))
        return scores.softmax(-1) @ v

    return eager


def _attention_rivals(size: Size, dense: torch.Tensor) -> dict[str, Callable[[], Function]]:
    """Each builds a function of q, k and v ``[batch, heads, length, size]``; ``dense`` is the mask of a sequence."""
    s, t = size.source, size.target
    length = s + 2 * t
    additive = torch.zeros(size.batch, 1, length, length, dtype=size.dtype, device=size.device)
    additive.masked_fill_(~dense, -10000.0)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """FlashAttention for source and target rows; pseudo rows need a matrix."""
        from torch.nn.attention.bias import causal_lower_right

        first, second, third = q.split([s, t, t], dim=2)
        parts = [
            F.scaled_dot_product_attention(first, k[:, :, :s], v[:, :, :s]),
            F.scaled_dot_product_attention(
                second, k[:, :, : s + t], v[:, :, : s + t], attn_mask=causal_lower_right(t, s + t)
            ),
            F.scaled_dot_product_attention(third, k, v, attn_mask=dense[:, s + t :]),
        ]
        return torch.cat(parts, dim=2)

    def original(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The original's: one call a part over what it may see, an additive mask a sequence, matrices written."""
        parts, end = [], 0
        for count in (s, t, t):
            begin, end = end, end + count
            scores = q[:, :, begin:end] @ k[:, :, :end].transpose(-1, -2) * q.shape[-1] ** -0.5
            parts.append((scores + additive[:, :, begin:end, :end]).softmax(-1) @ v[:, :, :end])
        return torch.cat(parts, dim=2)

    def flex() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
            target = (row >= s) & (row < s + t) & (column <= row)
            pseudo = (row >= s + t) & ((column < row - t) | (column == row))
            return (column < s) | target | pseudo

        mask = create_block_mask(visible, None, None, length, length, device=str(size.device))
        compiled = size.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    return {
        "eager": lambda: _eager_attention(dense),
        "SDPA, dense mask": lambda: sdpa,
        "SDPA calls composed": lambda: composed,
        "FlexAttention, compiled": flex,
        "the original's algorithm": lambda: original,
    }


def relation_kl(size: Size) -> Iterator[Case]:
    """Three value relations, forward and backward; the teacher's heads are twice as wide.

    A sequence is as long as a source and a target together.
    """
    b, s, h, ds = size.batch, size.source + size.target, size.shape.heads, size.head_size
    dt = 2 * ds
    layout = SequenceLayout.bidirectional([s] * b, size.device)
    teachers = [torch.randn(b * s, h, dt, dtype=size.dtype, device=size.device) for _ in range(3)]
    students = [torch.randn(b * s, h, ds, dtype=size.dtype, device=size.device) for _ in range(3)]
    few = min(CHECKED, b)

    def ours(*xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([ops.relation_kl(t, t, x, x, layout) for t, x in zip(teachers, xs, strict=True)]).sum()

    def one(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        p, q = (x.view(-1, s, h, x.shape[-1]).transpose(1, 2) for x in (teacher, student))
        log_p, log_q = ((x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5) for x in (p, q))
        wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        log_p, log_q = (x.log_softmax(-1, dtype=wide) for x in (log_p, log_q))
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (b * h * s)

    def vectorised(*xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(t, x) for t, x in zip(teachers, xs, strict=True)]).sum()

    def loop(*xs: torch.Tensor) -> torch.Tensor:
        terms = []
        for t, x in zip(teachers, xs, strict=True):
            terms += [one(u, w) for u, w in zip(t.split(s), x.split(s), strict=True)]
        return torch.stack(terms).sum()

    def exact() -> list[torch.Tensor]:
        """The loss of all samples, and the gradients of the first ones."""
        with torch.no_grad():
            pairs = [(t.split(s), x.split(s)) for t, x in zip(teachers, students, strict=True)]
            terms = [one(u.double(), w.double()) for ts, xs in pairs for u, w in zip(ts, xs, strict=True)]
        wide = [x[: few * s].double() for x in (*teachers, *students)]
        run = differentiated(
            lambda *xs: torch.stack([one(t, x) for t, x in zip(wide[:3], xs, strict=True)]).sum(), wide[3:]
        )
        return [torch.stack(terms).sum(), *run()[1:]]

    def compared(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [results[0], *(x[: few * s] for x in results[1:])]

    makes: dict[str, Callable[[], Function]] = {
        OURS: lambda: ours,
        "eager, vectorised": lambda: vectorised,
        "torch.compile": lambda: size.compile(vectorised),
        "a loop over samples": lambda: loop,
    }
    systems = {
        name: System(lambda make=make: differentiated(make(), students), compared) for name, make in makes.items()
    }
    if _dispatch.unusable("cuda", "relation_kl", size.device, True) is None:
        run = differentiated(ours, students)
        systems[f"{OURS}, CUDA C++"] = System(lambda: lambda: _on("cuda", run), compared)
    for name, share in _shares("relation_kl", size):
        systems[name] = System(lambda share=share: with_share(share, differentiated(ours, students)), compared)
    yield Case(
        "relation_kl, three relations",
        systems,
        exact=exact,
        # Two products forward, and as many again with the gradient's own backward.
        operations=3.0 * b * h * s * s * 2 * (2 * (ds + dt) + 2 * ds),
        bytes=3.0 * b * s * h * (2 * dt + 3 * ds) * size.dtype.itemsize,
        goals=[
            Goal("ms", 1.3),
            Goal("times", 5, "torch.compile"),
            # One matrix of scores of one relation would take this much.
            Goal("peak MB", b * h * s * s * size.dtype.itemsize / 1e6),
        ],
    )


CASES: dict[str, Callable[[Size], Iterator[Case]]] = {
    "attention": attention,
    "relation_kl": relation_kl,
    "decode_attention": decode_attention,
    "step": step_layers,
    "vocabulary": vocabulary,
    "bookkeeping": bookkeeping,
    "decoding": decoding,
    "training": training,
}
