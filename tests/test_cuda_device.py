"""The CUDA kernels on a GPU, against the same specifications as emulated, and what is around them.

Without a GPU the latter runs on the simulated one; so does the rest with MINILM_FAST_SLOW_TESTS=1, but for what
simulates tensors itself.
"""

from __future__ import annotations

from typing import Any

import attention_cases
import beam_cases
import decode_steps
import pytest
import relation_cases
import step_cases
import test_compile
import torch
from decode_steps import Shape
from kernel_checks import ON_GPU, assert_accurate, needs_gpu, slow_simulated
from operator_calls import check_calls, decoding_calls, training_calls
from test_cuda_few_rows import after_prefill
from test_pooled_search import SPECIAL, random_sources, small_model

from minilm_fast import backend, ops
from minilm_fast.decoding import pool
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.search import BeamSearch
from minilm_fast.errors import NotEnoughMemory
from minilm_fast.modeling import few_rows
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.ops import reference

pytestmark = ON_GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest errors of gradients: in 560 draws of one case they were up to 2.9 times eager's.
WORST_GRADIENT = 3.0


def _to_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def _attention(case: attention_cases.Batch) -> None:
    options = {"position_ids": case.position_ids, "scale": case.scale}
    options |= {"dropout": case.dropout, "seed": attention_cases.SEED}
    grad = case.gradient()

    def run() -> list[torch.Tensor]:
        inputs = [*case.operands, *([] if case.relative_bias is None else [case.relative_bias])]
        leaves = [x.detach().requires_grad_() for x in inputs]
        bias = leaves[3] if len(leaves) > 3 else None
        with backend("cuda"):
            out, lse = ops.attention(*leaves[:3], case.layout, relative_bias=bias, **options)
            return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)]

    ours, again = run(), run()
    assert all(map(torch.equal, ours, again))
    case.check(*ours[:2])
    case.check_gradients(grad, *ours[2:], worst=WORST_GRADIENT)


@slow_simulated
@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
@pytest.mark.parametrize("counts", attention_cases.COUNTS.values(), ids=attention_cases.COUNTS.keys())
def test_attention_masks(counts: tuple[list[int], ...], dtype: torch.dtype) -> None:
    _attention(attention_cases.batch(ops.SequenceLayout.from_counts(*counts), 32, dtype, device="cuda"))


@slow_simulated
@pytest.mark.parametrize("size", [32, 64, 128])
def test_attention_small(size: int) -> None:
    """For compute-sanitizer."""
    layout = ops.SequenceLayout.from_counts([70, 0, 1], [21, 5, 0], [21, 5, 0])
    for bias, dropout in ((None, 0.0), (9, 0.0), (None, 0.1), (9, 0.1)):
        case = attention_cases.batch(layout, size, torch.float16, bias=bias, dropout=dropout, device="cuda")
        arguments, grad = case.arguments(), case.gradient()
        results = torch.ops.minilm_fast.attention(*arguments)
        case.check(*results)
        wanted = bias is not None
        found = torch.ops.minilm_fast.attention_backward(grad, *arguments[:3], *results, *arguments[3:], wanted)
        case.check_gradients(grad, *found[: 4 if wanted else 3], worst=WORST_GRADIENT)


@slow_simulated
@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bias", [None, 9])
def test_attention_head_sizes(size: int, dtype: torch.dtype, bias: int | None) -> None:
    layout = ops.SequenceLayout.from_counts([464, 1, 70], [48, 0, 21], [48, 0, 21])
    _attention(attention_cases.batch(layout, size, dtype, bias=bias, device="cuda"))
    few = layout.with_queries([96, 1, 30])
    _attention(attention_cases.batch(few, size, dtype, bias=bias, device="cuda"))
    _attention(attention_cases.batch(few, size, dtype, bias=bias, dropout=0.1, device="cuda"))


def _relation(case: relation_cases.Relation) -> None:
    """Through autograd."""

    def run() -> tuple[torch.Tensor, ...]:
        sa, sb = case.operands[2:]
        a = sa.detach().requires_grad_()
        b = a if sb is sa else sb.detach().requires_grad_()
        with backend("cuda"):
            loss, *lse = torch.ops.minilm_fast.relation_kl(*case.with_student(a, b))
            upstream = torch.tensor(relation_cases.UPSTREAM, device="cuda")
            gradients = torch.autograd.grad(loss, [a] if b is a else [a, b], upstream)
        return loss.detach(), *lse, *gradients

    found = run()
    assert all(map(torch.equal, run(), found))
    case.check(found)


