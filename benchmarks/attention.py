"""Speed of attention, of its backward pass, of a decoding step's attention and of the norm fusions against torch.

    python benchmarks/attention.py --shape l12-h384 --batch 32 --source 464 --threads 1,2 --json attention.json

Every system's result is compared with fp64 before it is timed; one that is wrong ends the run. Operations are those
that the mask leaves. The caches of the decoding step are those of all layers in turn, as a model uses them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from linear import best_of
from report import table
from shapes import SHAPES, ModelShape

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from minilm_fast.ops import SequenceLayout

OURS = ("fp32", "bf16")
READ_FLOATS = 64 << 20
RIVALS = ("SDPA padded", "SDPA each", "eager")
TRAINING_RIVALS = ("SDPA", "eager")
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}
NOTE = (
    "Best of interleaved rounds: CPU time of the thread with one thread, else the clock. In brackets: times as fast as "
    "the fastest of torch's in fp32, and of the peak, which is the best of torch's large square products in this run "
    "(bf16 peak for bf16). SDPA padded: scaled_dot_product_attention on sequences padded to the longest, with a dense "
    "mask. SDPA each: one call a sequence, unpadded. eager: product, softmax, product, padded. Decoding: the caches of "
    "torch's hold the source once for each beam (SDPA) or once for all (eager), the history gathered beforehand. "
    "Forward and backward: 14 operations for each pair that the mask leaves and dimension, 10 of them backward, where "
    "ours compute the scores again; torch's on padded sequences with a dense mask, without the time for padding; in "
    "brackets against the faster of torch's in the same dtype."
)


@dataclass
class Timing:
    """Seconds of each system at one case, with what the case takes at least: operations, and bytes from memory."""

    case: str
    threads: int
    operations: float
    bytes: float
    seconds: dict[str, float]


def layouts(batch: int, source: int) -> dict[str, SequenceLayout]:
    """The masks of the family: sources of one length and of mixed ones, alone and with targets."""
    import torch

    from minilm_fast.ops import SequenceLayout

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(max(1, source // 8), source + 1, (batch,), generator=generator).tolist()
    target = max(1, source // 10)
    return {
        f"bidirectional {source}": SequenceLayout.bidirectional([source] * batch),
        f"bidirectional {min(mixed)}-{max(mixed)}": SequenceLayout.bidirectional(mixed),
        f"causal {source}": SequenceLayout.causal([source] * batch),
        f"seq2seq {min(mixed)}-{max(mixed)} + {target}": SequenceLayout.seq2seq(mixed, [target] * batch),
        f"pseudo-masked {min(mixed)}-{max(mixed)} + {target}": SequenceLayout.pseudo_masked(mixed, [target] * batch),
    }


def attention_systems(
    layout: SequenceLayout, heads: int, size: int
) -> tuple[dict[str, Callable[[], torch.Tensor]], torch.Tensor]:
    """Ours and torch's ways to the same result ``[tokens, heads, size]``, and that result in fp64."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops
    from minilm_fast.ops import reference

    qkv = torch.randn(layout.total, 3, heads, size)
    lengths = layout.segments.sum(1).tolist()
    dense = layout.dense_mask()
    valid = torch.arange(layout.max_seqlen)[None] < torch.tensor(lengths)[:, None]
    # A row of pads must see something, or its softmax is NaN.
    mask = (dense | ~valid[:, :, None])[:, None]
    padded = torch.zeros(len(lengths), layout.max_seqlen, 3, heads, size)
    padded[valid] = qkv
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    everything = [bool(m[:n, :n].all()) for m, n in zip(dense, lengths, strict=True)]
    own_masks = [None if all_ else m[:n, :n] for all_, m, n in zip(everything, dense, lengths, strict=True)]

    def packed(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        parts = qkv.to(dtype).unbind(1)
        return lambda: ops.attention(*parts, layout)[0]

    def sdpa_padded() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def sdpa_each() -> torch.Tensor:
        parts = zip(qkv.permute(1, 2, 0, 3).split(lengths, dim=2), own_masks, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, attn_mask=own) for part, own in parts], dim=1)

    def eager() -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill_(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    systems = {"fp32": packed(torch.float32), "bf16": packed(torch.bfloat16)}
    systems |= {"SDPA padded": sdpa_padded, "SDPA each": sdpa_each, "eager": eager}
    exact, _ = reference.attention(*qkv.double().unbind(1), layout, scale=size**-0.5)
    for name, run in systems.items():
        result = run()
        if name in ("SDPA padded", "eager"):
            result = result.transpose(1, 2)[valid]
        check(name, result.transpose(0, 1) if name == "SDPA each" else result, exact)
    return systems, exact


def check(name: str, result: torch.Tensor, exact: torch.Tensor) -> None:
    error = (result.double() - exact).abs().max().item()
    if not error <= TOLERANCE["bf16" if "bf16" in name else "fp32"]:
        raise UserError(f"{name} is wrong by {error:.2g}: nothing is timed")


def measure_attention(case: str, layout: SequenceLayout, heads: int, size: int, rounds: int, threads: int) -> Timing:
    systems, exact = attention_systems(layout, heads, size)
    seconds = best_of({name: _discard(run) for name, run in systems.items()}, rounds, threads)
    pairs = int(layout.dense_mask().sum())
    return Timing(case, threads, 4.0 * pairs * heads * size, 4.0 * 4 * exact.numel(), seconds)


def _discard(run: Callable[[], Any]) -> Callable[[], None]:
    def discarding() -> None:
        run()

    return discarding


def training_layouts(batch: int, source: int) -> dict[str, SequenceLayout]:
    """Lengths as in question generation (log-normal sources, of a third of the longest; short targets), and full."""
    import torch

    from minilm_fast.ops import SequenceLayout

    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(batch, generator=generator) * 0.5).exp() * source * 0.31
    mixed = lengths.round().clamp(1, source).int().tolist()
    question, target = max(1, source * 16 // 464), max(1, source * 48 // 464)
    return {
        f"seq2seq {min(mixed)}-{max(mixed)} + {question}": SequenceLayout.seq2seq(mixed, [question] * batch),
        f"pseudo-masked {source} + {target} + {target}": SequenceLayout.pseudo_masked(
            [source] * batch, [target] * batch
        ),
    }


def training_systems(
    layout: SequenceLayout, heads: int, size: int, dropout: float
) -> dict[str, Callable[[], torch.Tensor]]:
    """Ours and torch's forward and backward passes, to the gradient ``[tokens, 3, heads, size]``."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops
    from minilm_fast.ops import reference

    qkv, grad = torch.randn(layout.total, 3, heads, size), torch.randn(layout.total, heads, size)
    valid = torch.arange(layout.max_seqlen)[None] < layout.segments.sum(1)[:, None]
    mask = (layout.dense_mask() | ~valid[:, :, None])[:, None]
    seed = torch.tensor([1])

    def pad(x: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(*valid.shape, *x.shape[1:], dtype=x.dtype)
        padded[valid] = x
        return padded.transpose(-2, -3).contiguous() if x.dim() == 3 else padded.permute(2, 0, 3, 1, 4).contiguous()

    def ours(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        leaf, gradient = qkv.to(dtype).requires_grad_(), grad.to(dtype)

        def run() -> torch.Tensor:
            out, _ = ops.projected_attention(leaf, layout, dropout=dropout, seed=seed)
            return torch.autograd.grad(out, leaf, gradient)[0]

        return run

    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout) @ v

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    def rival(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        leaves = [x.requires_grad_() for x in pad(qkv.to(dtype)).unbind(0)]
        gradient = pad(grad.to(dtype))

        def run() -> torch.Tensor:
            return torch.stack(torch.autograd.grad(attend(*leaves), leaves, gradient))

        return run

    systems = {}
    exact = qkv.double().requires_grad_()
    out, _ = reference.attention(*exact.unbind(1), layout, scale=size**-0.5, dropout=dropout, seed=seed)
    (right,) = torch.autograd.grad(out, exact, grad.double())
    largest = right.abs().max()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        systems[name] = ours(dtype)
        check(name, systems[name]().double() / largest, right / largest)
        for rival_name, attend in zip(TRAINING_RIVALS, (fused, composed), strict=True):
            run = systems[f"{rival_name} {name}"] = rival(attend, dtype)
            if dropout == 0:
                gradient = run().permute(1, 3, 0, 2, 4)[valid]
                check(f"{rival_name} {name}", gradient.double() / largest, right / largest)
    return systems


def measure_training(
    case: str, layout: SequenceLayout, heads: int, size: int, dropout: float, rounds: int, threads: int
) -> Timing:
    systems = training_systems(layout, heads, size, dropout)
    seconds = best_of({name: _discard(run) for name, run in systems.items()}, rounds, threads)
    pairs = int(layout.dense_mask().sum())
    case = f"{case}, dropout {dropout:g}"
    return Timing(case, threads, 14.0 * pairs * heads * size, 4.0 * 8 * layout.total * heads * size, seconds)


@dataclass(frozen=True)
class Step:
    """One decoding step in the middle of an output: ``examples`` of ``source`` tokens, ``step`` entries of history."""

    examples: int
    source: int
    step: int
    beams: int
    rows: int
    heads: int
    size: int

    @property
    def capacity(self) -> int:
        return -(-self.source // 16) * 16

    @property
    def operations(self) -> float:
        """Row 0 of a hypothesis sees source, history and itself, row 1 one key more."""
        keys = self.rows * (self.source + self.step + 1) + (self.rows - 1)
        return 4.0 * self.examples * self.beams * keys * self.heads * self.size

    def bytes(self, element: int, entries: int) -> float:
        """Source and the different history entries, keys and values, read once."""
        return 2.0 * element * self.heads * self.size * (self.examples * self.source + entries)


class StepData:
    """Caches of some layers, and a history in which the beams descend from two in the older half."""

    def __init__(self, step: Step, layers: int) -> None:
        import torch

        e, b, h, d = step.examples, step.beams, step.heads, step.size
        self.step, self.layers = step, layers
        self.source_k = torch.randn(layers, e, h, d, step.capacity)
        self.source_v = torch.randn(layers, e, h, step.capacity, d)
        self.history_k, self.history_v = torch.randn(2, layers, e, step.step + 1, b, h, d).unbind()
        self.lengths = torch.full((e,), step.source, dtype=torch.int32)
        self.slots = torch.arange(e, dtype=torch.int32)
        self.steps = torch.full((e,), step.step, dtype=torch.int32)
        old = step.step // 2
        ancestry = torch.zeros(e, b, step.step + 1, dtype=torch.int32)
        ancestry[:, :, :old] = torch.randint(0, min(2, b), (e, b, old))
        ancestry[:, :, old:] = torch.randint(0, b, (e, b, step.step + 1 - old))
        self.ancestry = ancestry
        self.q, self.k, self.v = torch.randn(e * b * step.rows, 3, h, d).unbind(1)
        self.entries = sum(len(set(a.tolist())) for a in ancestry[:, :, : step.step].permute(0, 2, 1).flatten(0, 1))

    def arguments(self, layer: int, dtype: torch.dtype) -> list[Any]:
        caches = [c[layer].to(dtype) for c in (self.source_k, self.source_v, self.history_k, self.history_v)]
        tail = [self.ancestry, self.slots, self.steps, self.step.rows, self.step.size**-0.5]
        return [self.q, self.k, self.v, *caches[:2], self.lengths, *caches[2:], *tail]

    def histories(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """History of each hypothesis and this step's rows, gathered: ``[E, B, H, keys, D]``."""
        import torch

        step, (e, b) = self.step, self.ancestry.shape[:2]
        past = self.ancestry[:, :, : step.step].long()
        example, time = torch.arange(e)[:, None, None], torch.arange(step.step)[None, None]
        found = []
        for cache, own in ((self.history_k, self.k), (self.history_v, self.v)):
            rows = own.reshape(e, b, step.rows, step.heads, step.size)
            found.append(torch.cat([cache[layer][example, time, past], rows], dim=2).transpose(2, 3))
        return found[0], found[1]


def step_systems(data: StepData) -> dict[str, Callable[[], Any]]:
    """Ours and torch's ways to do one step for all layers; checked on the first of them."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    step, layers = data.step, range(data.layers)
    e, b, r, h, d = step.examples, step.beams, step.rows, step.heads, step.size
    queries = data.q.reshape(e, b, r, h, d).transpose(2, 3)
    shared = data.q.reshape(e, b * r, h, d).transpose(1, 2)
    mask = torch.ones(r, step.source + step.step + r, dtype=torch.bool)
    mask[0, step.source + step.step + 1 :] = False

    def ours(dtype: torch.dtype) -> Callable[[], Any]:
        arguments = [data.arguments(layer, dtype) for layer in layers]

        def run() -> Any:
            results = [ops.decode_attention(*a) for a in arguments]
            return results[0]

        return run

    tails = [data.histories(layer) for layer in layers]
    keys = data.source_k[..., : step.source].transpose(-1, -2)
    values = data.source_v[..., : step.source, :]
    copied = [
        [
            torch.cat([source[layer][:, None].expand(-1, b, -1, -1, -1), tail], dim=3).flatten(0, 1)
            for source, tail in zip((keys, values), tails[layer], strict=True)
        ]
        for layer in layers
    ]

    def sdpa() -> Any:
        results = [F.scaled_dot_product_attention(queries.flatten(0, 1), *kv, attn_mask=mask) for kv in copied]
        return results[0].view(e, b, h, r, d).transpose(2, 3).reshape(-1, h, d)

    def eager() -> Any:
        results = []
        for layer in layers:
            tail_k, tail_v = tails[layer]
            old = (shared @ data.source_k[layer][..., : step.source]).view(e, h, b, r, -1).permute(0, 2, 1, 3, 4)
            new = queries @ tail_k.transpose(-1, -2)
            scores = torch.cat([old, new], dim=-1).mul_(d**-0.5).masked_fill_(~mask, float("-inf"))
            weights = scores.softmax(-1)
            first, second = weights.split([step.source, step.step + r], dim=-1)
            out = first.transpose(1, 2).reshape(e, h, b * r, -1) @ values[layer]
            results.append(out.view(e, h, b, r, d).transpose(1, 2) + second @ tail_v)
        return results[0].transpose(2, 3).reshape(-1, h, d)

    systems = {"fp32": ours(torch.float32), "bf16 caches": ours(torch.bfloat16), "SDPA": sdpa, "eager": eager}
    _check_step(data, systems)
    return systems


def _check_step(data: StepData, systems: dict[str, Callable[[], Any]]) -> None:
    import torch

    from minilm_fast.ops import reference

    arguments = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in data.arguments(0, torch.float32)
    ]
    exact = reference.decode_attention(*arguments)
    for name, run in systems.items():
        check(name, run(), exact)


def measure_step(step: Step, layers: int, rounds: int, threads: int) -> list[Timing]:
    data = StepData(step, layers)
    seconds = best_of(step_systems(data), rounds, threads)
    per_layer = {name: s / layers for name, s in seconds.items()}
    case = f"E {step.examples}, B {step.beams}, R {step.rows}, source {step.source}, step {step.step}, D {step.size}"
    return [
        Timing(case, threads, step.operations, step.bytes(element, data.entries), {ours: per_layer[ours]} | rivals)
        for rivals in [{name: per_layer[name] for name in ("SDPA", "eager")}]
        for ours, element in (("fp32", 4), ("bf16 caches", 2))
    ]


def measure_rows(shape: ModelShape, rows: int, rounds: int, threads: int) -> list[Timing]:
    """The fusions that do little but read and write: one layer's rows, in fp32."""
    import torch
    import torch.nn.functional as F

    from minilm_fast import ops

    c, f = shape.hidden, shape.intermediate
    x, residual, wide = torch.randn(rows, c), torch.randn(rows, c), torch.randn(rows, f)
    weight, bias, wide_bias = torch.randn(c), torch.randn(c), torch.randn(f)
    word, position = torch.randn(shape.vocab, c), torch.randn(shape.positions, c)
    ids = torch.randint(0, shape.vocab, (rows,), dtype=torch.int32)
    places = torch.arange(rows, dtype=torch.int32) % shape.positions
    cases: dict[str, tuple[float, Callable[[], Any], Callable[[], Any]]] = {
        f"add_layer_norm {rows} x {c}": (
            3.0 * x.nbytes,
            lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-12),
            lambda: F.layer_norm(x + residual, (c,), weight, bias, 1e-12),
        ),
        f"bias_gelu {rows} x {f}": (
            2.0 * wide.nbytes,
            lambda: ops.bias_gelu(wide, wide_bias),
            lambda: F.gelu(wide + wide_bias),
        ),
        f"embed_layer_norm {rows} x {c}": (
            3.0 * x.nbytes,
            lambda: ops.embed_layer_norm(ids, places, None, word, position, None, weight, bias, 1e-12),
            lambda: F.layer_norm(F.embedding(ids, word) + F.embedding(places, position), (c,), weight, bias, 1e-12),
        ),
    }
    timings = []
    for case, (size, ours, eager) in cases.items():
        check(case, ours(), eager().double())
        seconds = best_of({"fp32": _discard(ours), "eager": _discard(eager)}, rounds, threads)
        timings.append(Timing(case, threads, 0.0, size, seconds))
    return timings


