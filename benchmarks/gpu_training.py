"""The case of ``gpu.py`` for a training step: forward, backward, clipping and update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from gpu_case import CHECKED, OURS, Case, Goal, Size, System
from trainers import Compiled, HuggingFace, Original, Ours, Trainer, TrainJob
from training_worker import make_samples
from work import pseudo_masked_training

from minilm_fast.data.masking import Sample

DROPOUT = 0.1
PEERS: dict[str, type[Trainer]] = {
    "torch.compile and SDPA": Compiled,
    "SDPA": HuggingFace,
    "the original's algorithm": Original,
}
_NAMES = {
    "bert.embeddings.LayerNorm": "norm",
    "bert.embeddings": "",
    "_embeddings": "",
    "bert.encoder.layer": "layers",
    "attention.self.": "",
    "attention.output.dense": "dense",
    "attention.output.LayerNorm": "first",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "second",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.transform": "head",
    "cls.predictions": "head",
}
"""From canonical names to those of ``trainers.Original``, to be applied in this order."""


def original_name(name: str) -> str:
    """The name that ``trainers.Original`` has for a canonical one."""
    for theirs, own in _NAMES.items():
        name = name.replace(theirs, own)
    return name.lstrip(".")


def training(size: Size) -> Iterator[Case]:
    """A step of sequence-to-sequence fine-tuning with pseudo masks; the systems begin with the same weights."""
    samples = make_samples([[size.source, size.target]] * size.batch, size.shape.vocab, seed=0)
    job = TrainJob(
        size.shape, size.source, size.target, DROPOUT, size.format, device=str(size.device), compiler=size.compiler
    )
    ours = Ours(job)
    state = {name: x.detach().cpu().clone() for name, x in ours.model.state_dict().items()}
    exact_job = TrainJob(size.shape, size.source, size.target, 0.0, "fp32", device=str(size.device))

    def system(kind: type[Trainer]) -> System:
        @cache
        def trainer() -> Trainer:
            return with_weights(kind(job), state)

        return System(lambda: lambda: trainer().update(samples), check=lambda: loss_and_gradients(trainer(), samples))

    flops = sum(pseudo_masked_training(size.shape, size.source, size.target))
    yield Case(
        "training step",
        {
            OURS: System(lambda: lambda: ours.update(samples), check=lambda: loss_and_gradients(ours, samples)),
            **{name: system(kind) for name, kind in PEERS.items()},
        },
        exact=lambda: loss_and_gradients(with_weights(HuggingFace(exact_job), state), samples),
        operations=size.batch * flops,
        units=size.batch,
        unit="sequences",
        goals=[Goal("a second", 4000), Goal("times", 2, "torch.compile and SDPA")],
    )


def with_weights(trainer: Trainer, state: dict[str, torch.Tensor]) -> Trainer:
    """The trainer, which begins with these weights (canonical names)."""
    if isinstance(trainer, Original):
        state = {original_name(name): x for name, x in state.items()}
    found = trainer.model.load_state_dict(state, strict=False)
    # Hugging Face's has the tied projection a second time.
    missing = [name for name in found.missing_keys if not name.startswith("cls.predictions.decoder")]
    if missing or found.unexpected_keys:
        raise ValueError(f"weights do not fit: {missing[:1]} {found.unexpected_keys[:1]}")
    return trainer


def loss_and_gradients(trainer: Trainer, samples: list[Sample]) -> list[torch.Tensor]:
    """The loss of the first samples without dropout, and its gradients in the word embedding and a first layer.

    It is computed without torch.compile, which would compile everything a second time for it.
    """
    trainer.model.eval()
    loss_of = HuggingFace.loss if isinstance(trainer, HuggingFace) else type(trainer).loss
    with trainer.job.autocast:
        loss = loss_of(trainer, samples[:CHECKED])
    loss.backward()
    wanted = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"]
    if isinstance(trainer, Original):
        wanted = [original_name(name) for name in wanted]
    parameters = dict(trainer.model.named_parameters())
    found = [loss.detach(), *(parameters[name].grad for name in wanted)]
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.model.train()
    return [x for x in found if x is not None]
