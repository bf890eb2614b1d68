"""The simulated GPU: what it refuses, and whole programs on it, whose results are those of the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_distill
import torch
from kernel_checks import ON_GPU, SLOW
from simulated_device import SimulatedGPU
from simulated_gpu import simulated_gpu
from test_pooled_search import SPECIAL, random_sources
from torch.nn import functional as F
from training_files import RUN, arguments, copy_model

from minilm_fast import decode, ops, run_seq2seq
from minilm_fast.config import Config
from minilm_fast.decoding import pool
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.search import BeamSearch
from minilm_fast.modeling.inference import InferenceEngine
from minilm_fast.modeling.model import Model
from minilm_fast.ops import _cuda, reference
from tests.command import BEAM, INPUTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def _captured(run: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@ON_GPU
def test_tensors_of_two_devices_do_not_meet() -> None:
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    assert there.device == torch.device("cuda", 0) and there.is_cuda and there.cpu().device.type == "cpu"
    for meet in (lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.equal(there, here)):
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    there[:1].copy_(here[:1] + 4)
    assert there.tolist() == [5.0, 1.0]
    with pytest.raises(NotImplementedError, match="adamw has no kernel for CUDA"):
        torch.ops.minilm_fast.adamw(*[there.clone() for _ in range(4)], 1e-3, 0.9, 0.999, 1e-8, 1.0)


@ON_GPU
def test_gradients() -> None:
    x, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).to(device)
        F.cross_entropy(model(x.to(device)), target.to(device)).backward()
        assert all(p.device.type == p.grad.device.type == device for p in model.parameters())
        found.append([p.grad.cpu() for p in model.parameters()])
    assert all(map(torch.equal, *found))


@ON_GPU
def test_a_capture_changes_nothing_and_a_replay_all(gpu: SimulatedGPU) -> None:
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = _captured(lambda: total.add_(x * 2))
    assert total.tolist() == [0.0] * 3
    x.fill_(3.0)
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [6.0 * count] * 3
    assert gpu.replays == 2


@ON_GPU
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0, 2.0]).cuda(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.empty(2, pin_memory=True),
    ],
)
def test_what_waits_cannot_be_captured(wait: Any) -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        _captured(lambda: wait(x))
    wait(x)


@ON_GPU
def test_a_graph_does_not_keep_what_it_reads() -> None:
    out, more = torch.zeros(2, device="cuda"), [torch.tensor([1, 2], device="cuda")]
    graph = _captured(lambda: out.add_(more[0]))
    graph.replay()
    assert out.tolist() == [1.0, 2.0]
    more.clear()
    with pytest.raises(RuntimeError, match="memory that has been given back"):
        graph.replay()


@ON_GPU
def test_a_graph_finds_nothing_of_its_last_replay() -> None:
    kept: list[torch.Tensor] = []
    out = torch.zeros(2, device="cuda")

    def run() -> None:
        kept.append(torch.empty(2, device="cuda"))
        out.copy_(kept[0])
        kept[0].fill_(1.0)

    graph = _captured(run)
    for _ in range(2):
        graph.replay()
        assert out.isnan().all()


@ON_GPU
def test_pinned_memory_is_read_and_written_late() -> None:
    x, host = torch.ones(2, device="cuda"), torch.zeros(2, pin_memory=True)
    host.copy_(x, non_blocking=True)
    assert host.isnan().all()
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    event.synchronize()
    assert event.query() and host.tolist() == [1.0, 1.0]
    x.copy_(host, non_blocking=True)
    host.zero_()
    with pytest.raises(AssertionError, match="pinned memory changed while read"):
        torch.cuda.synchronize()


@ON_GPU
def test_there_is_an_end_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(1 << 29, device="cuda")


def test_it_leaves_no_trace() -> None:
    with simulated_gpu():
        assert torch.cuda.is_available() and torch.zeros(1, device="cuda").is_cuda
    assert not torch.cuda.is_available() and not torch.zeros(1).is_cuda
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


def _engines(heads: int, size: int, dtype: str) -> tuple[InferenceEngine, InferenceEngine]:
    """Of a model with such heads, on the CPU and on the GPU."""
    torch.manual_seed(0)
    config = Config(60, heads * size, 2, heads, 2 * heads * size, max_position_embeddings=64, type_vocab_size=2)
    state = {name: x * 4 for name, x in Model.from_config(config).state.items()}
    return InferenceEngine(config, state, dtype), InferenceEngine(config, state, dtype, device="cuda")


@ON_GPU
@pytest.mark.parametrize(("heads", "size"), [(4, 12), (2, 26), (1, 80)])
def test_heads_of_any_size_take_the_kernels(heads: int, size: int, gpu: SimulatedGPU) -> None:
    plain, engine = _engines(heads, size, "fp32")
    assert engine.head_dim in _cuda.HEAD_SIZES
    sources, options = random_sources()[:4], SearchOptions(batch_size=2, beam_size=2, max_tgt_length=6)
    with ops.noted_fallbacks() as fallbacks:
        found = dict(BeamSearch(engine, options, SPECIAL).run(sources))
    assert not fallbacks and gpu.replays > 0
    expected = dict(BeamSearch(plain, options, SPECIAL).run(sources))
    assert {i: h.ids for i, h in found.items()} == {i: h.ids for i, h in expected.items()}


@ON_GPU
def test_steps_by_the_specification_are_not_captured(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGPU) -> None:
    """As where the extension was built without CUDA; the specification waits for the device."""
    monkeypatch.setattr(_cuda, "registered", lambda operator, key: key == "CPU")
    monkeypatch.setattr(pool, "PREFILL_PATIENCE", 0)
    with pytest.warns(RuntimeWarning, match="runs in plain PyTorch"):
        plain, engine = _engines(2, 32, "fp32")
        sources, options = random_sources()[:3], SearchOptions(batch_size=2, beam_size=2, max_tgt_length=5)
        with ops.noted_fallbacks() as fallbacks:
            found = dict(BeamSearch(engine, options, SPECIAL).run(sources))
    assert {"decode_attention", "advance_beams"} <= fallbacks and gpu.replays == 0
    expected = dict(BeamSearch(plain, options, SPECIAL).run(sources))
    assert {i: h.ids for i, h in found.items()} == {i: h.ids for i, h in expected.items()}


@ON_GPU
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("size", [12, 80])
def test_attention_of_heads_of_any_size(size: int, backend: str) -> None:
    layout = ops.SequenceLayout.pseudo_masked([9, 0, 17], [5, 1, 3])
    dtype = torch.bfloat16
    projection, upstream = (torch.randn(layout.total, *n, size).to(dtype) for n in ((3, 2), (2,)))
    results = []
    for device in ("cpu", "cuda"):
        x = projection.to(device).requires_grad_()
        with ops.backend("cpu" if device == "cpu" else backend):
            whole, _ = ops.projected_attention(x, layout.to(device))
            parts, _ = ops.attention(*x.unbind(1), layout.to(device))
        assert torch.equal(whole, parts) and whole.shape == (layout.total, 2, size)
        grad = torch.autograd.grad(whole, x, upstream.to(device), retain_graph=True)[0]
        assert torch.equal(grad, torch.autograd.grad(parts, x, upstream.to(device))[0])
        results.append([whole.detach().cpu().double(), grad.cpu().double()])
    x = projection.double().requires_grad_()
    exact = reference.attention(*x.unbind(1), layout, scale=size**-0.5)[0]
    for found in results:
        wanted = (exact.detach(), torch.autograd.grad(exact, x, upstream.double(), retain_graph=True)[0])
        for mine, right in zip(found, wanted, strict=True):
            assert (mine - right).norm() < 0.01 * right.norm()


@ON_GPU
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_padded_attention_of_heads_of_any_size(backend: str) -> None:
    x, upstream = torch.randn(3, 7, 3, 2, 12).bfloat16(), torch.randn(3, 7, 2, 12).bfloat16()
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        with ops.backend("cpu" if device == "cpu" else backend):
            out = ops.padded_attention(*leaf.unbind(2), mask.to(device))
            results.append([out, torch.autograd.grad(out, leaf, upstream.to(device))[0]])
    for expected, found in zip(*results, strict=True):
        assert (found.detach().cpu() - expected).float().norm() < 0.01 * expected.float().norm()


def _output(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_file_is_decoded_as_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*BEAM, "--input_file", str(INPUTS), "--forbid_duplicate_ngrams", "--max_tgt_length", "10", "--output_file"]
    assert decode.main([*flags, str(tmp_path / "cpu")]) == 0
    with simulated_gpu() as gpu:
        assert decode.main([*flags, str(tmp_path / "gpu")]) == 0
        assert gpu.replays > 20
        assert decode.main([*flags, str(tmp_path / "no_cuda"), "--no_cuda"]) == 0
        assert decode.main([*flags, str(tmp_path / "int8"), "--dtype", "int8"]) == 2
    assert "error: --dtype int8 is not for a GPU" in capsys.readouterr().err
    assert _output(tmp_path / "gpu") == _output(tmp_path / "no_cuda") == _output(tmp_path / "cpu")


def _losses(folder: Path) -> list[float]:
    records = json.loads((folder / "history.json").read_text())["records"]
    return [value for record in records for name, value in sorted(record.items()) if "loss" in name]


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=SLOW)])
def test_fine_tuning_as_on_the_cpu(precision: str, tmp_path: Path) -> None:
    """Also when it is taken up again."""
    model = copy_model(tmp_path / "model")
    flags = {**RUN, **({} if precision == "fp32" else {precision: True})}
    given = arguments(tmp_path, model, **flags, output_dir=tmp_path / "gpu")
    with simulated_gpu():
        assert run_seq2seq.main(given) == 0
        losses = _losses(tmp_path / "gpu")
        shutil.rmtree(tmp_path / "gpu" / "ckpt-6")
        assert run_seq2seq.main(given) == 0
    assert _losses(tmp_path / "gpu") == losses
    if precision == "fp16":
        assert all(0 < loss < 10 for loss in losses)
        return
    assert run_seq2seq.main(arguments(tmp_path, model, **flags, output_dir=tmp_path / "cpu")) == 0
    assert losses == pytest.approx(_losses(tmp_path / "cpu"), rel={"fp32": 1e-4, "bf16": 2e-2}[precision])


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_distilling_as_on_the_cpu(preset: str, tmp_path: Path) -> None:
    test_distill.copy_teacher(tmp_path / "teacher")
    test_distill.write_corpus(tmp_path / "train.txt", seed=0, documents=30)
    flags = {"preset": preset, "dropout": 0.1, "num_training_steps": 4}
    with simulated_gpu():
        assert test_distill.main(test_distill.arguments(tmp_path, tmp_path / "gpu", **flags)) == 0
    assert test_distill.main(test_distill.arguments(tmp_path, tmp_path / "cpu", **flags)) == 0
    assert _losses(tmp_path / "gpu") == pytest.approx(_losses(tmp_path / "cpu"), rel=1e-3)
