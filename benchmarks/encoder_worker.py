"""The child process of ``encoder.py``: prepares models and cases, or is one encoder. Started by ``harness.py``."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import encoder_texts
import machine
import numpy as np
import vocabulary
from peers import encoders
from peers.encoder_base import ONNX_FILE, PREPARED_CASES, Case, EncoderJob, EncoderPeer
from shapes import SHAPES, ModelShape
from worker import serve

CALIBRATION_TEXTS = 128
WORDS_OF_A_RANDOM_TEXT = (4, 60)


class Session:
    """What this process has built so far."""

    def __init__(self) -> None:
        self.peer: EncoderPeer | None = None
        self.embeddings: dict[str, np.ndarray] = {}

    def prepare(
        self, model: str | None, shape: str, folder: str, texts: list[str], count: int, batch: int, max_length: int,
        equal: list[list[int]], peers: list[str], dtypes: list[str], seed: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Writes the cases, and the model in every form that the peers load.

        Returns:
            the model's folder and shape, the cases' sizes, and what could not be made with the reasons.
        """
        where = Path(folder)
        job = EncoderJob(_random_model(SHAPES[shape], where, seed) if model is None else Path(model), where, "fp32", 1)
        config, tokens, sequences, calibration = _read(job.model, texts, count, max_length, seed)
        cases = [encoder_texts.equal_case(*sizes, sequences) for sizes in equal]
        cases += encoder_texts.mixed_cases(sequences, batch)
        (where / PREPARED_CASES).write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        shaped = ModelShape(
            f"l{config.num_hidden_layers}-h{config.hidden_size}", config.num_hidden_layers, config.hidden_size,
            config.num_attention_heads, config.intermediate_size, config.vocab_size, config.max_position_embeddings,
        )  # fmt: skip
        return {
            "model": str(job.model),
            "shape": asdict(shaped),
            "cases": [_describe(case) for case in cases],
            "left_out": _convert(job, config, tokens, calibration, peers, "int8" in dtypes),
        }

    def build(self, name: str, job: dict[str, Any], cores: list[int]) -> dict[str, Any]:
        """Build the peer and encode every case once. Before that, the process is bound to the cores."""
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        parsed = EncoderJob.from_json(job)
        cases = [Case(**values) for values in json.loads((parsed.folder / PREPARED_CASES).read_text(encoding="utf-8"))]
        self.peer = encoders.create(name, parsed, cases)
        self.peer.build()
        self.embeddings = self.peer.prepare()
        return {"version": self.peer.version(), "settings": self.peer.settings()}

    def check(self, reference: str, write: bool) -> dict[str, Any]:
        """Compare the embeddings of every case with those in a file, or write the file.

        Returns:
            by case the largest difference of an element, and mean and least cosine.
        """
        if write:
            np.savez(reference, **self.embeddings)
        expected = np.load(reference)
        return {"agreement": {name: _agreement(found, expected[name]) for name, found in self.embeddings.items()}}

    def run(self, case: str) -> dict[str, Any]:
        assert self.peer is not None
        busy, cpu, start = machine.busy_seconds(), time.process_time(), time.perf_counter()
        measured = self.peer.run(case)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        others = max(0.0, machine.busy_seconds() - busy - cpu) / wall
        return {**measured, "sequences": self.peer.cases[case].sequences, "others": others}

    def memory(self) -> dict[str, Any]:
        return {"peak": machine.peak_memory()}

    def peak(self, threads: int, cores: list[int]) -> dict[str, Any]:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        return {"peak": machine.measure_peak(threads)}


def _describe(case: Case) -> dict[str, Any]:
    lengths = [len(sequence) for batch in case.batches for sequence in batch]
    sizes = {"name": case.name, "sequences": case.sequences, "tokens": case.tokens, "padded": case.padded}
    return {**sizes, "lengths": lengths}


def _agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    if found.shape != expected.shape:
        raise RuntimeError(f"embeddings of shape {found.shape}, expected {expected.shape}")
    cosines = (found * expected).sum(1)
    differences = float(np.abs(found - expected).max())
    return {"difference": differences, "mean_cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}


def _random_model(shape: ModelShape, folder: Path, seed: int) -> Path:
    """A checkpoint with random weights and a made-up vocabulary."""
    from minilm_fast import Model, Tokenizer

    vocabulary.write(shape.vocab, folder)
    config = shape.config()
    tokenizer = Tokenizer.from_pretrained(folder / vocabulary.VOCABULARY_FILE, do_lower_case=True)
    Model.from_config(config, tokenizer, seed=seed).save_pretrained(folder / "model")
    return folder / "model"


def _read(
    folder: Path, files: list[str], count: int, max_length: int, seed: int
) -> tuple[Any, list[str], list[list[int]], list[list[int]]]:
    """Configuration, vocabulary, the sequences to measure, and others for calibration."""
    from minilm_fast import Tokenizer, checkpoint

    config = checkpoint.load(folder).config
    tokenizer = Tokenizer.from_pretrained(folder, do_lower_case=True)
    wanted = count + CALIBRATION_TEXTS
    if files:
        texts = encoder_texts.choose([encoder_texts.read(Path(file)) for file in files], wanted, seed)
    else:
        rng = random.Random(seed)
        words = tokenizer.tokens[len(vocabulary.SPECIALS) :]
        texts = [" ".join(rng.choices(words, k=rng.randint(*WORDS_OF_A_RANDOM_TEXT))) for _ in range(wanted)]
    most = min(max_length, config.max_position_embeddings) - 2
    bodies = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)[:most]) for text in texts]
    sequences = [[tokenizer.cls_id, *body, tokenizer.sep_id] for body in bodies]
    return config, list(tokenizer.tokens), sequences[:count], sequences[count:]


def _convert(
    job: EncoderJob, config: Any, tokens: list[str], calibration: list[list[int]], peers: list[str], int8: bool
) -> dict[str, str]:
    """Makes what the peers load; for each that failed the reason."""
    steps: dict[str, Callable[[], None]] = {}
    if {"onnxruntime", "openvino"} & set(peers):
        steps["onnxruntime fp32"] = lambda: _export(job)
    if "onnxruntime" in peers and int8:
        from peers import encoder_onnxruntime

        steps["onnxruntime int8"] = lambda: encoder_onnxruntime.quantize(
            job, config.num_attention_heads, config.hidden_size
        )
    if "openvino" in peers and int8:
        from peers import encoder_openvino

        steps["openvino int8"] = lambda: encoder_openvino.quantize(job, calibration)
    if "ctranslate2" in peers:
        from peers import encoder_ctranslate2

        steps["ctranslate2 fp32"] = lambda: encoder_ctranslate2.convert(job, tokens)
    failed = {}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            # Whatever a peer's converter stumbles over, the others can be measured.
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return failed


def _export(job: EncoderJob) -> None:
    from minilm_fast.export_onnx import export_onnx

    export_onnx(job.model, job.folder / ONNX_FILE, normalize=True)


if __name__ == "__main__":
    serve(Session())