@slow_simulated
@pytest.mark.parametrize("kind", relation_cases.KINDS)
@pytest.mark.parametrize("counts", relation_cases.COUNTS.values(), ids=relation_cases.COUNTS.keys())
def test_relation_kl_masks(counts: tuple[list[int], ...], kind: str) -> None:
    layout = ops.SequenceLayout.from_counts(*counts)
    _relation(relation_cases.relation(layout, (64, 32), torch.bfloat16, kind, device="cuda"))


@slow_simulated
@pytest.mark.parametrize("dtype", relation_cases.DTYPES)
@pytest.mark.parametrize("sizes", [(16, 8), (32, 32), (64, 32), (64, 64), (128, 48)])
def test_relation_kl_small(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    layout = ops.SequenceLayout.bidirectional([70, 0, 150])
    for kind in relation_cases.KINDS:
        _relation(relation_cases.relation(layout, sizes, dtype, kind, device="cuda"))


def test_relation_kl_through_the_function() -> None:
    """Chosen by its backend, the same bits as the operator's."""
    layout = ops.SequenceLayout.bidirectional([512, 40])
    case = relation_cases.relation(layout, (64, 32), torch.bfloat16, "symmetric", device="cuda")
    teacher, student = case.operands[0], case.operands[2]
    with backend("cuda"):
        loss = ops.relation_kl(teacher, teacher, student, student, case.layout)
    assert torch.equal(loss, torch.ops.minilm_fast.relation_kl(*case.arguments())[0])


@needs_gpu
@pytest.mark.parametrize("kind", relation_cases.KINDS)
def test_operators_of_relation_kl(kind: str) -> None:
    case = relation_cases.relation(
        ops.SequenceLayout.pseudo_masked([5, 2], [3, 1]), (16, 8), torch.float16, kind, device="cuda"
    )
    arguments = case.arguments()
    _, *lse = torch.ops.minilm_fast.relation_kl(*arguments)
    grad = torch.tensor(2.0, device="cuda")
    check_calls([("relation_kl", arguments), ("relation_kl_backward", [grad, *arguments[:4], *lse, *arguments[4:]])])


@slow_simulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(lengths=(0, 17, 40, 1), bias=5),
        Shape(lengths=(0, 90, 40, 1), source=96, size=64, rows=1),
        Shape(lengths=(700, 64), steps=(210, 99), beams=9, source=704, history=211, size=128, bias=900),
    ],
    ids=["small", "middle", "large"],
)
def test_decode_attention(dtype: torch.dtype, shape: Shape) -> None:
    arguments = decode_steps.arguments(shape, dtype, dtype)
    mine, theirs = _to_device(arguments), decode_steps.copy(arguments)
    with backend("cuda"):
        out = ops.decode_attention(**mine)
    eager = reference.decode_attention(**theirs)
    exact = reference.decode_attention(**decode_steps.copy(arguments, torch.float64))
    assert_accurate(out.cpu(), eager, exact)
    for name in ("history_k", "history_v", "source_k", "source_v"):
        assert torch.equal(decode_steps.bits(mine[name].cpu()), decode_steps.bits(theirs[name]))
    with backend("cuda"):
        assert torch.equal(out, ops.decode_attention(**_to_device(arguments)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_source_small(dtype: torch.dtype) -> None:
    integers = [torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 20, 155], [18, 0, 133], [2, 0, 3])]
    k, v = torch.randn(155, 2, 3, 32).to(dtype).unbind(1)
    theirs = [torch.zeros(4, 3, 32, 144, dtype=dtype), torch.zeros(4, 3, 144, 32, dtype=dtype)]
    theirs.append(torch.zeros(4, dtype=torch.int32))
    mine = [x.cuda() for x in theirs]
    with backend("cuda"):
        ops.store_source(k.cuda(), v.cuda(), *(x.cuda() for x in integers), *mine)
    reference.store_source(k, v, *integers, *theirs)
    assert all(torch.equal(ours.cpu(), expected) for ours, expected in zip(mine, theirs, strict=True))


