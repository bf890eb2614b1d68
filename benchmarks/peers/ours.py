"""minilm_fast itself, through its public Python interface."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vocabulary import VOCABULARY_FILE

from peers.base import DecodeJob, Peer

SPECIAL_TOKENS = 2
STAGES = {"prefill": "source", "step": "step", "predict": "vocabulary"}
"""Methods of the engine and the stage of decoding that each one is."""


class MinilmFast(Peer):
    """The whole batch in ``Model.generate``; no sentence may leave early."""

    name = "minilm_fast"
    dtypes = ("fp32", "bf16", "int8")

    def __init__(self, job: DecodeJob) -> None:
        super().__init__(job)
        self.backend = "none"

    def version(self) -> str:
        import torch

        import minilm_fast

        return f"minilm_fast {minilm_fast.__version__}, torch {torch.__version__}"

    def settings(self) -> str:
        slow = " (the extension is not in use: slow)" if self.backend == "reference" else ""
        return f"backend {self.backend}{slow}, {self.job.threads} threads"

    def build(self) -> None:
        import torch

        from minilm_fast import Model, Tokenizer
        from minilm_fast.ops._dispatch import select

        torch.set_num_threads(self.job.threads)
        shape = self.job.shape
        config = shape.config()
        tokenizer = Tokenizer.from_pretrained(self.job.folder / VOCABULARY_FILE, do_lower_case=True)
        self.model = Model.from_config(config, tokenizer, seed=self.job.seed)
        self.model.engine(self.job.dtype)
        self.backend = select("decode_attention", torch.empty(0))
        tokens = [[tokenizer.tokens[i] for i in source] for source in self.job.sources(SPECIAL_TOKENS)]
        self.batch: list[Any] = [" ".join(source) for source in tokens] if self.job.as_text else tokens

    def decode(self, steps: int) -> list[int]:
        load = self.job.load
        results = self.model.generate(
            self.batch,
            dtype=self.job.dtype,
            batch_size=load.batch,
            beam_size=load.beam,
            max_seq_length=load.source + steps,
            max_tgt_length=steps,
            min_len=steps,
            forbid_duplicate_ngrams=load.ngram > 0,
            ngram_size=max(load.ngram, 1),
            forbid_ignore_word=".",
            early_exit=False,
            continuous_batching=False,
        )
        for result in results:
            if result.source_length != load.source or result.truncated or result.unknown:
                raise RuntimeError(f"a source was read as {result.source_length} tokens, {load.source} were meant")
        return [len(result.ids) for result in results]

    def breakdown(self, steps: int) -> dict[str, float]:
        """Seconds of the calling thread under the profiler by ``stage: operator``; the rest is ``Python``."""
        from torch.profiler import ProfilerActivity, profile, record_function

        engine: Any = self.model.engine(self.job.dtype)
        for method, stage in STAGES.items():
            setattr(engine, method, _labelled(getattr(engine, method), stage, record_function))
        try:
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                start = time.perf_counter()
                self.decode(steps)
                wall = time.perf_counter() - start
        finally:
            for method in STAGES:
                delattr(engine, method)
        seconds: dict[str, float] = defaultdict(float)
        for event in trace.events() or ():
            if event.name in STAGES.values() or ((parent := event.cpu_parent) is not None and not _is_label(parent)):
                continue
            seconds[f"{_stage(event)}: {_operator(event.name)}"] += event.cpu_time_total / 1e6
        seconds["Python"] = wall - sum(seconds.values())
        return dict(seconds)


def _labelled(method: Callable[..., Any], label: str, record_function: Callable[[str], Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return method(*args, **kwargs)

    return call


def _is_label(event: Any) -> bool:
    return event.name in STAGES.values()


def _stage(event: Any) -> str:
    return event.cpu_parent.name if event.cpu_parent is not None else "search"


def _operator(name: str) -> str:
    namespace, _, operator = name.partition("::")
    return operator if namespace == "minilm_fast" else "other torch operators"