def measure_bandwidth(threads: int) -> float:
    """Bytes per second of reading a tensor that no cache holds."""
    import torch

    memory = torch.ones(READ_FLOATS)
    seconds = best_of({"sum": _discard(lambda: memory.sum())}, 5, threads)
    return memory.nbytes / seconds["sum"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    shape = SHAPES[options.shape]
    heads, size = shape.heads, shape.hidden // shape.heads
    results: dict[str, Any] = {"machine": machine.describe(), "peak": {}, "bandwidth": {}}
    results |= {"attention": [], "training": [], "step": [], "rows": []}
    for threads in options.threads:
        rates = machine.measure_peak(threads)
        results["peak"][threads] = {n: p["cpu" if threads == 1 else "wall"] for n, p in rates.items()}
        results["bandwidth"][threads] = measure_bandwidth(threads)
        for case, layout in training_layouts(options.batch, options.source).items():
            for dropout in (0.0, options.dropout):
                print(f"{threads} threads: training, {case}, dropout {dropout:g}", file=sys.stderr)
                timing = measure_training(case, layout, heads, size, dropout, options.rounds, threads)
                results["training"].append(timing)
    if options.training_only:
        return results
    with torch.inference_mode():
        for threads in options.threads:
            for case, layout in layouts(options.batch, options.source).items():
                print(f"{threads} threads: {case}", file=sys.stderr)
                timing = measure_attention(case, layout, heads, size, options.rounds, threads)
                results["attention"].append(timing)
            for examples in sorted({1, options.batch}):
                step = Step(examples, options.source, options.step, options.beam, 2, heads, size)
                print(f"{threads} threads: step of {examples} examples", file=sys.stderr)
                results["step"] += measure_step(step, options.layers, options.rounds, threads)
            results["rows"] += measure_rows(shape, options.batch * options.beam * 2, options.rounds, threads)
    return results


def report(results: dict[str, Any]) -> str:
    parts = []
    for threads, peak in results["peak"].items():
        read = results["bandwidth"][threads]
        plural = "s" if threads > 1 else ""
        parts.append(
            f"{threads} thread{plural}; peak of torch's products, Gop/s: fp32 {peak['fp32'] / 1e9:.0f}, bf16 "
            f"{peak['bf16'] / 1e9:.0f}; memory is read at {read / 1e9:.1f} GB/s"
        )
        chosen = [t for t in results["attention"] if t.threads == threads]
        if chosen:
            parts.append(table(["attention, Gop/s", *RIVALS, *OURS], [_attention_row(t, peak) for t in chosen]))
        chosen = [t for t in results["training"] if t.threads == threads]
        header = ["forward and backward, Gop/s", *(f"{r} {n}" for n in OURS for r in TRAINING_RIVALS), *OURS]
        parts.append(table(header, [_training_row(t, peak) for t in chosen]))
        header = ["decode_attention, one layer", "cache", "SDPA ms", "eager ms", "ms", "Gop/s", "GB/s", "of reading"]
        chosen = [t for t in results["step"] if t.threads == threads]
        if chosen:
            parts.append(table(header, [_step_row(t, peak, read) for t in chosen]))
        header = ["fusions, fp32", "eager us", "us", "GB/s"]
        chosen = [t for t in results["rows"] if t.threads == threads]
        if chosen:
            parts.append(table(header, [_fusion_row(t) for t in chosen]))
    return "\n\n".join([*parts, NOTE])


def _attention_row(timing: Timing, peak: dict[str, float]) -> list[str]:
    rates = {name: timing.operations / seconds for name, seconds in timing.seconds.items()}
    rival = max(rates[name] for name in RIVALS)
    ours = [f"{rates[n] / 1e9:.0f} ({rates[n] / rival:.2f}x, {rates[n] / peak[n]:.0%})" for n in OURS]
    return [timing.case, *(f"{rates[name] / 1e9:.0f}" for name in RIVALS), *ours]


def _training_row(timing: Timing, peak: dict[str, float]) -> list[str]:
    rates = {name: timing.operations / seconds for name, seconds in timing.seconds.items()}
    cells = [f"{rates[f'{rival} {name}'] / 1e9:.0f}" for name in OURS for rival in TRAINING_RIVALS]
    for name in OURS:
        rival = max(rates[f"{rival} {name}"] for rival in TRAINING_RIVALS)
        cells.append(f"{rates[name] / 1e9:.0f} ({rates[name] / rival:.2f}x, {rates[name] / peak[name]:.0%})")
    return [timing.case, *cells]


def _step_row(timing: Timing, peak: dict[str, float], read: float) -> list[str]:
    (name,) = timing.seconds.keys() - {"SDPA", "eager"}
    seconds, sdpa, eager = timing.seconds[name], timing.seconds["SDPA"], timing.seconds["eager"]
    rate, speed = timing.operations / seconds, timing.bytes / seconds
    return [
        timing.case,
        name.split()[0],
        f"{1e3 * sdpa:.2f}",
        f"{1e3 * eager:.2f}",
        f"{1e3 * seconds:.2f} ({min(sdpa, eager) / seconds:.2f}x)",
        f"{rate / 1e9:.0f} ({rate / peak['fp32']:.0%})",
        f"{speed / 1e9:.1f}",
        f"{speed / read:.0%}",
    ]


def _fusion_row(timing: Timing) -> list[str]:
    ours, eager = timing.seconds["fp32"], timing.seconds["eager"]
    return [
        timing.case,
        f"{1e6 * eager:.0f}",
        f"{1e6 * ours:.0f} ({eager / ours:.2f}x)",
        f"{timing.bytes / ours / 1e9:.1f}",
    ]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of whole numbers: {text!r}") from None
    if not numbers or any(n < 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"must be at least 1: {text!r}")
    return numbers


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="l12-h384", help="heads, widths and vocabulary")
    parser.add_argument("--batch", type=int, default=32, help="sequences, and examples of a step")
    parser.add_argument("--source", type=int, default=464, help="tokens of a source")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--step", type=int, default=24, help="history entries at the measured step")
    parser.add_argument("--layers", type=int, default=6, help="layers whose caches are used in turn")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the probabilities in training, beside 0")
    parser.add_argument("--training-only", action="store_true", help="forward and backward passes, nothing else")
    parser.add_argument("--threads", type=_numbers, default=[1], help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", help="lower the instruction set of minilm_fast (default, avx2, avx512, avx512vnni)")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args(arguments)
    for name in ("batch", "source", "beam", "step", "layers", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= options.dropout < 1:
        parser.error("--dropout must be at least 0 and below 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        import torch  # noqa: F401 (its libraries are the extension's)

        from minilm_fast import _C

        if options.isa is not None:
            _C.set_isa(options.isa)
        results = measure(options)
    except (ImportError, ValueError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(results))
    if options.json is not None:
        results |= {key: [asdict(t) for t in results[key]] for key in ("attention", "training", "step", "rows")}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