@slow_simulated
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 300), (160, 30522)], ids=["small", "large"])
def test_lm_head_topk(format: str, rows: int, vocabulary: int) -> None:
    x, weight, bias = torch.randn(rows, 384), torch.randn(vocabulary, 384) * 0.05, torch.randn(vocabulary)
    banned = torch.randint(-1, vocabulary, (rows, 9), dtype=torch.int32)
    suppress = torch.arange(rows) % 2 == 0
    x = x.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[format])
    with backend("cuda"):
        packed = ops.pack_weight(weight.cuda(), format)
        values, ids = ops.lm_head_topk(
            x.cuda(), packed, bias.cuda(), 5, banned=banned.cuda(), suppress_id=3, suppress=suppress.cuda()
        )
    exact, order = reference.lm_head_topk(
        *(x.double(), packed.data.cpu().double(), bias.double(), "fp32", vocabulary, banned, 3, suppress)
    )
    scores = torch.empty_like(exact).scatter_(1, order.long(), exact)
    torch.testing.assert_close(values.cpu().double(), exact[:, :5], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values.cpu().double(), scores.gather(1, ids.cpu().long()), rtol=1e-5, atol=1e-4)


@slow_simulated
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "features", "outputs"),
    [(1, 8, 8), (10, 384, 1536), (33, 1024, 648), (160, 384, 384), (320, 384, 1152), (320, 1024, 1024)],
    ids=["small-1", "small-2", "odd", "middle", "large", "wide"],
)
def test_step_linear(rows: int, features: int, outputs: int, norm: bool, dtype: torch.dtype) -> None:
    case = step_cases.linear(rows, features, outputs, dtype, norm=norm, residual=not norm, gelu=norm, wide=not norm)
    arguments = _to_device(case).values()
    out, normal = torch.ops.minilm_fast.step_linear(*arguments)
    step_cases.check_linear(case, out.cpu(), normal.cpu())
    again = torch.ops.minilm_fast.step_linear(*arguments)
    assert torch.equal(out, again[0]) and torch.equal(normal, again[1])


@slow_simulated
def test_step_linear_many_features() -> None:
    case = step_cases.linear(320, 4096, 1024, torch.bfloat16, norm=False, residual=True, gelu=False, wide=True)
    out, normal = torch.ops.minilm_fast.step_linear(*_to_device(case).values())
    step_cases.check_linear(case, out.cpu(), normal.cpu())


@pytest.mark.parametrize("mask", [-1, 4])
def test_step_embedding_and_norm_small(mask: int) -> None:
    case = step_cases.embedding(384, mask)
    out = torch.ops.minilm_fast.step_embedding(*_to_device(case).values())
    step_cases.check_embedding(case, out.cpu())
    x, weight, bias = torch.randn(7, 384), *torch.randn(2, 384)
    normal = torch.ops.minilm_fast.step_norm(
        x.cuda(), weight.cuda(), bias.cuda(), step_cases.EPS, torch.bfloat16, False
    )
    step_cases.check_norm(x, weight, bias, normal.cpu())


@torch.inference_mode()
def test_a_step_in_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = small_model()
    engine = InferenceEngine(config, state, "bf16", device="cuda")
    assert engine._few_rows is not None
    run = after_prefill(engine)
    mine, scores = run(), engine.predict(run(), 3)[0]
    if ops.kernels_can_overlap(engine.device):
        monkeypatch.setattr(few_rows, "OVERLAP", True)
        for _ in range(20):
            assert torch.equal(run(), mine) and torch.equal(engine.predict(run(), 3)[0], scores)
    monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    theirs, expected = run(), engine.predict(run(), 3)[0]
    assert (mine - theirs).float().norm() <= 0.02 * theirs.float().norm()
    assert (scores - expected).abs().max() <= 0.3


