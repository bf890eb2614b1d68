"""CTranslate2's encoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from peers.base import NotSupported
from peers.encoder_base import CTRANSLATE_FOLDER, Case, EncoderJob, EncoderPeer, Padded

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class CTranslate2(EncoderPeer):
    """One encoder with all threads inside an operator."""

    name = "ctranslate2"
    dtypes = ("fp32", "bf16", "int8")

    def version(self) -> str:
        import ctranslate2

        return f"ctranslate2 {ctranslate2.__version__}"

    def settings(self) -> str:
        return f"compute_type {self.encoder.compute_type}, inter_threads 1"

    def build(self) -> None:
        import ctranslate2

        wanted = COMPUTE_TYPES[self.job.dtype]
        supported = ctranslate2.get_supported_compute_types("cpu")
        if wanted not in supported:
            raise NotSupported(f"{self.version()} has no {wanted} on this CPU (only {', '.join(sorted(supported))})")
        self.encoder = ctranslate2.Encoder(
            str(self.job.folder / CTRANSLATE_FOLDER),
            device="cpu",
            compute_type=wanted,
            inter_threads=1,
            intra_threads=self.job.threads,
        )

    def ready(self, sequences: list[list[int]]) -> Any:
        return sequences, Padded.from_sequences(sequences).attention_mask[..., None].astype(np.float32)

    def encode(self, batch: Any, case: Case) -> np.ndarray:
        sequences, weights = batch
        hidden = np.array(self.encoder.forward_batch(sequences).last_hidden_state)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        normalized: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return normalized


def convert(job: EncoderJob, tokens: list[str]) -> None:
    """Writes the model in CTranslate2's form; weights are quantised when it is loaded."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """The vocabulary is given here, so no tokenizer files are needed."""

        def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            model = super().load_model(model_class, model_name_or_path, **kwargs)
            # The converter reads what the configurations of transformers 5 no longer have.
            model.config.position_embedding_type = "absolute"
            return model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return SimpleNamespace(
                get_vocab=lambda: {token: number for number, token in enumerate(tokens)},
                convert_ids_to_tokens=lambda number: tokens[number],
                bos_token="[CLS]",
                eos_token="[SEP]",
                unk_token="[UNK]",
            )

    Converter(str(job.model)).convert(str(job.folder / CTRANSLATE_FOLDER))