def test_beams_and_ngrams_small() -> None:
    tokens, lengths = torch.randint(0, 4, (50, 70), dtype=torch.int32), torch.randint(0, 71, (50,), dtype=torch.int32)
    ignored = torch.tensor([1], dtype=torch.int32)
    with backend("cuda"):
        banned = ops.ban_repeated_ngrams(tokens.cuda(), lengths.cuda(), 3, ignored.cuda())
    assert torch.equal(banned.cpu(), reference.ban_repeated_ngrams(tokens, lengths, 3, ignored))
    for case in beam_cases.CASES.values():
        beam_cases.check(case, torch.ops.minilm_fast.advance_beams, "cuda")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 3, "length_penalty": 0.7, "forbid_duplicate_ngrams": True, "ngram_size": 2, "min_len": 4},
        {"beam_size": 2, "pos_shift": True},
    ],
)
def test_decoding_gives_the_answers_of_the_cpu(options: dict[str, object]) -> None:
    """Steps are replays of a graph."""
    config, state = small_model()
    sources = random_sources()
    chosen = SearchOptions(batch_size=4, max_tgt_length=12, **options)
    plain = dict(BeamSearch(InferenceEngine(config, state), chosen, SPECIAL, ignored=[7]).run(sources))
    engine = InferenceEngine(config, state, device="cuda")
    found = dict(BeamSearch(engine, chosen, SPECIAL, ignored=[7]).run(sources))
    assert {index: hypothesis.ids for index, hypothesis in found.items()} == {i: h.ids for i, h in plain.items()}
    for index, hypothesis in plain.items():
        assert found[index].score == pytest.approx(hypothesis.score, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "patience"),
    [({}, 0), ({"beam_size": 3, "forbid_duplicate_ngrams": True, "ngram_size": 2}, 2)],
)
def test_graphs_of_all_sizes_and_the_next_call(
    options: dict[str, object], patience: int, monkeypatch: pytest.MonkeyPatch, gpu: Any
) -> None:
    """Each size and each prefill is captured when it has been used often enough, and replayed from then on."""
    monkeypatch.setattr(pool, "PATIENCE", patience)
    monkeypatch.setattr(pool, "PREFILL_PATIENCE", patience)
    config, state = small_model()
    engine, sources = InferenceEngine(config, state, device="cuda"), random_sources()
    plain_engine, kept = InferenceEngine(config, state), []
    for given, batch_size in ((sources, 9), (sources[:2], 2), (sources[3:], 9), (sources, 4)):
        chosen = SearchOptions(batch_size=batch_size, max_tgt_length=12, **options)
        plain = dict(BeamSearch(plain_engine, chosen, SPECIAL).run(given))
        found = dict(BeamSearch(engine, chosen, SPECIAL).run(given))
        assert {index: hypothesis.ids for index, hypothesis in found.items()} == {i: h.ids for i, h in plain.items()}
        kept.append(*engine.kept.values())
    assert all(x is kept[0] for x in kept)
    assert ({9} if patience else {9, 2}) <= set(kept[0]._graphs) and kept[0]._prefills
    if gpu is not None:
        assert gpu.replays > len(kept[0]._graphs) > 1


def test_overlapping_kernels_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = small_model()
    sources, chosen = random_sources(), SearchOptions(batch_size=4, max_tgt_length=12)

    def found() -> dict[int, object]:
        engine = InferenceEngine(config, state, "bf16", device="cuda")
        if not ops.kernels_can_overlap(engine.device):
            pytest.skip("kernels cannot overlap on this GPU")
        return dict(BeamSearch(engine, chosen, SPECIAL, ignored=[7]).run(sources))

    plain = found()
    monkeypatch.setattr(few_rows, "OVERLAP", True)
    assert found() == plain


@needs_gpu
def test_operators_of_decoding() -> None:
    check_calls(decoding_calls("cuda"))


@needs_gpu
def test_operators_of_training() -> None:
    check_calls(training_calls("triton_", "cuda"))


@needs_gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_training_step_is_one_graph(compiler: str) -> None:
    model, batch = test_compile.small_model(0.1).cuda().train(), test_compile.small_batch().to("cuda")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected, found = (test_compile.gradients(model, run, batch) for run in (model, compiled))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_encoding_is_one_graph() -> None:
    encoder, batch = test_compile.small_model(0.0).bert.cuda().eval(), test_compile.small_batch().to("cuda")
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = encoder(batch.input_ids, batch.position_ids, batch.layout)
        torch.testing.assert_close(compiled(batch.input_ids, batch.position_ids, batch.layout), expected)


def test_a_search_that_finds_no_memory_can_be_used_again() -> None:
    config, state = small_model()
    search = BeamSearch(
        InferenceEngine(config, state, device="cuda"), SearchOptions(batch_size=4, max_tgt_length=12), SPECIAL
    )
    sources = random_sources()
    expected = dict(search.run(sources))
    # Keys and values of a source take 1 KiB a token: 64 KiB times the slots, which is more than there is.
    count = (torch.cuda.get_device_properties(0).total_memory >> 16) + 1
    many = SearchOptions(batch_size=count, max_tgt_length=12)
    greedy = BeamSearch(search.engine, many, SPECIAL)
    with pytest.raises(NotEnoughMemory, match="--batch_size"):
        dict(greedy.run([[5] * 64] * count))
    assert dict(search.run(sources)) == expected
